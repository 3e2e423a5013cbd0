"""How the state of an optimizer is spread over devices."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from optax_ev3._src.base import sharding
from optax_ev3._src.base.states import EV3State

# The kind of memory of the host from which devices read by themselves.
_HOST = "pinned_host"


def state_shardings(
    tx: optax.GradientTransformation,
    params: optax.Params,
    explorer_axis: str | None = None,
    *,
    offload: bool = False,
) -> Any:
    """How to spread the state over devices: like the parameters that it mirrors.

    Without it ``jax.jit(tx.init)`` on a mesh with automatic axes leaves to the compiler
    how moments and other zeros are spread, and rules that go by the shapes of
    parameters, such as ``optax.tree.map_params``, take the members of a
    :func:`sweep` for their first axis. Here types are followed through ``tx.init`` as
    on a mesh with explicit axes; nothing is computed.

    Args:
      tx: Any optax transformation.
      params: Arrays, or ``jax.ShapeDtypeStruct``, all with a ``NamedSharding`` of one
        mesh.
      explorer_axis: The axis of the mesh over which stacked explorers are spread, as
        in :func:`optax_ev3.ev3`; None for none.
      offload: Whether what is needed only at the ends of rounds is kept in the memory
        of the host: the stable parameters, those with which a round begins, and in a
        relay with stacked explorers the branches and averages that wait for their
        turn, and the inner states of the stacks.

    Returns:
      A tree like ``tx.init(params)`` of ``NamedSharding``: what mirrors a parameter is
      spread like it, that of a sweep with its members along a first axis, which is not
      spread. All else is on all devices.

    Raises:
      TypeError: If a parameter has no ``NamedSharding``.
      ValueError: If they are of several meshes, if the mesh has no axis for explorers,
        or if they do not divide over it; if there is no memory of the host.

    Examples:
      >>> import jax, jax.numpy as jnp, numpy as np, optax, optax_ev3
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
      >>> mesh = Mesh(np.array(jax.devices()[:1]), "data")
      >>> spread = NamedSharding(mesh, PartitionSpec("data"))
      >>> w = jax.device_put(jnp.zeros(8), spread)
      >>> rates = optax_ev3.sweep(optax.adam, learning_rate=[0.01, 0.1])
      >>> tx = optax_ev3.ev3({"adam": rates}, lambda w: -(w**2).sum())
      >>> shardings = optax_ev3.state_shardings(tx, w)
      >>> tuple(shardings.stable.spec)
      ('data',)
      >>> tuple(shardings.explore.explorers["adam"].opt_state[0].mu.spec)
      (None, 'data')
      >>> state = jax.jit(tx.init, out_shardings=shardings)(w)
    """
    meshes = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        own = getattr(leaf, "sharding", None)
        if not isinstance(own, NamedSharding):
            raise TypeError(
                f"parameters must have a jax.sharding.NamedSharding, got {own} at "
                f"params{jax.tree_util.keystr(path)}, a {type(leaf).__name__}."
            )
        if own.mesh not in meshes:
            meshes.append(own.mesh)
    if len(meshes) != 1:
        raise ValueError(f"parameters must be of one mesh, got {meshes or 'none'}.")
    (mesh,) = meshes
    axes = (AxisType.Explicit,) * len(mesh.axis_names)
    explicit = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=axes)

    def typed(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = NamedSharding(explicit, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec)

    def untyped(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = getattr(leaf.sharding, "spec", None)
        return NamedSharding(mesh, PartitionSpec() if spec is None else spec)

    with _within(explicit):
        state = jax.eval_shape(tx.init, jax.tree.map(typed, params))
    shardings = jax.tree.map(untyped, state)
    if explorer_axis is not None:
        shardings = _over_explorers(state, shardings, mesh, explorer_axis)
    if offload:
        _check_host(mesh)
        shardings = jax.tree.map(_offloaded, shardings, is_leaf=_is_state)
    return shardings


def _is_state(node: Any) -> bool:
    return isinstance(node, EV3State)


def _check_host(mesh: Any) -> None:
    """Raises unless the devices can use the memory of their host."""
    if isinstance(mesh, AbstractMesh):
        return
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST not in kinds or not hasattr(jax, "memory"):
        raise ValueError(
            f"offload=True needs devices with memory of kind {_HOST!r}, and JAX 0.8 or "
            f"newer; {device} has {kinds}, and this is JAX {jax.__version__}."
        )


def _offloaded(found: Any) -> Any:
    """The shardings of a state of ev3 with what is seldom needed on the host."""
    if not _is_state(found):
        return found

    def to_host(tree: Any) -> Any:
        return jax.tree.map(lambda one: one.with_memory_kind(_HOST), tree)

    walked = found.explore.branches
    if walked != ():
        if walked.at_work != ():
            for name in walked.at_work.opt_states:
                found = _with_stack(found, name, to_host)
            walked = found.explore.branches
            waiting = to_host((walked.ends, walked.means))
            walked = walked._replace(ends=waiting[0], means=waiting[1])
        walked = walked._replace(start=to_host(walked.start))
        found = found._replace(explore=found.explore._replace(branches=walked))
    return found._replace(stable=to_host(found.stable))


def _with_stack(found: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """The shardings of a state of ev3 with those of one stack of explorers changed."""
    explore, walked = found.explore, found.explore.branches
    one = explore.explorers[name]
    one = one._replace(opt_state=change(one.opt_state))
    if walked != ():
        walked = walked._replace(
            ends=walked.ends | {name: change(walked.ends[name])},
            means=walked.means | {name: change(walked.means[name])},
        )
    explore = explore._replace(explorers=explore.explorers | {name: one})
    return found._replace(explore=explore._replace(branches=walked))


def _over_explorers(state: Any, shardings: Any, mesh: Any, axis: str) -> Any:
    """The shardings of states of ev3, with what is stacked spread over an axis."""

    def spread(found: NamedSharding) -> NamedSharding:
        rest = found.spec[1:]
        if any(axis == x or (isinstance(x, tuple) and axis in x) for x in rest):
            raise ValueError(
                f"parameters must not be spread over the axis of explorers, {axis!r}, "
                f"got one of {found.spec}, its explorers first."
            )
        return NamedSharding(mesh, PartitionSpec(axis, *rest))

    def of_state(state: Any, found: Any) -> Any:
        if not _is_state(state):
            return found
        for name, one in state.explore.explorers.items():
            if one.skipped.ndim:
                names = ", ".join(one.positions)
                sharding.check_axis(axis, one.skipped.shape[0], mesh, names)
                found = _with_stack(
                    found, name, functools.partial(jax.tree.map, spread)
                )
        return found

    return jax.tree.map(of_state, state, shardings, is_leaf=_is_state)


def _within(mesh: AbstractMesh) -> Any:
    """The mesh of what is traced, whichever the caller has set."""
    if hasattr(jax.sharding, "use_abstract_mesh"):
        return jax.sharding.use_abstract_mesh(mesh)
    return contextlib.nullcontext()  # JAX before 0.7 knows it from the arrays alone.
