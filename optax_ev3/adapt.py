"""Rules: which candidate becomes visible, and which one stable."""

from optax_ev3._src.adapt.confident import confident
from optax_ev3._src.adapt.constrained import constrained
from optax_ev3._src.adapt.farsighted import farsighted
from optax_ev3._src.adapt.guards import guarded, ladder
from optax_ev3._src.adapt.rules import choose_and_confirm, greedy, lower_bound
from optax_ev3._src.adapt.weighted import weighted
from optax_ev3._src.base.decision import Decision, Guard, Rule

__all__ = [
    "Decision",
    "Guard",
    "Rule",
    "choose_and_confirm",
    "confident",
    "constrained",
    "farsighted",
    "greedy",
    "guarded",
    "ladder",
    "lower_bound",
    "weighted",
]
