"""Trajectories of a Flax NNX model with BatchNorm, inside `nnx.Optimizer`.

Running statistics that stay in the model belong to the visible branch: all other
candidates would be scored with statistics that are not theirs. So the optimizer gets
them together with the parameters (`wrt`), and a `merge_fn` puts there what a loss
computed on the side. Every explorer then has statistics of its own, and an adopted
candidate brings them along.

Run it with `python examples/nnx_batchnorm.py`; it takes half a minute.
"""

import _data
import jax
import optax
from absl import app, flags, logging
from flax import nnx

import optax_ev3
from optax_ev3 import explore

STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")

TRAINED = nnx.Any(nnx.Param, nnx.BatchStat)


class MLP(nnx.Module):
    def __init__(self, rngs):
        he = nnx.initializers.he_normal()
        self.layer_1 = nnx.Linear(64, 128, kernel_init=he, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.layer_2 = nnx.Linear(128, 128, kernel_init=he, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm_1(self.layer_1(x)))
        x = nnx.relu(self.norm_2(self.layer_2(x)))
        return self.head(x)


def log_likelihood(model, batch):
    x, y = batch
    return -optax.softmax_cross_entropy_with_integer_labels(model(x), y)


@nnx.jit
def accuracy(model, batch):
    x, y = batch
    return (model(x).argmax(-1) == y).mean()


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    model = MLP(nnx.Rngs(seed))
    model.train()
    training = nnx.graphdef(model)
    model.eval()
    evaluation = nnx.graphdef(model)

    def loss(variables, batch):
        """Cross-entropy in training mode, and the new statistics of BatchNorm."""
        model = nnx.merge(training, variables)
        value = -log_likelihood(model, batch).mean()
        return value, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def merge(variables, statistics):
        return nnx.merge_state(variables, nnx.State(statistics))

    def assess_fn(variables, held_out):
        return log_likelihood(nnx.merge(evaluation, variables), held_out)

    optimizers = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}
    tx = optax_ev3.ev3(
        inner={
            name: optax_ev3.explorer(one, loss, merge_fn=merge)
            for name, one in optimizers.items()
        },
        assess_fn=assess_fn,
        explore=explore.branches(20),
        key=seed,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=TRAINED)

    @nnx.jit
    def step(model, optimizer, batch, held_out):
        # All explorers have losses of their own. Flax wants a state of the model where
        # the gradients would be.
        unused = nnx.state(model, TRAINED)
        optimizer.update(model, unused, batch=batch, held_out=held_out)

    print(f"Before training: test accuracy {accuracy(model, data.test):.4f}")
    for key in jax.random.split(jax.random.key(seed), steps):
        train_key, held_out_key = jax.random.split(key)
        batch = _data.sample(train_key, data.train)
        held_out = _data.sample(held_out_key, data.held_out)
        step(model, optimizer, batch, held_out)
    nnx.update(model, optax_ev3.best_params(optimizer.opt_state))
    after = float(accuracy(model, data.test))
    print(f"After {steps} steps: test accuracy {after:.4f}")
    for name, value in optax_ev3.summary(optimizer.opt_state).items():
        print(f"  {name:18} {value:8.3f}")
    return after


def main(_):
    logging.set_verbosity(logging.WARNING)
    train(STEPS.value, SEED.value)


if __name__ == "__main__":
    app.run(main)
