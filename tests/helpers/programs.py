"""What programs of one process or several do, and what they end with.

Importing it starts JAX: processes have to be connected before.
"""

import jax
import jax.tree_util
import numpy as np
import optax
import orbax.checkpoint
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_ev3
from helpers import meshes
from optax_ev3 import adapt, explore


def setting(devices=None, axis=None):
    """A mesh over the devices, parameters spread over it, and how they are.

    An axis of two for explorers is one over processes, where there are two.
    """
    devices = np.array(devices or jax.devices())
    mesh = Mesh(devices, ("data",))
    if axis is not None:
        mesh = Mesh(devices.reshape(2, -1), (axis, "data"))
    params = meshes.spread(meshes.start(), mesh, meshes.MESHES["8"])
    return mesh, params, jax.tree.map(lambda leaf: leaf.sharding, params)


def batch_of(seed, mesh):
    """Global arrays, of which each process has made its own rows."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def part(whole):
        rows = len(whole) // jax.process_count()
        mine = whole[jax.process_index() * rows :][:rows]
        return jax.make_array_from_process_local_data(sharding, mine, whole.shape)

    return jax.tree.map(part, meshes.data(seed))


def nearest(outputs):
    """A metric in NumPy: minus the median distance from the label's corner."""
    logits, labels = outputs
    return -np.median(np.square(logits - np.eye(3)[labels]).sum(1))


def failing(outputs):
    """A metric that fails where it runs."""
    raise OSError(f"no file in process {jax.process_index()}")


def transformation(case):
    """One of the cases that :func:`train` runs."""

    def predict(params, held):
        return meshes.outputs(params, held[0]), held[1]

    # Candidates that differ: an order of summation must not decide between equal ones.
    means = [explore.trajectory_average()]
    branches = explore.branches(2, averages=means)
    race = explore.branches(2, averages=means, racing=explore.Racing(1, 2))
    score = optax_ev3.held_out(meshes.likelihoods, "held", batch_size=24)
    whole = optax_ev3.held_out(meshes.likelihoods, "held")
    assess_fn, strategy = {
        "one_step": (score, explore.one_step()),
        "relay": (whole, explore.relay(2, averages=[])),
        "branches": (score, race),
        "spread": (score, branches),
        "host": (optax_ev3.host_metric(predict, nearest), explore.one_step()),
        "failing": (optax_ev3.host_metric(predict, failing), explore.one_step()),
    }[case]
    loss_fn = meshes.loss_fn if strategy in (race, branches) else None
    return optax_ev3.ev3(
        ADAMS if case == "spread" else meshes.PAIR,
        assess_fn,
        loss_fn=loss_fn,
        explore=strategy,
        adapt=adapt.greedy(),
        explorer_axis=axis_of(case),
    )


ADAMS = {f"adam_{rate}": optax.adam(rate) for rate in (0.001, 0.003, 0.03, 0.1)}


def axis_of(case):
    """The mesh axis over which explorers are spread, or None."""
    return "explorers" if case == "spread" else None


def stepper(tx, shardings):
    def step(params, state, batch, held):
        grads = jax.grad(meshes.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, held=held)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, out_shardings=shardings)


def begin(case, devices=None):
    """A function that trains, and where it starts."""
    mesh, params, where = setting(devices, axis_of(case))
    tx = transformation(case)
    shardings = where, optax_ev3.state_shardings(tx, params, axis_of(case))
    state = jax.jit(tx.init, out_shardings=shardings[1])(params)
    held = batch_of(99, mesh)

    def train(carry, seeds):
        for seed in seeds:
            carry = step(*carry, batch_of(seed, mesh), held)
        return carry

    step = stepper(tx, shardings)
    return train, (params, state)


def gathered(tree):
    """The whole of a tree, as NumPy arrays."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def saved(tree, prefix=""):
    """The leaves of a tree, as NumPy arrays, by their names."""
    leaves = jax.tree_util.tree_leaves_with_path(gathered(tree))
    return {prefix + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def train(folder):
    """What every case ends with."""
    del folder
    found = {}
    for case in ("one_step", "relay", "branches", "spread", "host"):
        go_on, start = begin(case)
        found |= saved(go_on(start, range(8)), case)
    return found


def checkpoint(folder):
    """A relay that is saved in the middle of a turn, and goes on."""
    go_on, start = begin("relay")
    middle = go_on(start, range(3))
    save(folder, middle)
    found = saved(middle, "middle") | saved(go_on(middle, range(3, 6)), "end")
    restored = restore(folder, start)
    return found | saved(go_on(restored, range(3, 6)), "restored")


def save(folder, tree):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", tree)
        checkpointer.wait_until_finished()


def restore(folder, like):
    """What was saved, spread over devices as ``like`` is."""
    shapes = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, like)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "checkpoint", shapes)


def mistakes(folder):
    """What is told of data that no program can hold, or that differ."""
    del folder
    mesh, params, _ = setting()
    held, index = batch_of(99, mesh), jax.process_index()

    def closing():
        tx = optax_ev3.ev3(meshes.PAIR, lambda w: meshes.likelihoods(w, held))
        jax.jit(tx.update)(params, tx.init(params), params)

    cases = {
        "spread": lambda: optax_ev3.held_out(meshes.likelihoods, {"x": held}),
        "sizes": lambda: optax_ev3.held_out(
            meshes.likelihoods, meshes.data(99, 30 + index)
        ),
        "values": lambda: optax_ev3.held_out(meshes.likelihoods, meshes.data(index)),
        "same": lambda: optax_ev3.held_out(meshes.likelihoods, meshes.data(99)),
        "closing": closing,
    }
    found = {}
    for name, case in cases.items():
        found[name] = ""
        try:
            case()
        except ValueError as error:
            found[name] = str(error)
    return {name: np.array(said) for name, said in found.items()}


def fails(folder):
    """What is raised where a metric on the host fails in one process."""
    del folder
    go_on, start = begin("failing")
    try:
        jax.block_until_ready(go_on(start, range(1)))
    except jax.errors.JaxRuntimeError as error:
        return {"raised": np.array(str(error))}
    return {"raised": np.array("")}
