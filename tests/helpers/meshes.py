"""FSDP: a small network whose parameters are spread over eight devices."""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import optax_ev3
from optax_ev3 import explore
from optax_ev3._src.base import sharding

# Axes of the mesh, and how parameters are spread over them.
MESHES = {
    "8": {
        "axes": {"data": 8},
        "w1": (None, "data"),
        "b": ("data",),
        "w2": ("data", None),
    },
    "4x2": {
        "axes": {"data": 4, "model": 2},
        "w1": ("model", "data"),
        "b": ("data",),
        "w2": (("data", "model"), None),
    },
}


def start():
    draw = np.random.default_rng(0)
    return {
        "w1": 0.4 * draw.normal(size=(6, 16)).astype(np.float32),
        "b": np.zeros(16, np.float32),
        "w2": 0.4 * draw.normal(size=(16, 3)).astype(np.float32),
    }


def data(seed, count=32):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, 6)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0.5)


def mesh_of(axes, kind):
    """A mesh whose axes are all ``"Auto"`` or ``"Explicit"``."""
    kinds = (getattr(jax.sharding.AxisType, kind),) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


def spread(tree, mesh, specs):
    """A mapping of arrays, each spread by its specification; others by the same."""
    if not isinstance(specs, dict):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*specs)))
    return {name: spread(leaf, mesh, specs[name]) for name, leaf in tree.items()}


def outputs(params, x):
    params = sharding.replicated(params)  # As FSDP does before it computes.
    return jax.nn.tanh(x @ params["w1"] + params["b"][None]) @ params["w2"]


def likelihoods(params, batch):
    x, y = batch
    return (jax.nn.log_softmax(outputs(params, x)) * jax.nn.one_hot(y, 3)).sum(-1)


def loss_fn(params, batch):
    return -likelihoods(params, batch).mean()


PAIR = {"adam": optax.adam(0.05), "sgd": optax.sgd(0.3, momentum=0.9)}
RATES = {"learning_rate": [0.01, 0.1, 0.3]}
SWEEPS = {
    "sgd": optax_ev3.sweep(optax.sgd, **RATES),
    "own": optax_ev3.explorer(optax_ev3.sweep(optax.adam, **RATES), loss_fn),
    "adam": optax.adam(0.05),
}
EVOLVING = {
    "group": optax_ev3.evolve(
        optax.adam, {"learning_rate": optax_ev3.log_uniform(0.01, 0.3)}, 3
    )
}
AVERAGES = [explore.trajectory_average(), explore.branch_average()]
RACE = explore.branches(2, averages=AVERAGES, racing=explore.Racing(1, 2))
COPY = explore.branches(2, restart=explore.worse_than("start", "copy"))
ONE, SHARED = explore.one_step(), explore.rounds(2, gradients="shared")
