"""Eight explorers on eight devices: each device trains and assesses one of them.

The explorers are Adam at eight learning rates. As they differ in a number alone, they
are stacked, and `explorer_axis` spreads the stack over an axis of the mesh. A step then
takes the time and the memory of one explorer. Axes for data and for parameters can
stand beside it, and are the loop's own.

Run it with `python examples/explorers_over_devices.py`; it takes less than a minute.
Without eight devices it makes eight of the CPU, to show how it is done.
"""

import os

if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from itertools import pairwise

import _data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_ev3
from optax_ev3 import explore

STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")

SIZES = (64, 128, 128, 10)


def init(key):
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": he(key, shape), "b": jnp.zeros(shape[1])}
        for key, shape in zip(keys, pairwise(SIZES), strict=True)
    ]


def logits(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def log_likelihood(params, held_out):
    """Scores, one for each example, higher is better: what EV3 assesses."""
    x, y = held_out
    return -optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    count = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("explorers",))
    rates = np.geomspace(1e-4, 1e-1, count).tolist()
    tx = optax_ev3.ev3(
        inner={f"adam_{rate:.1g}": optax.adam(rate) for rate in rates},
        assess_fn=log_likelihood,
        loss_fn=loss,
        explore=explore.branches(averages=[explore.branch_average()]),
        explorer_axis="explorers",
        key=seed,
    )
    # The parameters are on all devices, and each has the state of its own explorer.
    init_key, data_key = jax.random.split(jax.random.key(seed))
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(init(init_key), everywhere)
    shardings = optax_ev3.state_shardings(tx, params, explorer_axis="explorers")
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    def step(params, state, key):
        train_key, held_out_key = jax.random.split(key)
        batch = _data.sample(train_key, data.train)
        held_out = _data.sample(held_out_key, data.held_out)
        # Explorers take gradients of the loss at their own parameters.
        updates, state = tx.update(None, state, params, batch=batch, held_out=held_out)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=(everywhere, shardings), donate_argnums=(0, 1))

    def accuracy(params):
        x, y = data.test
        return float((logits(params, x).argmax(-1) == y).mean())

    print(f"{count} explorers on {count} devices")
    print(f"Before training: test accuracy {accuracy(params):.4f}")
    for i in range(steps):
        params, state = step(params, state, jax.random.fold_in(data_key, i))
    best = jax.device_get(optax_ev3.best_params(state))
    after = accuracy(best)
    print(f"After {steps} steps: test accuracy {after:.4f}")
    on_first = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
    )
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    print(f"State: {total / 1e6:.1f} MB, on each device {on_first / 1e6:.1f} MB")
    for name, value in jax.jit(optax_ev3.summary)(state).items():
        if "share" in name and value:
            print(f"  {name:36} {float(value):.3f}")
    return after


def main(_):
    logging.set_verbosity(logging.WARNING)
    train(STEPS.value, SEED.value)


if __name__ == "__main__":
    app.run(main)
