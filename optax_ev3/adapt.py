"""Rules: which candidate becomes visible, and which one stable."""

from optax_ev3._src.adapt import (
    Decision,
    Rule,
    choose_and_confirm,
    confident,
    greedy,
    lower_bound,
)
from optax_ev3._src.objectives import (
    constrained,
    lexicase,
    lexicographic,
    pareto,
    weighted,
)

__all__ = [
    "Decision",
    "Rule",
    "choose_and_confirm",
    "confident",
    "constrained",
    "greedy",
    "lexicase",
    "lexicographic",
    "lower_bound",
    "pareto",
    "weighted",
]
