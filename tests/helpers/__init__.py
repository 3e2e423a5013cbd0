"""Problems, rules and comparisons that several test files use."""

import contextlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3
from optax_ev3 import adapt, explore

RULES = {
    "greedy": adapt.greedy,
    "lower_bound": adapt.lower_bound,
    "confident": adapt.confident,
}


# Ways to explore, all with a loss_fn.
STRATEGIES = {
    "one_step": {},
    "own": {"explore": explore.rounds(2)},
    "shared": {"explore": explore.rounds(2, gradients="shared")},
    "new": {"explore": explore.rounds(2, restart_state="new")},
    "never": {
        "explore": explore.branches(2, racing=explore.Racing(2)),
    },
    "behind": {
        "explore": explore.branches(
            2,
            restart=explore.worse_than("start", inner_state="copy"),
            averages=[explore.trajectory_average(), explore.branch_average()],
        ),
    },
    "relay": {"explore": explore.relay(2)},
}


def always(index: int) -> adapt.Rule:
    """A rule without judgement: adopts one candidate, keeps stable."""

    def decide(evidence, memory, key):
        del evidence, key
        return adapt.Decision(jnp.int32(index), jnp.asarray(False)), memory

    return adapt.Rule(lambda explorers: (), decide)


# A problem for trees of any structure: every number should become 1 (1 + 1j).


class Pair(NamedTuple):
    first: object
    second: object


def _target(leaf):
    return 1 + 1j if jnp.iscomplexobj(leaf) else 1


def distance(params):
    """Squared distance of a tree from its target, float32 or wider."""
    total = jnp.zeros([], jnp.float32)
    for leaf in jax.tree.leaves(params):
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        total += jnp.square(jnp.abs(wide - _target(leaf))).sum()
    return total


def score(params, batch):
    """One score for each number of the batch, which is a weight near 1."""
    return -distance(params) * batch


def loss(params, batch):
    return -score(params, batch).mean()


def gradient(params, batch):
    """Of the loss, in optax's convention for complex numbers."""
    return jax.tree.map(jnp.conj, jax.grad(loss)(params, batch))


def weights(count=16, seed=0):
    """A batch of ``count`` examples."""
    drawn = np.random.default_rng(seed).uniform(0.5, 1.5, count)
    return jnp.asarray(drawn, jnp.float32)


def _half():
    return jnp.array([0.25, -0.5, 2.0])


def _cast(dtype):
    return {"w": _half().astype(dtype), "b": jnp.zeros([2, 2], dtype)}


# Parameters by name; "float64" needs x64().
TREES = {
    "float16": lambda: _cast(jnp.float16),
    "bfloat16": lambda: _cast(jnp.bfloat16),
    "float32": lambda: _cast(jnp.float32),
    "float64": lambda: _cast(jnp.float64),
    "complex64": lambda: _cast(jnp.complex64),
    "mixed": lambda: {
        "a": _half().astype(jnp.bfloat16),
        "b": _half(),
        "c": _half().astype(jnp.float16),
        "d": _half().astype(jnp.complex64),
    },
    "none": lambda: {"w": _half(), "hole": None, "deep": [None, _half()[:1]]},
    "zero_size": lambda: {"w": _half(), "empty": jnp.zeros([0, 3])},
    "array": _half,
    "scalar": lambda: jnp.zeros([]),
    "nested": lambda: {
        "layers": (Pair({"w": _half()}, jnp.zeros([1])), [jnp.zeros([2, 1])]),
        "scale": Pair(jnp.zeros([]), ()),
    },
}


def x64(enable=True):
    """A context with 64-bit numbers."""
    if not enable:
        return contextlib.nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def lenient():
    """A context for foreign code that relies on rank promotion."""
    return jax.numpy_rank_promotion("allow")


def explorers():
    """Two inner optimizers: one with a state, one without."""
    return {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}


def transformation(rule="confident", **kwargs):
    """``ev3`` on the problem of this module."""
    kwargs = {"inner": explorers(), "assess_fn": score, **kwargs}
    adapt_rule = RULES[rule]() if isinstance(rule, str) else rule
    return optax_ev3.ev3(adapt=adapt_rule, **kwargs)


def stepper(tx):
    """``step(params, state, batch) -> params, state``, not jitted."""

    def step(params, state, batch):
        grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return step


def traced(fn, **kwargs):
    """``jax.jit(fn)``, and a list that gets an item whenever it is traced.

    Unlike JAX's own count of a function's programs, that does not forget any.
    """
    times = []

    def tracing(*args):
        times.append(len(times))
        return fn(*args)

    return jax.jit(tracing, **kwargs), times


_PROGRAMS = {}


def compiled(fn, *args):
    """``fn`` compiled for such arguments: equal programs once, without callbacks."""
    lowered = jax.jit(fn).lower(*args)
    key = lowered.as_text(), str(lowered.in_tree), str(lowered.out_tree)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = lowered.compile()
    return _PROGRAMS[key]


# Comparisons.


def says(error, *parts):
    """Expects an error whose message has all parts, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


def types(tree):
    """Shape, dtype and weak type of every leaf."""
    specs = jax.eval_shape(lambda x: x, tree)
    return jax.tree.map(lambda s: f"{s.dtype}{s.shape}{' weak' * s.weak_type}", specs)


def assert_same_types(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.leaves(types(actual)) == jax.tree.leaves(types(expected))


def assert_identical(actual, expected):
    """The same structure and types, and the same bits."""
    assert_same_types(actual, expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), (one, other)


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    """The same structure and nearly the same numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        one, other = (_wide(np.asarray(x)) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(_wide(np.asarray(leaf))).all(), leaf


def _wide(array):
    return array if array.dtype.kind in "biuc" else array.astype(np.float64)
