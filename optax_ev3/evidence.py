"""Evidence: what scores say and how surely, for rules of one's own."""

from optax_ev3._src.adapt.bounds import betting, mcnemar, paired_t, standard
from optax_ev3._src.adapt.corrections import bonferroni, corrected, max_t
from optax_ev3._src.base.decision import Bound
from optax_ev3._src.base.evidence import (
    Comparison,
    Differences,
    Estimate,
    Evidence,
    Resampled,
    compare,
    differences,
    estimate,
    gather,
    single_objective,
    take,
)
from optax_ev3._src.base.statistics import spend

__all__ = [
    "Bound",
    "Comparison",
    "Differences",
    "Estimate",
    "Evidence",
    "Resampled",
    "betting",
    "bonferroni",
    "compare",
    "corrected",
    "differences",
    "estimate",
    "gather",
    "max_t",
    "mcnemar",
    "paired_t",
    "single_objective",
    "spend",
    "standard",
    "take",
]
