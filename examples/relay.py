"""Three optimizers take turns at the price of one, in a Flax Linen loop as it is.

Shows which parameters to evaluate, `optax_ev3.best_params`, and how a run is saved and
goes on: the whole `TrainState` is one tree of arrays, in the middle of a turn, too.

Run it with `python examples/relay.py`; it takes seconds. With `--folder=run` it saves
checkpoints there; run it again with more `--steps`, and it goes on from the last one.
"""

import _checkpoint
import _data
import jax
import optax
from absl import app, flags, logging
from flax import linen as nn
from flax.training.train_state import TrainState

import optax_ev3
from optax_ev3 import explore

STEPS = flags.DEFINE_integer("steps", 600, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")
FOLDER = flags.DEFINE_string("folder", None, "Where checkpoints go; none by default.")

EVERY = 100  # Steps between two evaluations, each with a checkpoint.
INNER = {
    "adam": optax.adam(1e-2),
    "momentum": optax.sgd(0.01, momentum=0.9),
    "lion": optax.lion(1e-4),
}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_normal())(x))
        return nn.Dense(10)(x)


def train(steps: int, seed: int, folder: str | None) -> float:
    """Trains a classifier and returns its accuracy on the test set."""
    data = _data.load()
    model = MLP()

    def log_likelihood(params, batch):
        x, y = batch
        logits = model.apply({"params": params}, x)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, y)

    # Before: tx = optax.adam(1e-3)
    tx = optax_ev3.ev3(
        INNER,
        optax_ev3.held_out(log_likelihood, data.held_out),
        explore=explore.relay(),
        key=seed,
    )

    @jax.jit
    def step(state, batch):
        def loss(params):
            return -log_likelihood(params, batch).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    @jax.jit
    def accuracy(params, batch):
        x, y = batch
        return (model.apply({"params": params}, x).argmax(-1) == y).mean()

    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, data.train[0][:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    saved = _checkpoint.Folder(folder) if folder else None
    if saved and saved.resume() is not None:
        state = saved.restore(state=state)["state"]
        print(f"Goes on from step {state.step}.")

    def evaluate():
        # The loop's own parameters may be those of an optimizer that is being tried.
        best = optax_ev3.best_params(state.opt_state)
        own, after = accuracy(state.params, data.test), accuracy(best, data.test)
        print(f"step {int(state.step):4}: test accuracy {after:.4f}, in turn {own:.4f}")
        return float(after)

    after = evaluate()
    for i in range(int(state.step), steps):
        batch = _data.sample(jax.random.fold_in(data_key, i), data.train)
        state = step(state, batch)
        if (i + 1) % EVERY == 0 or i + 1 == steps:
            after = evaluate()
            if saved:
                saved.save({}, now=True, state=state)
    for name, value in jax.jit(optax_ev3.summary)(state.opt_state).items():
        if "share" in name and value > 0:
            print(f"  {name:36} {value:.3f}")
    return after


def main(_):
    logging.set_verbosity(logging.WARNING)
    train(STEPS.value, SEED.value, FOLDER.value)


if __name__ == "__main__":
    app.run(main)
