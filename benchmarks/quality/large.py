"""The tasks of real size: a transformer, a ResNet with BatchNorm, a GRU, embeddings.

Each is a function of a size. "cpu": a run of all gradients takes some minutes on one
core. "gpu": the same task, wider, deeper and longer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.data import cut, flights, mnist1d, prose
from benchmarks.models import (
    dense,
    forward,
    layers,
    log_likelihood,
    norm,
    patches,
    transformed,
)
from benchmarks.quality.shapes import SHAPES, shapes
from benchmarks.quality.tasks import Task, classification


def chosen(size: str, cpu: Any, gpu: Any) -> Any:
    """What belongs to a size."""
    sizes = {"cpu": cpu, "gpu": gpu}
    if size not in sizes:
        raise ValueError(f"size: expected one of {list(sizes)}, got {size!r}")
    return sizes[size]


HELD_OUT, TEST = 1000, 2000  # Examples.
AT_ONCE = 250


def in_blocks(score):
    """The same scores, of some examples at a time.

    The activations of all, for as many candidates as are scored at once, would take
    gigabytes.
    """

    def scores(params, part):
        def one(example):
            return score(params, jax.tree.map(lambda x: x[None], example))[0]

        return jax.lax.map(one, part, batch_size=AT_ONCE)

    return scores


# Characters.

LETTERS = 128  # ASCII.
CHARACTERS = 10_000_000
WINDOWS = 250  # Held out, and to test on: many characters each.


def decoder(context, width, depth, heads):
    """A transformer that predicts the next character: init, and outputs."""

    def block(key):
        keys = jax.random.split(key, 4)
        shapes = {
            "attend": (width, 3 * width),
            "mix": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        found = {
            n: dense(k, *s) for k, (n, s) in zip(keys, shapes.items(), strict=True)
        }
        for name in ("mix", "down"):  # So that the sum of all blocks doesn't grow.
            w, b = found[name]
            found[name] = w / (2 * depth) ** 0.5, b
        return found | {"scales": jnp.ones([2, width])}

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "letters": 0.1 * jax.random.normal(keys[0], [LETTERS, width]),
            "places": 0.1 * jax.random.normal(keys[1], [context, width]),
            "blocks": jax.vmap(block)(jax.random.split(keys[2], depth)),
            "scale": jnp.ones(width),
        }

    def outputs(params, x):
        def step(h, layer):
            return transformed(h, layer, heads), None

        h = params["letters"][x] + params["places"]
        h, _ = jax.lax.scan(step, h, params["blocks"])
        return norm(h, params["scale"]) @ params["letters"].T

    return init, outputs


def characters(size: str) -> Task:
    """The next character of English documentation."""
    context, width, depth, heads, steps, batch = chosen(
        size, (64, 192, 2, 4, 200, 4), (256, 512, 4, 8, 2000, 32)
    )
    init, outputs = decoder(context, width, depth, heads)

    def parts(seed):
        windows = prose(CHARACTERS // (context + 1), context + 1)
        return cut(windows, seed, WINDOWS, WINDOWS)

    def of_each(params, part):
        part = part.astype(jnp.int32)
        logits = outputs(params, part[:, :-1])
        return log_likelihood(logits, part[:, 1:]).mean(-1)

    def loss(params, part):
        return -of_each(params, part).mean()

    score = in_blocks(of_each)

    def test(params, part):
        return -score(params, part).mean()

    return Task(parts, init, loss, score, test, "nats a character", steps, batch)


# Images.

IMAGES = 15_000
MOMENTUM, EPSILON = 0.9, 1e-5  # Of BatchNorm.


def resnet(width, stages, blocks, classes):
    """A residual network with BatchNorm on images: init, and outputs.

    Outputs are logits and new running statistics. In training these are the old ones
    moved towards the batch's, which normalize it; else they are the old ones, and
    normalize. Each stage has twice the width of the last and half of its height; the
    first has half of the height of images.
    """
    widths = [width * 2**stage for stage in range(stages)]
    plan, last = [], width  # Inputs, outputs and stride of each block.
    for stage, wide in enumerate(widths):
        for block in range(blocks):
            plan.append((last, wide, 2 if stage and not block else 1))
            last = wide

    def convolution(key, rows, columns):
        w, shift = dense(key, rows, columns)
        return {"w": w, "scale": jnp.ones(columns), "shift": shift}

    def init(key):
        keys = iter(jax.random.split(key, 3 * len(plan) + 2))
        weights = {"stem": convolution(next(keys), 9 * 3, width)}
        for number, (one, other, _) in enumerate(plan):
            unit = {
                "first": convolution(next(keys), 9 * one, other),
                "second": convolution(next(keys), 9 * other, other),
            }
            if one != other:
                unit["shortcut"] = convolution(next(keys), one, other)
            weights[f"block {number}"] = unit
        moments = lambda layer: (jnp.zeros_like(layer["shift"]), layer["scale"])
        is_layer = lambda x: "w" in x
        statistics = jax.tree.map(moments, weights, is_leaf=is_layer)
        weights["head"] = dense(next(keys), last, classes)
        return {"weights": weights, "statistics": statistics}

    def outputs(params, x, training):
        def normed(layer, old, x):
            x = x @ layer["w"]
            new = old
            if training:
                mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
                pairs = zip(old, (mean, var), strict=True)
                new = tuple(MOMENTUM * a + (1 - MOMENTUM) * b for a, b in pairs)
            else:
                mean, var = old
            scale = layer["scale"] * jax.lax.rsqrt(var + EPSILON)
            return (x - mean) * scale + layer["shift"], new

        weights, old, new = params["weights"], params["statistics"], {}
        x = x / 128.0 - 1
        x, new["stem"] = normed(weights["stem"], old["stem"], patches(x, 2))
        x = jax.nn.relu(x)
        for number, (*_, stride) in enumerate(plan):
            name = f"block {number}"
            unit, was, now = weights[name], old[name], {}
            h, now["first"] = normed(unit["first"], was["first"], patches(x, stride))
            h = patches(jax.nn.relu(h))
            h, now["second"] = normed(unit["second"], was["second"], h)
            if "shortcut" in unit:
                x = x[:, ::stride, ::stride]
                x, now["shortcut"] = normed(unit["shortcut"], was["shortcut"], x)
            x = jax.nn.relu(x + h)
            new[name] = now
        w, b = weights["head"]
        return x.mean((1, 2)) @ w + b, new

    return init, outputs


def images(size: str) -> Task:
    """Which shape is the largest one of an image."""
    width, blocks, steps, batch = chosen(size, (16, 1, 250, 64), (64, 2, 1500, 128))
    init, outputs = resnet(width, 3, blocks, len(SHAPES))

    def parts(seed):
        return cut(shapes(IMAGES), seed, HELD_OUT, TEST)

    def loss(params, part):
        x, y = part
        logits, statistics = outputs(params, x, True)
        return -log_likelihood(logits, y).mean(), statistics

    def merge(params, statistics):
        return {**params, "statistics": statistics}

    @in_blocks
    def score(params, part):
        x, y = part
        return log_likelihood(outputs(params, x, False)[0], y)

    def test(params, part):
        return -score(params, part).mean()

    return Task(
        parts, init, loss, score, test, "cross-entropy", steps, batch, merge=merge
    )


# Signals.

SIGNALS = 7000


def gru(width, classes):
    """A gated recurrent unit that reads a signal: init, and outputs."""

    def init(key):
        keys = jax.random.split(key, 3)
        orthogonal = jax.nn.initializers.orthogonal()
        return {
            "input": dense(keys[0], 1, 3 * width),
            "state": jnp.concatenate(
                [orthogonal(k, [width, width]) for k in jax.random.split(keys[1], 3)], 1
            ),
            "head": dense(keys[2], width, classes),
        }

    def outputs(params, x):
        w, b = params["input"]

        def step(h, x):
            given = x[:, None] * w + b
            kept = h @ params["state"]
            reset, keep = jnp.split(
                jax.nn.sigmoid(given[:, : 2 * width] + kept[:, : 2 * width]), 2, 1
            )
            new = jnp.tanh(given[:, 2 * width :] + reset * kept[:, 2 * width :])
            return keep * h + (1 - keep) * new, None

        h, _ = jax.lax.scan(step, jnp.zeros([len(x), width]), x.T)
        w, b = params["head"]
        return h @ w + b

    return init, outputs


def signals(size: str) -> Task:
    """MNIST-1D, read by a recurrent network."""
    width, steps = chosen(size, (128, 400), (256, 2000))

    def parts(seed):
        return cut(mnist1d(SIGNALS), seed, HELD_OUT, TEST)

    return classification(gru(width, 10), parts, steps)


# Flights.

FLIGHTS = 320_000


def air_times(size: str) -> Task:
    """Minutes in the air, by embeddings of categories and their products.

    The day and the destination tell the wind only together.
    """
    width, hidden, steps, batch = chosen(
        size, (32, 256, 1000, 256), (128, 1024, 3000, 1024)
    )
    codes, numbers, minutes, total = flights(FLIGHTS)
    mean, deviation = minutes.mean(), minutes.std()
    fields, measured = codes.shape[1], numbers.shape[1]

    def init(key):
        keys = jax.random.split(key)
        inputs = (fields + 1) * width + measured
        return {
            "table": 0.1 * jax.random.normal(keys[0], [total, width]),
            "layers": layers(keys[1], (inputs, hidden), (hidden, hidden), (hidden, 1)),
        }

    def outputs(params, codes, numbers):
        rows = params["table"][codes]
        # The sum of the products of all pairs (He and Chua, 2017).
        pairs = (jnp.square(rows.sum(1)) - jnp.square(rows).sum(1)) / 2
        flat = rows.reshape(len(codes), -1)
        x = jnp.concatenate([flat, pairs, numbers], 1)
        return forward(params["layers"], x)[:, 0]

    def parts(seed):
        data = codes, numbers, (minutes - mean) / deviation
        return cut(data, seed, HELD_OUT, 2 * TEST)

    def score(params, part):
        *inputs, y = part
        return -jnp.square(outputs(params, *inputs) - y)

    def loss(params, part):
        return -score(params, part).mean()

    def test(params, part):
        return deviation * jnp.sqrt(loss(params, part))

    return Task(parts, init, loss, score, test, "minutes (RMS)", steps, batch)


LARGE: dict[str, Callable[[str], Task]] = {
    "characters": characters,
    "shapes": images,
    "MNIST-1D": signals,
    "flights": air_times,
}
