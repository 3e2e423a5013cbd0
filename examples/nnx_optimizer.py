"""EV3 in a Flax NNX loop, inside `nnx.Optimizer`.

The optimizer sees the parameters alone. To score a candidate, `assess_fn` puts a model
together from the graph, the candidate's parameters and the rest of the model's state,
here that of dropout; the rest and the held-out batch are passed at each step.

Run it with `python examples/nnx_optimizer.py`; it takes seconds.
"""

import _data
import jax
import optax
from absl import app, flags, logging
from flax import nnx

import optax_ev3

STEPS = flags.DEFINE_integer("steps", 300, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")


class MLP(nnx.Module):
    def __init__(self, rngs):
        he = nnx.initializers.he_normal()
        self.layer_1 = nnx.Linear(64, 128, kernel_init=he, rngs=rngs)
        self.layer_2 = nnx.Linear(128, 128, kernel_init=he, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.layer_1(x))
        x = self.dropout(nnx.relu(self.layer_2(x)))
        return self.head(x)


def log_likelihood(model, batch):
    x, y = batch
    return -optax.softmax_cross_entropy_with_integer_labels(model(x), y)


def loss(model, batch):
    return -log_likelihood(model, batch).mean()


@nnx.jit
def accuracy(model, batch):
    x, y = batch
    return (model(x).argmax(-1) == y).mean()


def train(steps: int, seed: int) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    model = MLP(nnx.Rngs(seed))
    model.eval()
    graphdef = nnx.graphdef(model)  # of a model without dropout, to assess with

    def assess_fn(params, rest, batch):
        return log_likelihood(nnx.merge(graphdef, params, rest), batch)

    tx = optax_ev3.ev3(
        inner={"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)},
        assess_fn=assess_fn,
        key=seed,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, train_batch, held_out_batch):
        grads = nnx.grad(loss)(model, train_batch)
        _, _, rest = nnx.split(model, nnx.Param, ...)
        # Flax before 0.11 keeps the model in the optimizer.
        args = [grads] if hasattr(optimizer, "model") else [model, grads]
        optimizer.update(*args, batch=held_out_batch, rest=rest)

    print(f"Before training: test accuracy {accuracy(model, data.test):.4f}")
    model.train()
    for key in jax.random.split(jax.random.key(seed), steps):
        train_key, held_out_key = jax.random.split(key)
        train_batch = _data.sample(train_key, data.train)
        held_out_batch = _data.sample(held_out_key, data.held_out)
        step(model, optimizer, train_batch, held_out_batch)
    model.eval()
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
