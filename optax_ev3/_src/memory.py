"""What the state of an optimizer takes of the memory of a device."""

import math
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
      - ``"inner states"``, ``"branches"``, ``"averages"``: of all explorers;
      - ``"at work"``: in a relay, of each stack one explorer apart;
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
      averages     16 MB
      at work      0 MB
      others       0 MB
      host         0 MB
      device       52 MB
    """
    spread = any(
        isinstance(getattr(leaf, "sharding", None), NamedSharding)
        for leaf in jax.tree.leaves(params)
    )
    state = jax.eval_shape(tx.init, params)
    where: Any = jax.tree.map(lambda _: None, state)
    if spread:
        where = state_shardings(tx, params, explorer_axis, offload=offload)
    elif explorer_axis is not None or offload:
        raise TypeError(
            "explorer_axis and offload need parameters with a "
            "jax.sharding.NamedSharding, which says on which mesh they are."
        )
    sizes: dict[str, int] = dict.fromkeys(_NAMES, 0)
    sizes["params"] = sum(map(_bytes, jax.tree.leaves(params)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    spots = jax.tree.leaves(where, is_leaf=lambda x: x is None)
    for (path, leaf), sharding in zip(leaves, spots, strict=True):
        kind = getattr(sharding, "memory_kind", None)
        is_host = kind is not None and kind.endswith("host")
        name = "host" if is_host else _name(state, path)
        sizes[name] += _bytes(leaf, sharding)
    device = sum(size for name, size in sizes.items() if name != "host")
    return {**sizes, "device": device}


# In the order in which they are told.
_NAMES: tuple[str, ...] = (
    "params",
    "stable",
    "start",
    "inner states",
    "branches",
    "averages",
    "at work",
    "others",
    "host",
)
# Which field of the state is what.
_FIELDS = {
    "stable": "stable",
    "start": "start",
    "opt_state": "inner states",
    "ends": "branches",
    "means": "averages",
    "at_work": "at work",
}


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


def _name(state: Any, path: Any) -> str:
    """What a leaf of the state is for: by the first field of ev3's that says it."""
    node = state
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            is_ours = type(node).__module__.startswith(
                EV3State.__module__.split(".")[0]
            )
            if is_ours and key.name in _FIELDS:
                return _FIELDS[key.name]
            node = getattr(node, key.name)
        elif isinstance(key, jax.tree_util.DictKey):
            node = node[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            node = node[key.idx]
        else:
            return "others"
    return "others"
