"""What the state of an optimizer takes of the memory of a device."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from optax_ev3._src.base import trees
from optax_ev3._src.base.states import EV3State
from optax_ev3._src.state_shardings import state_shardings


def memory(
    tx: optax.GradientTransformation,
    params: optax.Params,
    explorer_axis: str | None = None,
    *,
    offload: bool = False,
) -> dict[str, int]:
    """The bytes of parameters and state on each device, told before anything runs.

    Beside these, a step needs memory for gradients and activations, those of one
    explorer at a time, and to assess one candidate; what is donated is not needed twice
    (``jax.jit(step, donate_argnums=...)``).

    Args:
      tx: Any optax transformation.
      params: Arrays, or ``jax.ShapeDtypeStruct``. Where they have a ``NamedSharding``,
        what a device has of them counts, and the state is spread as by
        :func:`state_shardings`.
      explorer_axis: See :func:`state_shardings`; for parameters with a sharding.
      offload: See :func:`state_shardings`; for parameters with a sharding.

    Returns:
      Bytes by what they are for, all ints:

      - ``"params"``: the parameters themselves;
      - ``"stable"``, ``"start"``: the stable parameters, and those with which a round
        began, in a relay the best ones;
      - ``"inner states"``, ``"branches"``, ``"averages"``: of all explorers; in a
        relay the average over a turn is there once;
      - ``"at work"``: in a relay with stacks, the branch at work and its average of all
        turns once more, and an inner state of each stack;
      - ``"others"``: counters, history, the rule, and what is not of ev3;
      - ``"host"``: what is kept in the memory of the host, and not counted above;
      - ``"device"``: the sum of all but that.

    Raises:
      TypeError, ValueError: As :func:`state_shardings` does.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3
      >>> params = jax.ShapeDtypeStruct([1_000_000], jnp.float32)
      >>> rates = {"a": optax.adam(1e-3), "b": optax.adam(3e-3)}
      >>> relay = optax_ev3.explore.relay()
      >>> tx = optax_ev3.ev3(rates, lambda w: -(w**2).sum(), explore=relay)
      >>> for name, size in optax_ev3.memory(tx, params).items():
      ...     print(f"{name:12} {size / 1e6:.0f} MB")
      params       4 MB
      stable       4 MB
      start        4 MB
      inner states 16 MB
      branches     8 MB
      averages     12 MB
      at work      0 MB
      others       0 MB
      host         0 MB
      device       48 MB
    """
    spread = any(
        isinstance(getattr(leaf, "sharding", None), NamedSharding)
        for leaf in jax.tree.leaves(params)
    )
    leaves, structure = jax.tree.flatten(jax.eval_shape(tx.init, params))
    spots: list[Any] = [None] * len(leaves)
    if spread:
        where = state_shardings(tx, params, explorer_axis, offload=offload)
        spots = jax.tree.leaves(where)
    elif explorer_axis is not None or offload:
        raise TypeError(
            "explorer_axis and offload need parameters with a "
            "jax.sharding.NamedSharding, which says on which mesh they are."
        )
    kinds = [getattr(spot, "memory_kind", None) or "" for spot in spots]
    sizes = list(map(_bytes, leaves, spots))
    on_device = [
        0 if kind.endswith("host") else size
        for kind, size in zip(kinds, sizes, strict=True)
    ]
    found: dict[str, int] = dict.fromkeys(_PARTS, 0)
    for name, part in _parts(structure.unflatten(on_device)):
        found[name] += sum(jax.tree.leaves(part))
    own, device = sum(map(_bytes, jax.tree.leaves(params))), sum(on_device)
    return {
        "params": own,
        **found,
        "others": device - sum(found.values()),
        "host": sum(sizes) - device,
        "device": own + device,
    }


# Of a state of ev3, in the order in which they are told.
_PARTS: tuple[str, ...] = (
    "stable",
    "start",
    "inner states",
    "branches",
    "averages",
    "at work",
)


def _parts(state: Any) -> Iterator[tuple[str, Any]]:
    """What the parts of states of ev3 are for, and the parts."""

    def is_state(node: Any) -> bool:
        return isinstance(node, EV3State)

    for one in filter(is_state, jax.tree.leaves(state, is_leaf=is_state)):
        yield "stable", one.stable
        for explorer in one.explore.explorers.values():
            yield "inner states", explorer.opt_state
        walked = one.explore.branches
        if walked != ():
            yield "start", walked.start
            yield "branches", walked.ends
            yield "averages", (walked.means, walked.turn_means)
            yield "at work", walked.at_work


def _bytes(leaf: Any, sharding: Any = None) -> int:
    """The bytes of an array on one device."""
    shape = leaf.shape
    sharding = sharding or getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        shape = sharding.shard_shape(shape)
    if trees.is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
        shape = (*shape, *leaf.shape[len(shape) :])
    return math.prod(shape) * leaf.dtype.itemsize
