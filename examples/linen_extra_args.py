"""EV3 in a Flax Linen loop that passes the assessment batch at each step.

`optax_ev3.flax.TrainState` is Flax's own, but its `apply_gradients` hands further
arguments to the optimizer. So the held-out examples may come from any source that
yields batches, and need not fit on the device.

Run it with `python examples/linen_extra_args.py`; it takes seconds.
"""

import _data
import jax
import numpy as np
import optax
from absl import app, flags, logging
from flax import linen as nn

import optax_ev3
from optax_ev3.flax import TrainState

STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(10)(x)


def batches(data, seed, size=128):
    """Endless batches from the host, as a data loader yields them."""
    x, y = map(np.asarray, data)
    rng = np.random.default_rng(seed)
    while True:
        index = rng.integers(len(y), size=size)
        yield x[index], y[index]


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    model = MLP()

    def log_likelihood(params, batch):
        x, y = batch
        logits = model.apply({"params": params}, x)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, y)

    tx = optax_ev3.ev3(
        inner={"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)},
        assess_fn=log_likelihood,
        key=seed,
    )

    @jax.jit
    def step(state, train_batch, held_out_batch):
        def loss(params):
            return -log_likelihood(params, train_batch).mean()

        grads = jax.grad(loss)(state.params)
        # `batch` is the name that log_likelihood asks for.
        return state.apply_gradients(grads=grads, batch=held_out_batch)

    @jax.jit
    def accuracy(state, batch):
        x, y = batch
        return (state.apply_fn({"params": state.params}, x).argmax(-1) == y).mean()

    params = model.init(jax.random.key(seed), data.train[0][:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    print(f"Before training: test accuracy {accuracy(state, data.test):.4f}")
    train_batches = batches(data.train, [seed, 0])
    held_out_batches = batches(data.held_out, [seed, 1])
    for _ in range(steps):
        state = step(state, next(train_batches), next(held_out_batches))
    best = optax_ev3.best_params(state)
    after = float(accuracy(state.replace(params=best), data.test))
    print(f"After {steps} steps: test accuracy {after:.4f}")
    for name, value in jax.jit(optax_ev3.summary)(state.opt_state).items():
        print(f"  {name:18} {value:8.3f}")
    return after


def main(_):
    logging.set_verbosity(logging.WARNING)
    train(STEPS.value, SEED.value)


if __name__ == "__main__":
    app.run(main)
