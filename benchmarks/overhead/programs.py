"""The problems of the overhead suite, and the programs that it compares."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_ev3
from benchmarks import models

BY_HAND, TUNED = "by hand", "by hand, tuned"

# Models and data.


class Problem(NamedTuple):
    """A model, as parameters and a score for each example, and batches of data."""

    params: Any
    score_fn: Callable[[Any, Any], jax.Array]
    batches: list[Any]

    def loss_fn(self, params, batch):
        return -self.score_fn(params, batch).mean()


def log_likelihood(params, batch):
    """Of an MLP."""
    return models.log_likelihood(models.forward(params, batch[0]), batch[1])


def mlp_problem(settings: Any) -> Problem:
    return Problem(
        models.mlp(*settings.mlp)[0](jax.random.key(0)),
        log_likelihood,
        noisy_batches((settings.mlp[0],), settings.batch),
    )


def conv_problem(settings: Any, stride: int = 2) -> Problem:
    rng = np.random.default_rng(0)
    sizes = [settings.image[2], *settings.channels]
    kernels = [
        jnp.asarray(rng.normal(0, (2 / (9 * a)) ** 0.5, (3, 3, a, b)), jnp.float32)
        for a, b in itertools.pairwise(sizes)
    ]
    side = math.ceil(settings.image[0] / stride ** len(kernels))
    init, _ = models.mlp(side * side * sizes[-1], 10)
    params = {"conv": kernels, "dense": init(jax.random.key(0))}

    def logits(params, x):
        for kernel in params["conv"]:
            x = lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = jax.nn.relu(x)
        return models.forward(params["dense"], x.reshape(x.shape[0], -1))

    return Problem(
        params,
        lambda params, batch: models.log_likelihood(logits(params, batch[0]), batch[1]),
        noisy_batches(settings.image, settings.batch),
    )


def noisy_batches(shape: tuple[int, ...], size: int, count: int = 16) -> list[Any]:
    """A linear teacher with noise: losses fall, and stay away from zero."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, size, *shape)).astype(np.float32)
    flat = x.reshape(count, size, -1)
    clean = flat @ rng.normal(size=(flat.shape[-1], 10)) / flat.shape[-1] ** 0.5
    y = np.argmax(clean + rng.gumbel(size=clean.shape), axis=-1)
    return [(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, y, strict=True)]


def inner_optimizers(count: int) -> list[optax.GradientTransformation]:
    """Adams, SGDs with momentum and RMSProps, each with a rate of its own."""
    kinds = (
        optax.adam(1e-3),
        optax.sgd(0.03, momentum=0.9),
        optax.adam(3e-4),
        optax.rmsprop(1e-3),
        optax.sgd(0.01, momentum=0.9, nesterov=True),
        optax.adam(2e-3),
        optax.rmsprop(3e-4),
        optax.sgd(0.003, momentum=0.9),
    )
    return list(kinds[:count])


# The programs. A step maps (params, state, train batch, held-out batch) to (params,
# state), and makes use of the buffers of the first two.


