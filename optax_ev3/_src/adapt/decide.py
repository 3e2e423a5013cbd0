"""What a rule decides, made safe: the only place where validity is enforced."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_ev3._src.base import select
from optax_ev3._src.base.decision import Decision, Rule, enforce_validity, fallback
from optax_ev3._src.base.evidence import Evidence, main_objective


class Verdict(NamedTuple):
    """A decision, and what comes with it.

    Attributes:
      decision: What is done: complete, and of valid candidates.
      evidence: What may be told of the scores.
      objective: The main one.
      explored: ``[]`` bool, whether any proposal was valid. If not, nothing is decided:
        ``current`` stays, or ``stable`` is adopted if only that is valid.
      overruled: ``[]`` bool, whether the rule decided otherwise.
      rule_state: What the rule remembers from now on.
    """

    decision: Decision
    evidence: Evidence
    objective: str
    explored: jax.Array
    overruled: jax.Array
    rule_state: Any


def decide(rule: Rule, evidence: Evidence, rule_state: Any, key: jax.Array) -> Verdict:
    """What the rule decides on the evidence of a round."""
    if rule.objectives:
        main_objective(evidence, rule.objectives)  # Raises if there are others.
    chosen, new_state = rule.decide(evidence, rule_state, key)
    told = evidence if chosen.evidence is None else chosen.evidence
    # A rule may hide candidates; it makes none valid.
    told = dataclasses.replace(told, valid=told.valid & evidence.valid)
    decision, overruled = enforce_validity(chosen, told)
    explored = told.explored
    return Verdict(
        decision._replace(
            adopted=jnp.where(explored, decision.adopted, fallback(told)),
            significant=explored & decision.significant,
        ),
        told,
        main_objective(told, rule.objectives),
        explored,
        overruled,
        select.where(explored, new_state, rule_state),
    )
