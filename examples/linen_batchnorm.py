"""Trajectories of a Flax Linen model with BatchNorm and dropout, under several losses.

The running statistics of BatchNorm are kept in the tree of parameters, and a `merge_fn`
puts there what a loss computed on the side. So every explorer has statistics of its
own, and an adopted candidate brings them along. Between two assessments the explorers
go their own ways for 20 steps, each with its own loss: gradients biased on purpose, by
soft labels or by noise on the inputs.

Run it with `python examples/linen_batchnorm.py`; it takes a minute.
"""

import _data
import jax
import optax
from absl import app, flags, logging
from flax import linen as nn

import optax_ev3
from optax_ev3 import explore

STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Dense(128, kernel_init=nn.initializers.he_normal())(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x)


MODEL = MLP()


def train_loss(variables, batch, key, smoothing=0.0, noise=0.0):
    """Cross-entropy in training mode, and the new statistics of BatchNorm."""
    x, y = batch
    noise_key, dropout_key = jax.random.split(key)
    x = x + noise * jax.random.normal(noise_key, x.shape)
    logits, aux = MODEL.apply(
        variables,
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
    )
    labels = optax.smooth_labels(jax.nn.one_hot(y, 10), smoothing)
    return optax.softmax_cross_entropy(logits, labels).mean(), aux


def plain(variables, batch, key):
    return train_loss(variables, batch, key)


def smoothed(variables, batch, key):
    return train_loss(variables, batch, key, smoothing=0.1)


def noisy(variables, batch, key):
    return train_loss(variables, batch, key, noise=0.2)


def merge(variables, aux):
    return {**variables, **aux}


def log_likelihood(variables, held_out):
    """Scores with the running statistics and without dropout."""
    x, y = held_out
    logits = MODEL.apply(variables, x, train=False)
    return -optax.softmax_cross_entropy_with_integer_labels(logits, y)


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    optimizers = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}
    tx = optax_ev3.ev3(
        inner=[
            optax_ev3.explorer(one, merge_fn=merge)
            for one in optax_ev3.product(optimizers, [plain, smoothed, noisy])
        ],
        assess_fn=log_likelihood,
        explore=explore.rounds(20, averages=[explore.trajectory_average()]),
        key=seed,
    )

    @jax.jit
    def step(variables, state, key):
        train_key, held_out_key = jax.random.split(key)
        batch = _data.sample(train_key, data.train)
        held_out = _data.sample(held_out_key, data.held_out)
        # All explorers have losses of their own: no gradient of the loop is needed.
        updates, state = tx.update(
            None, state, variables, batch=batch, held_out=held_out
        )
        return optax.apply_updates(variables, updates), state

    @jax.jit
    def accuracy(variables, batch):
        x, y = batch
        return (MODEL.apply(variables, x, train=False).argmax(-1) == y).mean()

    init_key, data_key = jax.random.split(jax.random.key(seed))
    variables = MODEL.init(init_key, data.train[0][:1], train=False)
    state = tx.init(variables)
    print(f"Before training: test accuracy {accuracy(variables, data.test):.4f}")
    for i in range(steps):
        variables, state = step(variables, state, jax.random.fold_in(data_key, i))
    after = float(accuracy(optax_ev3.best_params(state), data.test))
    print(f"After {steps} steps: test accuracy {after:.4f}")
    for name, value in jax.jit(optax_ev3.summary)(state).items():
        print(f"  {name:32} {value:8.3f}")
    return after


def main(_):
    logging.set_verbosity(logging.WARNING)
    train(STEPS.value, SEED.value)


if __name__ == "__main__":
    app.run(main)
