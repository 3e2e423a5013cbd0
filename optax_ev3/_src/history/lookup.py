"""The state of ev3 within other states, and where its candidates are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_ev3._src.base.layout import CURRENT, STABLE
from optax_ev3._src.base.states import EV3State, ExploreState, place_index

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def positions(state: Any) -> dict[str, int]:
    """Index of every candidate by its name."""
    named = dict(state.explore.averages)
    for one in state.explore.explorers.values():
        named.update(one.positions)
    count = len(named)
    found = {name: place_index(place) for name, place in named.items()}
    return {**found, CURRENT: count, STABLE: count + 1}


def candidates(state: Any) -> list[str]:
    """The names of all candidates, in their order."""
    places = positions(state)
    return sorted(places, key=lambda name: places[name])


def groups(explore: ExploreState) -> list[jax.Array]:
    """Where the members of evolving groups are among the candidates."""
    return [
        jnp.asarray([place_index(place) for place in one.positions.values()])
        for one in explore.explorers.values()
        if one.evolution != ()
    ]


def find(tree: Any) -> EV3State:
    """The only state of ev3 in ``tree``; its history and its counters are arrays."""

    def is_state(node: Any) -> bool:
        return isinstance(node, EV3State)

    found = [x for x in jax.tree.leaves(tree, is_leaf=is_state) if is_state(x)]
    if len(found) != 1:
        raise ValueError(
            f"expected a tree with one state of ev3, found {len(found)} in "
            f"{type(tree).__name__}."
        )
    state = found[0]
    explorers = {
        name: one._replace(skipped=_unboxed(one.skipped))
        for name, one in state.explore.explorers.items()
    }
    return state._replace(
        ev3_round=_unboxed(state.ev3_round),
        ev3_calls=_unboxed(state.ev3_calls),
        explore=state.explore._replace(explorers=explorers),
        history=_unboxed(state.history),
    )


def _unboxed(tree: Any) -> Any:
    """The arrays of a tree of tuples and dictionaries, whatever they are kept in.

    Flax NNX keeps each in a variable: a node of its own, with one leaf.
    """

    def is_box(node: Any) -> bool:
        return not isinstance(node, tuple | dict)

    def unbox(box: Any) -> Any:
        (leaf,) = jax.tree.leaves(box)
        # Variables may be leaves themselves, or hold a reference to the array.
        return leaf if isinstance(leaf, _ARRAYS) else leaf[...]

    return jax.tree.map(unbox, tree, is_leaf=is_box)
