"""Training for a metric that has no gradient: F1 on imbalanced data.

Eights against all other digits: one example in ten is positive. Which loss serves F1
best is not known beforehand, so every explorer has its own, and EV3 judges all of them
by F1 on held-out examples, with bootstrapped bounds.

Run it with `python examples/f1_score.py`; it takes seconds.
"""

import _data
import jax
import jax.numpy as jnp
import optax
from absl import app, flags, logging

import optax_ev3
from optax_ev3 import explore, metrics

STEPS = flags.DEFINE_integer("steps", 500, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")


def init(key):
    he = jax.nn.initializers.he_normal()
    first, second = jax.random.split(key)
    return {
        "hidden": {"w": he(first, (64, 32)), "b": jnp.zeros(32)},
        "out": {"w": he(second, (32, 1)), "b": jnp.zeros(1)},
    }


def logits(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return (hidden @ params["out"]["w"] + params["out"]["b"])[:, 0]


def cross_entropy(params, batch):
    x, y = batch
    return optax.sigmoid_binary_cross_entropy(logits(params, x), y).mean()


def weighted(params, batch):
    x, y = batch
    losses = optax.sigmoid_binary_cross_entropy(logits(params, x), y)
    return (jnp.where(y == 1, 9.0, 1.0) * losses).mean()


def focal(params, batch):
    x, y = batch
    return optax.sigmoid_focal_loss(logits(params, x), y, gamma=2.0).mean()


def f1(params, batch):
    """What EV3 assesses: a figure of all examples together, no mean over them."""
    x, y = batch
    return metrics.AggregateMetric(metrics.f1, (logits(params, x) > 0, y))


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its F1 on the test set."""
    train_data, held_out, test = (
        (x, (y == 8).astype(jnp.int32)) for x, y in _data.load()
    )
    tx = optax_ev3.ev3(
        inner=optax_ev3.product(
            {"adam": optax.adam(3e-3)}, [cross_entropy, weighted, focal]
        ),
        assess_fn=optax_ev3.held_out(f1, held_out),
        # F1 is coarse: long trajectories move it by more than its noise.
        explore=explore.branches(50, averages=[explore.trajectory_average()]),
        key=seed,
    )

    @jax.jit
    def step(params, state, key):
        batch = _data.sample(key, train_data)
        # Every explorer has a loss of its own: no gradient of the loop is needed.
        updates, state = tx.update(None, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    def test_f1(params):
        outputs = logits(params, test[0]) > 0, test[1]
        return float(metrics.f1(outputs, jnp.ones(len(test[1]))))

    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    state = tx.init(params)
    print(f"Before training: test F1 {test_f1(params):.4f}")
    for i in range(steps):
        params, state = step(params, state, jax.random.fold_in(data_key, i))
    after = test_f1(optax_ev3.best_params(state))
    print(f"After {steps} steps: test F1 {after:.4f}")
    for name, value in jax.jit(optax_ev3.summary)(state).items():
        print(f"  {name:40} {value:8.3f}")
    return after


def main(_):
    logging.set_verbosity(logging.WARNING)
    train(STEPS.value, SEED.value)


if __name__ == "__main__":
    app.run(main)
