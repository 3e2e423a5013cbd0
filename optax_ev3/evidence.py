"""Evidence: what scores say and how surely, for rules of one's own."""

from optax_ev3._src.evidence import (
    Comparison,
    Estimate,
    Evidence,
    compare,
    estimate,
    single_objective,
)

__all__ = [
    "Comparison",
    "Estimate",
    "Evidence",
    "compare",
    "estimate",
    "single_objective",
]
