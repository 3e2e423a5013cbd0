"""What ``update`` is given: parameters and a state, checked."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from optax_ev3._src.base import sharding, trees
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.states import EV3State
from optax_ev3._src.history import lookup

_RESTORE = (
    "To restore a checkpoint with its structure, give the library tx.init(params) as "
    "the target."
)
# Fields of the state before version 0.2.
_OLD_FIELDS = {"record", "memory", "trajectory"}


def as_arrays(params: optax.Params) -> optax.Params:
    """The parameters as arrays; raises where something among them is none."""

    def one(path: Any, leaf: Any) -> jax.Array:
        try:
            return trees.as_array(leaf)
        except TypeError as error:
            raise TypeError(
                f"the parameters must be arrays, got {leaf!r} at params{keystr(path)}. "
                f"Leave it out, as eqx.filter(model, eqx.is_inexact_array) does for a "
                f"module of Equinox, and let assess_fn and loss_fn combine both parts."
            ) from error

    return jax.tree_util.tree_map_with_path(one, params)


def checked_params(params: optax.Params | None) -> optax.Params:
    """The parameters as arrays; raises unless ``update`` was given all of them."""
    if params is None:
        raise ValueError(
            "ev3 needs the current value of the parameters: pass them as "
            "tx.update(grads, state, params), or, where the loop does not, let the "
            "state hold them: optax_ev3.keep_params(tx)."
        )
    if any(map(_is_hole, jax.tree.leaves(params, is_leaf=_is_hole))):
        raise ValueError(
            "assess_fn would see params with holes: optax.masked and optax.partition "
            "must stand inside ev3, around its inner optimizers, and not around it."
        )
    arrays = as_arrays(params)
    _check_same_on_devices(arrays)
    return arrays


def _check_same_on_devices(params: optax.Params) -> None:
    """Raises if a device of a mapped axis is known to have parameters of its own.

    Each would look for what is not finite in its own part, and decide by it: the parts
    of the parameters would come from different candidates.
    """
    for path, leaf in tree_leaves_with_path(params):
        axes = sorted(map(str, sharding.varying(leaf)))
        if axes:
            raise ValueError(
                f"the parameters must be the same on all devices of a mapped axis, "
                f"those at params{keystr(path)} vary over {axes}. Under shard_map give "
                f"them in_specs=PartitionSpec(). Parameters that are sharded over "
                f"devices belong under jax.jit, with a NamedSharding."
            )


def checked_state(
    state: Any,
    params: optax.Params,
    layout: Layout,
    init_fn: Callable[[optax.Params], EV3State],
) -> EV3State:
    """The state with the dtypes that ``init`` gave it; raises if it is another's."""
    if not isinstance(state, EV3State):
        raise TypeError(
            f"update needs the state that init returned, an EV3State, got "
            f"{type(state).__name__}. {_of_old(state)}{_RESTORE}"
        )
    explorers = state.explore.explorers
    if set(explorers) != set(layout.members):
        theirs = sorted(name for one in explorers.values() for name in one.positions)
        ours = sorted(layout.names[: layout.explorers])
        raise ValueError(
            f"the state belongs to the {len(theirs)} explorers {theirs}, this "
            f"transformation has {len(ours)}: {ours}. Which of them are stacked is "
            f"part of it: {sorted(explorers)}, here {sorted(layout.members)}."
        )
    order = lookup.candidates(state)[: layout.proposals]
    names = layout.names[: layout.proposals]
    if sorted(order) == sorted(names) and order != names:
        raise ValueError(
            f"the state belongs to candidates in the order {order}, this "
            f"transformation has them in the order {names}: give ev3 its explorers, "
            f"and their averages, in the order of the state's."
        )
    expected = jax.eval_shape(init_fn, params)
    _check_leaves(expected, state)
    where = trees.difference(expected, state)
    if where is not None:
        raise ValueError(
            f"the state has another structure than init returned: {where}. {_RESTORE}"
        )
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), state, expected)


def _of_old(state: Any) -> str:
    """Says of a state that was restored without its structure how old it is."""
    names = state.keys() if isinstance(state, dict) else getattr(state, "_fields", ())
    if not set(names) >= _OLD_FIELDS:
        return ""
    return (
        "It is one of version 0.1, which this version cannot continue: its parameters "
        "and state['stable'] are as good as before, start from them with tx.init. "
    )


def _check_leaves(expected: EV3State, state: EV3State) -> None:
    """Raises unless the arrays have the right shapes, and dtypes that can be cast."""
    want, got = (
        {keystr(path): leaf for path, leaf in tree_leaves_with_path(tree)}
        for tree in (expected, state)
    )
    for path in [*want, *got]:
        if path in want and path in got and _fits(got[path], want[path]):
            continue
        found, needed = (
            _spec(leaves[path]) if path in leaves else "nothing"
            for leaves in (got, want)
        )
        is_key = trees.is_key(got.get(path)) and not trees.is_key(want.get(path))
        raise ValueError(
            f"the state does not belong to this transformation and these parameters: "
            f"at {path} it has {found}, expected {needed}."
            + " PRNG keys are kept as jax.random.key_data(key)."
            * is_key
        )


def _fits(leaf: Any, like: Any) -> bool:
    """Whether a leaf may be cast: optax, too, takes a Python number for a float16."""
    dtype = jnp.result_type(leaf)
    higher = trees.rank(dtype) > trees.rank(like.dtype)
    kinds = dtype == like.dtype or (trees.rank(dtype) >= 0 and not higher)
    return kinds and jnp.shape(leaf) == like.shape


def _spec(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _is_hole(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


@contextlib.contextmanager
def about_flattened(params: Any) -> Generator[None]:
    """Says of errors in callbacks that a wrapper may have changed the parameters."""
    try:
        yield
    except Exception as error:
        if jax.tree_util.all_leaves([params]) and jnp.ndim(params) == 1:
            error.add_note(
                f"The parameters are one vector, of shape {jnp.shape(params)}. If that "
                f"is the work of optax.flatten around ev3, put it inside, around the "
                f"inner optimizers."
            )
        raise
