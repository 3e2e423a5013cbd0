"""The tasks of the quality suite: small, real, and unlike each other.

Each seed cuts its own parts for training, held-out and test from the data, and all
methods of a seed get the same: with so few examples, one split for all seeds would be
one draw, whose error no repetition shows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

from benchmarks.data import Parts, cut, digits, standardized, text
from benchmarks.models import (
    cnn,
    dense,
    layers,
    log_likelihood,
    mlp,
    norm,
    transformed,
)
from optax_ev3 import distillation, metrics


class Task(NamedTuple):
    """What is trained, and what it is judged by.

    Attributes:
      parts: From a seed to `Parts`, NumPy arrays of the same shapes for all seeds.
      init: From a key to parameters.
      loss: Of parameters and a batch of training examples; where `merge` is given, a
        pair of it and of what it computes on the side.
      score: Of parameters and held-out examples: `[n]` or a figure, higher is better.
      test: Of parameters and the test part: the figure, lower is better.
      figure: What the figure is.
      steps: Of each explorer.
      batch: Training examples in a step.
      name: What it is called in :data:`TASKS`.
      merge: From parameters and what the loss computes on the side to parameters with
        new running statistics, which are leaves of the parameters; where given, `loss`
        returns `(value, aux)`, and does not depend on them.
    """

    parts: Callable[[int], Parts]
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], Any]
    score: Callable[[Any, Any], Any]
    test: Callable[[Any, Any], jax.Array]
    figure: str
    steps: int
    batch: int
    name: str = ""
    merge: Callable[[Any, Any], Any] | None = None

    def held_out(self, params: Any, part: Any) -> jax.Array:
        """The mean score of all held-out examples."""
        found = self.score(params, part)
        if isinstance(found, metrics.AggregateMetric):
            return found.metric_fn(found.outputs, jnp.ones(len(found.outputs[1])))
        return found.mean()


# Tasks.


def classification(model, parts, steps, batch=64):
    """By cross-entropy, which is in nats per example."""
    init, outputs = model

    def score(params, part):
        x, y = part
        logits = outputs(params, x)
        return log_likelihood(logits, y)

    def loss(params, part):
        return -score(params, part).mean()

    return Task(parts, init, loss, score, loss, "cross-entropy", steps, batch)


def digits_parts(seed):
    return cut(digits(), seed, 300, 450)


def digits_mlp():
    return classification(mlp(64, 128, 128, 10), digits_parts, 600, 128)


def digits_cnn():
    return classification(cnn(), digits_parts, 400)


def noisy_labels():
    """30% of the labels of the training part are drawn at random."""

    def parts(seed):
        found = digits_parts(seed)
        rng = np.random.default_rng([seed, 1])
        x, y = found.train
        wrong = rng.random(len(y)) < 0.3
        drawn = rng.integers(0, 10, len(y), np.int32)
        return found._replace(train=(x, np.where(wrong, drawn, y)))

    return classification(mlp(64, 128, 128, 10), parts, 600, 128)


def imbalanced():
    """Eights, a tenth of the digits, against the others, by F1."""
    init, outputs = mlp(64, 32, 1)

    def parts(seed):
        found = digits_parts(seed)
        return Parts(*((x, np.int32(y == 8)) for x, y in found))

    def loss(params, part):
        x, y = part
        return optax.sigmoid_binary_cross_entropy(outputs(params, x)[:, 0], y).mean()

    def score(params, part):
        x, y = part
        return metrics.AggregateMetric(metrics.f1, (outputs(params, x)[:, 0] > 0, y))

    def test(params, part):
        x, y = part
        predicted = outputs(params, x)[:, 0] > 0
        return 1 - metrics.f1((predicted, y), jnp.ones(len(y)))

    return Task(parts, init, loss, score, test, "1 - F1", 600, 64)


def outliers():
    """Diabetes; errors of seven standard deviations in 15% of the training targets."""
    init, outputs = mlp(10, 64, 64, 1)
    x, y = datasets.load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()

    def parts(seed):
        found = standardized(cut((np.float32(x), np.float32(y)), seed, 100, 142))
        rng = np.random.default_rng([seed, 1])
        (a, b), count = found.train, len(found.train[1])
        wild = (rng.random(count) < 0.15) * rng.normal(0, 7, count)
        return found._replace(train=(a, np.float32(b + wild)))

    def errors(params, part):
        return outputs(params, part[0])[:, 0] - part[1]

    def loss(params, part):
        return jnp.square(errors(params, part)).mean()

    def score(params, part):
        return -abs(errors(params, part))

    def test(params, part):
        return -score(params, part).mean()

    return Task(parts, init, loss, score, test, "absolute error", 400, 32)


def tabular(load, held_out, test, steps):
    def parts(seed):
        x, y = load(return_X_y=True)
        return standardized(cut((np.float32(x), np.int32(y)), seed, held_out, test))

    x, y = load(return_X_y=True)
    return classification(mlp(x.shape[1], 64, 64, y.max() + 1), parts, steps, 32)


def breast_cancer():
    return tabular(datasets.load_breast_cancer, 150, 150, 300)


def wine():
    return tabular(datasets.load_wine, 50, 50, 200)


CONTEXT, WIDTH, HEADS = 16, 32, 2


def transformer():
    """One block of a transformer that predicts the next character."""
    codes, letters = text(120_000)
    rows = len(codes) // (CONTEXT + 1)
    windows = codes[: rows * (CONTEXT + 1)].reshape(rows, -1)

    def init(key):
        keys = jax.random.split(key, 6)
        return {
            "letters": 0.1 * jax.random.normal(keys[0], [letters, WIDTH]),
            "places": 0.1 * jax.random.normal(keys[1], [CONTEXT, WIDTH]),
            "attend": dense(keys[2], WIDTH, 3 * WIDTH),
            "mix": dense(keys[3], WIDTH, WIDTH),
            "up": dense(keys[4], WIDTH, 4 * WIDTH),
            "down": dense(keys[5], 4 * WIDTH, WIDTH),
            "scales": jnp.ones([3, WIDTH]),
        }

    def outputs(params, x):
        h = transformed(params["letters"][x] + params["places"], params, HEADS)
        return norm(h, params["scales"][2]) @ params["letters"].T

    def parts(seed):
        return cut(windows, seed, 500, 1000)

    def score(params, part):
        logits = outputs(params, part[:, :-1])
        return log_likelihood(logits, part[:, 1:]).mean(-1)

    def loss(params, part):
        return -score(params, part).mean()

    return Task(parts, init, loss, score, loss, "nats a character", 600, 16)


TEACHER_STEPS = 200


@functools.cache
def taught(seed):
    """Digits with the logits of a teacher: an average of wide networks."""
    found = digits_parts(seed)
    init, outputs = mlp(64, 256, 10)
    x, y = found.train
    tx = optax.adam(1e-3)

    def loss(params):
        return -log_likelihood(outputs(params, x), y).mean()

    @jax.jit
    @jax.vmap
    def train(key):
        params = init(key)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        return jax.lax.scan(step, start, length=TEACHER_STEPS)[0][0]

    several = train(jax.random.split(jax.random.key(seed), 5))
    logits = jax.vmap(outputs, in_axes=(0, None))(several, x).mean(0)
    return found._replace(train=(x, y, np.asarray(logits)))


def student():
    """A small network that learns from a teacher's logits alone."""
    init, outputs = mlp(64, 16, 10)

    def loss(params, part):
        x, _, logits = part
        return distillation.soft_target_loss(outputs(params, x), logits, 2.0).mean()

    def score(params, part):
        x, y = part
        logits = outputs(params, x)
        return log_likelihood(logits, y)

    def test(params, part):
        return -score(params, part).mean()

    return Task(taught, init, loss, score, test, "cross-entropy", 600, 64)


