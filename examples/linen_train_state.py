"""EV3 in a Flax Linen loop that stays as it is, but for the optimizer.

`TrainState.apply_gradients` passes nothing but gradients to the optimizer. So the
assessment brings its own data: `optax_ev3.held_out` draws a fresh batch from held-out
arrays at every step.

Run it with `python examples/linen_train_state.py`; it takes seconds.
"""

import _data
import jax
import optax
from absl import app, flags, logging
from flax import linen as nn
from flax.training.train_state import TrainState

import optax_ev3

STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(10)(x)


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    model = MLP()

    def log_likelihood(params, batch):
        x, y = batch
        logits = model.apply({"params": params}, x)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, y)

    # Before: tx = optax.adam(1e-3)
    tx = optax_ev3.ev3(
        inner={"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)},
        assess_fn=optax_ev3.held_out(log_likelihood, data.held_out, batch_size=128),
        key=seed,
    )

    @jax.jit
    def step(state, batch):
        def loss(params):
            return -log_likelihood(params, batch).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    @jax.jit
    def accuracy(state, batch):
        x, y = batch
        return (state.apply_fn({"params": state.params}, x).argmax(-1) == y).mean()

    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, data.train[0][:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    print(f"Before training: test accuracy {accuracy(state, data.test):.4f}")
    for i in range(steps):
        state = step(state, _data.sample(jax.random.fold_in(data_key, i), data.train))
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
