"""Rules: which candidate becomes visible, and which one stable."""

from optax_ev3._src.adapt.objectives import (
    constrained,
    lexicase,
    lexicographic,
    pareto,
    weighted,
)
from optax_ev3._src.adapt.rules import (
    Decision,
    Rule,
    choose_and_confirm,
    confident,
    greedy,
    lower_bound,
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