def autoencoder():
    """Digits through a bottleneck of 8."""
    init, outputs = mlp(64, 64, 8, 64, 64)

    def score(params, part):
        return -jnp.square(outputs(params, part[0]) - part[0]).sum(-1)

    def loss(params, part):
        return -score(params, part).mean()

    return Task(digits_parts, init, loss, score, loss, "squared error", 600, 64)


WAVES = 2 * np.pi  # u = sin(2 pi t) on [0, 1]


def physics():
    """A network that solves u'' = -(2 pi)^2 u with u(0) = 0, u'(0) = 2 pi.

    The residual's Hessian is ill-conditioned; the figure is the error of the solution,
    which no method sees.
    """

    def init(key):
        return layers(key, (1, 32), (32, 32), (32, 1))

    def solution(params, t):
        (w1, b1), (w2, b2), (w3, b3) = params
        # Both conditions hold whatever the network is.
        h = jnp.tanh(3 * t * w1[0] + b1)
        return t * (WAVES + t * (jnp.tanh(h @ w2 + b2) @ w3 + b3)[0])

    def residuals(params, t):
        def one(t):
            u = functools.partial(solution, params)
            return jax.grad(jax.grad(u))(t) + WAVES**2 * u(t)

        return jax.vmap(one)(t) / WAVES**2

    def score(params, t):
        return -jnp.square(residuals(params, t))

    def loss(params, t):
        return -score(params, t).mean()

    def test(params, t):
        error = jax.vmap(functools.partial(solution, params))(t) - jnp.sin(WAVES * t)
        return jnp.sqrt(jnp.square(error).mean())

    def parts(seed):
        t = np.random.default_rng(seed).uniform(0, 1, 1400)
        return Parts(*np.split(np.float32(t), [1000, 1200]))

    return Task(parts, init, loss, score, test, "error of u", 800, 64)


TASKS = {
    "digits MLP": digits_mlp,
    "digits CNN": digits_cnn,
    "noisy labels": noisy_labels,
    "imbalanced": imbalanced,
    "outliers": outliers,
    "breast cancer": breast_cancer,
    "wine": wine,
    "transformer": transformer,
    "distillation": student,
    "auto-encoder": autoencoder,
    "physics": physics,
}


def made(name: str) -> Task:
    """The task of a name."""
    return TASKS[name]()._replace(name=name)
