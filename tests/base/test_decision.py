"""Validity is enforced once, for any rule; the built-in rules need no correction."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_ev3 import adapt
from optax_ev3._src.base import evidence
from optax_ev3._src.base.decision import enforce_validity, fallback

CANDIDATES, CURRENT, STABLE = 5, 3, 4


def gather(scores, finite):
    flags = jnp.asarray(finite), jnp.zeros([CANDIDATES], bool)
    scores = {k: jnp.asarray(v, jnp.float32) for k, v in scores.items()}
    return evidence.gather(scores, *flags)


def test_where_the_candidates_are():
    found = gather({"score": np.ones(CANDIDATES)}, np.ones(CANDIDATES, bool))
    assert (found.candidates, found.proposals) == (CANDIDATES, 3)
    assert (found.current, found.stable) == (CURRENT, STABLE)


def test_without_a_valid_proposal_current_stays_or_stable_is_all_there_is():
    for current, stable in itertools.product([True, False], repeat=2):
        found = gather({"score": np.ones(5)}, [False] * 3 + [current, stable])
        expected = STABLE if stable and not current else CURRENT
        assert int(fallback(found)) == expected


@functools.cache
def _enforced():
    @jax.jit
    def enforced(finite, adopted, significant, promoted, otherwise):
        found = gather({"score": jnp.ones([CANDIDATES])}, finite)
        decision = adapt.Decision(adopted, significant, promoted)
        return enforce_validity(decision, found, otherwise)

    return enforced


def test_enforced_for_any_decision():
    """All indices, those that do not exist too; all of which one may be invalid."""
    for bad, adopted, promoted in itertools.product(
        range(CANDIDATES), range(-2, 7), range(-1, 6)
    ):
        finite = np.arange(CANDIDATES) != bad
        allowed, overruled = _enforced()(finite, adopted, True, promoted, CURRENT)
        good = 0 <= adopted < CANDIDATES and adopted != bad
        # Who would take its place anyhow may be adopted.
        good |= adopted == CURRENT
        may_promote = 0 <= promoted < CANDIDATES and promoted != bad
        assert int(allowed.adopted) == (adopted if good else CURRENT)
        assert bool(allowed.significant) == may_promote
        assert bool(overruled) == (not (good and may_promote))
        if may_promote:
            assert int(allowed.promoted) == promoted


def test_promoted_is_what_is_adopted_if_not_said():
    found = gather({"score": np.ones(5)}, [True, False, True, True, True])
    for adopted, significant in ((0, True), (1, False)):
        decision = adapt.Decision(jnp.int32(adopted), jnp.asarray(True))
        allowed, overruled = enforce_validity(decision, found)
        assert bool(allowed.significant) == significant != bool(overruled)
        assert int(allowed.promoted) == adopted


RULES = {
    "confident": adapt.confident(),
    "greedy": adapt.greedy(),
    "lower_bound": adapt.lower_bound(),
    "choose_and_confirm": adapt.choose_and_confirm(),
    "constrained": adapt.constrained("a", {"b": 0.1}),
    "constrained, lower_bound": adapt.constrained(
        "a", {"b": 0.1}, rule=adapt.lower_bound()
    ),
    "weighted": adapt.weighted({"a": 1.0, "b": 0.5}),
}


@pytest.mark.parametrize("name", RULES)
def test_built_in_rules_are_never_overruled(name):
    """Whatever is valid, as long as a proposal is: else there is nothing to decide."""
    rule, rounds = RULES[name], 200
    rng = np.random.default_rng(0)
    finite = rng.random([rounds, CANDIDATES]) < rng.choice([0.9, 0.5, 0.2], [rounds, 1])
    gains = rng.normal(scale=0.2, size=[rounds, 2, CANDIDATES, 1])
    values = rng.normal(size=[rounds, 2, 1, 20]) + gains
    values = jnp.float32(values + rng.normal(scale=0.2, size=[*gains.shape[:3], 20]))

    def one(state, given):
        finite, values, key = given
        scores = dict(zip("ab", values, strict=True))
        found = gather(scores if rule.objectives else {"a": scores["a"]}, finite)
        decision, state = rule.decide(found, state, key)
        allowed, overruled = enforce_validity(decision, found)
        explored = found.valid[:CURRENT].any()
        legal = found.valid[allowed.adopted] | ~found.valid.any()
        return state, (overruled & explored, legal, allowed.adopted)

    keys = jax.random.split(jax.random.key(0), rounds)
    given = jnp.asarray(finite), values, keys
    run = jax.jit(lambda given: jax.lax.scan(one, rule.init(3), given)[1])
    overruled, legal, adopted = map(np.asarray, run(given))
    assert legal.all()
    assert not overruled.any()
    assert len(np.unique(adopted)) == CANDIDATES
