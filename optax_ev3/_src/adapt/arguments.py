"""What rules for several objectives take: names, numbers, and rules within them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from optax_ev3._src.adapt.confident import confident
from optax_ev3._src.base.decision import Decision, Rule
from optax_ev3._src.base.evidence import Evidence


def single_rule(rule: Rule | None) -> Rule:
    """A rule for one objective, the default one if none is given."""
    if rule is None:
        return confident()
    if not isinstance(rule, Rule):
        raise TypeError(
            f"rule must be a rule, such as optax_ev3.adapt.greedy(), got {rule!r} of "
            f"type {type(rule).__name__}."
        )
    if rule.objectives:
        raise ValueError(
            f"rule must be one for a single objective, got one for "
            f"{list(rule.objectives)}."
        )
    return rule


def decide_within(
    rule: Rule, evidence: Evidence, state: Any, key: jax.Array
) -> tuple[Decision, Any]:
    """What the rule within another decides; raises if it is guarded."""
    decision, state = rule.decide(evidence, state, key)
    if decision.evidence is not None:
        raise ValueError(
            "adapt.guarded cannot stand within a rule for several objectives: the "
            "other objectives, which it does not see, would be told unguarded."
        )
    return decision, state


def forgetting(rule: Rule) -> Callable[[Any, jax.Array], Any] | None:
    """How a state forgets that holds the one of ``rule`` as ``inner``."""
    forget = rule.forget
    if forget is None:
        return None
    return lambda state, fresh: state._replace(inner=forget(state.inner, fresh))


def checked_names(names: Sequence[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be names of objectives, got {names!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{what} must differ, got {list(names)}.")
    return tuple(names)


def checked_number(value: Any, what: str) -> float:
    """A finite float of at least 0."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} must be a number, got {value!r}.")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{what} must be at least 0 and finite, got {value}.")
    return float(value)


def checked_numbers(numbers: Mapping[str, float], what: str) -> dict[str, float]:
    if not isinstance(numbers, Mapping):
        raise TypeError(f"{what} must be a mapping from objectives, got {numbers!r}.")
    if not numbers:
        raise ValueError(f"{what} must name at least one objective, got none.")
    checked_names(tuple(numbers), what)
    return {k: checked_number(v, f"{what}[{k!r}]") for k, v in numbers.items()}
