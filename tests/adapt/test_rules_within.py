"""What rules know under other rules and under guards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_identical

import optax_ev3
from optax_ev3 import adapt, evidence, explore


def noisy(w, batch):
    """Scores near the parameter, with noise of their own for every parameter."""
    return {"score": -((w - batch) ** 2), "other": jnp.sin(9 * w + batch)}


def decisions(rule, rounds=12, **kwargs):
    """What was decided, and what the innermost rule remembers."""
    tx = optax_ev3.ev3(
        [optax.sgd(0.05), optax.sgd(0.4)],
        noisy,
        loss_fn=lambda w, batch: jnp.square(w - batch).mean(),
        adapt=rule,
        **kwargs,
    )

    @jax.jit
    def step(w, state, batch):
        updates, state = tx.update(2 * (w - batch.mean()), state, w, batch=batch)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros([])
    state = tx.init(w)
    generator = np.random.default_rng(0)
    while int(state.ev3_round) < rounds:
        w, state = step(w, state, jnp.asarray(generator.normal(1, 1, 8), jnp.float32))
    return (w, state.rule_state.inner, state.history.adopted, state.history.mean)


WITHIN = {
    "constrained": lambda rule: adapt.constrained("score", {"other": 1e6}, rule=rule),
    "weighted": lambda rule: adapt.weighted({"score": 1.0, "other": 0.1}, rule=rule),
}
PATIENT = {"clip": 1.5, "prior_rounds": 10.0}
BOLD = {"clip": 10.0, "prior_rounds": 1.0}


@pytest.mark.parametrize(
    ("kwargs", "same", "other"),
    [
        ({}, PATIENT, BOLD),
        ({"explore": explore.branches(2)}, BOLD, PATIENT),
    ],
    ids=["one_step", "never"],
)
@pytest.mark.parametrize("within", WITHIN)
def test_rules_within_know_the_kind_of_rounds(within, kwargs, same, other):
    found = decisions(WITHIN[within](None), **kwargs)
    assert_identical(
        found, decisions(WITHIN[within](adapt.confident(**same)), **kwargs)
    )
    differs = decisions(WITHIN[within](adapt.confident(**other)), **kwargs)
    assert not np.array_equal(found[1].pairs.total, differs[1].pairs.total)


def own_guard():
    def release(seen, memory, key):
        del key
        figures = {"score": seen.scores["score"].mean(axis=1)}
        return evidence.Evidence(figures, seen.valid, seen.is_ascent), memory

    return adapt.Guard(lambda: (), release, lambda memory, *_: memory)


GUARDS = {
    "none": lambda rule: rule,
    "ladder": lambda rule: adapt.guarded(rule, adapt.ladder()),
    "own": lambda rule: adapt.guarded(rule, own_guard()),
}


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", GUARDS)
def test_rules_see_the_past_under_a_guard(name, length):
    def decide(seen, memory, key):
        del key
        assert not seen.binary and not seen.resamples
        assert seen.one_step == (length == 1)
        if name != "none":
            assert seen.example_mask is None
        return adapt.Decision(jnp.int32(0), jnp.asarray(False)), (
            memory[0] * 10 + seen.past.rounds,
            seen.credit,
        )

    def init(explorers):
        return jnp.zeros([], jnp.int32), jnp.zeros([explorers])

    tx = optax_ev3.ev3(
        [optax.sgd(0.1), optax.sgd(-0.1)],
        lambda w: -(w**2) * jnp.ones([8]),
        adapt=GUARDS[name](adapt.Rule(init, decide)),
        explore=explore.one_step() if length == 1 else explore.rounds(length),
    )
    w = jnp.ones([])
    state = tx.init(w)
    for _ in range(4 * length):
        updates, state = jax.jit(tx.update)(2 * w, state, w)
        w = optax.apply_updates(w, updates)
    rule_state = state.rule_state if name == "none" else state.rule_state.rule_state
    rounds, credit = rule_state
    assert int(rounds) == 123
    assert credit[0] > 0 > credit[1]