def plain_step(problem: Problem, tx, *extra: str):
    """A training step with any optimizer, which gets held-out data by these names."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, train, held_out):
        grads = jax.grad(problem.loss_fn)(params, train)
        known = {"train": train, "held_out": held_out, "batch": train}
        named = {name: known[name] for name in extra}
        updates, state = tx.update(grads, state, params, **named)
        return optax.apply_updates(params, updates), state

    return step, tx.init(problem.params)


def ev3_step(problem: Problem, inner, mode: str = "unroll", adapt=None, assess_fn=None):
    """The step with EV3, and its first state."""
    tx = optax_ev3.ev3(
        inner,
        assess_fn or (lambda params, held_out: problem.score_fn(params, held_out)),
        adapt=adapt or optax_ev3.adapt.confident(),
        assess_mode=mode,
    )
    return plain_step(problem, tx, "held_out")


def by_hand_step(problem: Problem, inner, tuned: bool = False):
    """The same work and nothing more: no rule, no record, no checks of arguments.

    Tuned, a new inner state is not kept while its update is checked but computed again,
    rows are checked by their maximum, and a switch selects the update.
    """

    def step(params, state, train, held_out):
        opt_states, stable = state
        grads = jax.grad(problem.loss_fn)(params, train)
        updates, held, finite = [], [], []
        for tx, old in zip(inner, opt_states, strict=True):
            update, new = tx.update(grads, old, params)
            ok = (finite_rows if tuned else all_finite)(update)
            if tuned:
                zeros = jax.tree.map(jnp.zeros_like, grads)
                new = tx.update(where(ok, grads, zeros), old, params)[1]
            updates.append(update)
            held.append(where(ok, new, old))
            finite.append(ok)
        candidates = [optax.apply_updates(params, update) for update in updates]
        candidates += [params, stable]
        means = jnp.stack([problem.score_fn(c, held_out).mean() for c in candidates])
        finite = jnp.stack([*finite, True, True]) & jnp.isfinite(means)
        means = jnp.where(finite, means, -jnp.inf)
        best = jnp.argmax(means)
        stay = jax.tree.map(jnp.zeros_like, params)
        back = jax.tree.map(jnp.subtract, stable, params)
        moves = [*updates, stay, back]
        if tuned:
            update = lax.switch(best, [lambda move=move: move for move in moves])
        else:
            update = jax.tree.map(lambda *leaves: lax.select_n(best, *leaves), *moves)
        params = optax.apply_updates(params, update)
        stable = where(means[best] > means[-1], params, stable)
        return params, (held, stable)

    stable = jax.tree.map(jnp.copy, problem.params)
    return step, ([tx.init(problem.params) for tx in inner], stable)


def ev3_updates(problem: Problem, inner):
    """EV3 with nothing to assess: (state, grads, params) -> (update, state)."""
    size = len(problem.batches[0][1])
    tx = optax_ev3.ev3(inner, lambda params: jnp.zeros([size]))

    def step(state, grads, params):
        update, state = tx.update(grads, state, params)
        return state, update

    return step, tx.init(problem.params)


def safe_updates(problem: Problem, inner):
    """The inner updates, checked and held, one selected: what safety costs by hand."""

    def step(state, grads, params):
        opt_states, stable, calls = state
        zeros = jax.tree.map(jnp.zeros_like, grads)
        updates, held = [], []
        finite = [True, True]
        for number, (tx, old) in enumerate(zip(inner, opt_states, strict=True)):
            update, _ = tx.update(grads, old, params)
            ok = finite_rows(update)
            new = tx.update(where(ok, grads, zeros), old, params)[1]
            updates.append(update)
            held.append(where(ok, new, old))
            finite.insert(number, ok)
        back = functools.partial(jax.tree.map, jnp.subtract, stable, params)
        stay = functools.partial(jax.tree.map, jnp.zeros_like, params)
        moves = [*(lambda move=move: move for move in updates), stay, back]
        best = jnp.argmax(jnp.roll(jnp.stack(finite), calls))
        update = lax.switch(best, moves)
        stable = where(calls % 16 == 0, optax.apply_updates(params, update), stable)
        return (held, stable, calls + 1), update

    stable = jax.tree.map(jnp.copy, problem.params)
    states = [tx.init(problem.params) for tx in inner]
    return step, (states, stable, jnp.zeros([], jnp.int32))


def plain_updates(problem: Problem, inner):
    """The inner updates alone, with the same arguments."""

    def step(states, grads, params):
        pairs = [
            tx.update(grads, state, params)
            for tx, state in zip(inner, states, strict=True)
        ]
        return [state for _, state in pairs], [update for update, _ in pairs]

    return step, [tx.init(problem.params) for tx in inner]


def all_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def finite_rows(tree):
    rows = [jnp.abs(leaf).max(axis=-1) for leaf in jax.tree.leaves(tree)]
    return all_finite(rows)


def where(condition, new, old):
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
