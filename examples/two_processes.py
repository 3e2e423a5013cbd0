"""Two processes train one model, each with devices and examples of its own.

The loop is that of any JAX program of several processes: parameters and batches are
global arrays, which are spread over the devices of both. EV3 needs the name by which
the loop passes the held-out examples, as no program can hold arrays that are spread
over processes, and `optax_ev3.state_shardings` says how its state is spread.

Run it with `python examples/two_processes.py`, which starts both processes; it takes
less than a minute. On machines of your own, start one process on each, with the
`--address` of the first one, `--processes`, and its `--index`.
"""

import os
import socket
import subprocess
import sys
from itertools import pairwise

import _data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_ev3

STEPS = flags.DEFINE_integer("steps", 200, "Training steps.", lower_bound=0)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters and the batches.")
PROCESSES = flags.DEFINE_integer("processes", 2, "How many there are.", lower_bound=1)
INDEX = flags.DEFINE_integer("index", None, "This process; all are started by default.")
ADDRESS = flags.DEFINE_string("address", None, "HOST:PORT of the first process.")

SIZES = (64, 128, 128, 10)
BATCH = 64  # Of each process.


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


def log_likelihood(params, batch):
    """Scores, one for each example, higher is better: what EV3 assesses."""
    x, y = batch
    return -optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)


def loss(params, batch):
    return -log_likelihood(params, batch).mean()


def train(steps: int, seed: int) -> None:
    """Trains a classifier; the first process prints its accuracy on the test set."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def share(part):
        """Global arrays of the rows that each process has; all have as many."""
        count = len(part[0]) * jax.process_count()
        return tuple(
            jax.make_array_from_process_local_data(rows, x, (count, *x.shape[1:]))
            for x in part
        )

    # A real program would read its own files here.
    data = jax.device_get(_data.load())
    mine = slice(jax.process_index(), None, jax.process_count())
    x, y = (array[mine] for array in data.train)
    size = len(data.held_out[0]) // jax.device_count() * jax.local_device_count()
    held_out = share([array[mine][:size] for array in data.held_out])

    tx = optax_ev3.ev3(
        inner={"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)},
        assess_fn=optax_ev3.held_out(log_likelihood, "held_out", batch_size=128),
        key=seed,
    )
    # Every matrix is spread over all devices, as in FSDP.
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    start = lambda key: init(jax.random.wrap_key_data(key))
    where = jax.tree.map(
        lambda leaf: rows if leaf.ndim == 2 else everywhere, jax.eval_shape(start, key)
    )
    params = jax.jit(start, out_shardings=where)(key)
    shardings = optax_ev3.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)

    def step(params, state, batch, held_out):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, held_out=held_out)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=(where, shardings), donate_argnums=(0, 1))
    accuracy = jax.jit(
        lambda params, x, y: (logits(params, x).argmax(-1) == y).mean(),
        out_shardings=everywhere,
    )

    def tell(*words):
        if jax.process_index() == 0:
            print(*words)

    tell(f"{jax.process_count()} processes, {jax.device_count()} devices")
    tell(f"Before training: test accuracy {accuracy(params, *data.test):.4f}")
    draw = np.random.default_rng([seed, jax.process_index()])
    for _ in range(steps):
        index = draw.integers(len(x), size=BATCH)
        params, state = step(params, state, share((x[index], y[index])), held_out)
    best = optax_ev3.best_params(state)
    tell(f"After {steps} steps: test accuracy {accuracy(best, *data.test):.4f}")
    summary = jax.jit(optax_ev3.summary, out_shardings=everywhere)(state)
    for name, value in summary.items():
        tell(f"  {name:18} {float(value):8.3f}")


def start_all() -> int:
    """Starts all processes on this machine, on CPUs, each with two devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    devices = "--xla_force_host_platform_device_count=2"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    # Devices wait for those of other processes, each in a thread: XLA needs enough.
    threads = {"NPROC": "16", "PJRT_NPROC": "16"}
    env = os.environ | threads | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, __file__, *sys.argv[1:], f"--address={address}"]
    running = [
        subprocess.Popen([*command, f"--index={index}"], env=env)
        for index in range(PROCESSES.value)
    ]
    return max(abs(process.wait()) for process in running)


def main(_):
    logging.set_verbosity(logging.WARNING)
    if INDEX.value is None:
        sys.exit(start_all())
    # Before anything else asks JAX for its devices.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # On CPUs, two steps that run at a time may wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(ADDRESS.value, PROCESSES.value, INDEX.value)
    train(STEPS.value, SEED.value)


if __name__ == "__main__":
    app.run(main)
