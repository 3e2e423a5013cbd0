"""States of unlike optimizers in one form, so that they can be stacked."""

import collections
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import sharding, trees
from optax_ev3._src.explore import inner
from optax_ev3._src.explore.explorers import Explorer


class Packed(NamedTuple):
    """The inner state of one of several unlike optimizers.

    Attributes:
      like_params: Trees like the parameters, such as moments, as many as the optimizer
        has that has most of them; ``optax.MaskedNode`` for what none of them has.
      others: All other arrays, such as counts.
    """

    like_params: tuple[Any, ...]
    others: tuple[jax.Array, ...]


class _Moment(NamedTuple):
    """Where an array is that is like a parameter: the n-th of the one in this place."""

    number: int
    place: int


class _Other(NamedTuple):
    """Where another array is: the n-th of this type."""

    shape: tuple[int, ...]
    dtype: Any
    number: int


class Form(NamedTuple):
    """What the states of an optimizer consist of.

    Attributes:
      trees: How many of its parts are like the parameters.
      structure: Of its states.
      spots: Where each leaf is in the packed form.
      leaves: Their types.
    """

    trees: int
    structure: Any
    spots: list[Hashable]
    leaves: list[Any]


class Packing:
    """How the states of several optimizers are packed, for these parameters.

    What is like a parameter in the state of one optimizer takes the room of what is
    like it in that of another.

    Attributes:
      optimizers: By name.
      forms: By name, what their states consist of, see :func:`form`.
      params: Arrays, or what ``optax.tree.map_params`` initializes with.
    """

    def __init__(
        self,
        optimizers: Mapping[str, optax.GradientTransformation],
        forms: Mapping[str, Form],
        params: Any,
    ) -> None:
        self.optimizers, self.forms, self.params = optimizers, forms, params
        self._types: dict[Hashable, Any] = {}
        for one in forms.values():
            for spot, leaf in zip(one.spots, one.leaves, strict=True):
                dtype = self._types.get(spot, leaf).dtype
                dtype = jnp.promote_types(dtype, leaf.dtype)
                self._types[spot] = jax.ShapeDtypeStruct(leaf.shape, dtype)

    def first(self, name: str) -> Callable[[], Packed]:
        """What makes the first state of an optimizer."""
        init = self.optimizers[name].init
        return lambda: self._packed(name, jax.tree.map(trees.raw, init(self.params)))

    def step(
        self,
        name: str,
        grads: optax.Updates,
        state: Packed,
        extra_args: Mapping[str, Any],
    ) -> Callable[[], tuple[optax.Updates, Packed]]:
        """What makes a step of an optimizer: the update, and the new state."""

        def made() -> tuple[optax.Updates, Packed]:
            tx, old = self.optimizers[name], self._unpacked(name, state)
            update, new = inner.inner_update(
                tx, Explorer(tx), name, old, self.params, None, extra_args
            )(grads)
            update = inner.like_params(update, self.params, name)
            new = self._packed(name, inner.like_state(new, old, name))
            return sharding.alike(update, self.params), new

        return made

    def _packed(self, name: str, state: Any) -> Packed:
        spots = self.forms[name].spots
        found = dict(zip(spots, jax.tree.leaves(state), strict=True))
        leaves, structure = jax.tree.flatten(self.params)

        def moment(spot: _Moment, like: Any) -> Any:
            kind = self._types.get(spot)
            if kind is None:
                return optax.MaskedNode()
            if spot in found:
                return sharding.alike(jnp.asarray(found[spot], kind.dtype), like)
            return jnp.zeros_like(like, kind.dtype)

        def other(spot: Hashable) -> jax.Array:
            kind = self._types[spot]
            if spot in found:
                return jnp.asarray(found[spot], kind.dtype)
            return jnp.zeros(kind.shape, kind.dtype)

        counts = range(max(form.trees for form in self.forms.values()))
        like_params = (
            [moment(_Moment(number, place), p) for place, p in enumerate(leaves)]
            for number in counts
        )
        return Packed(
            tuple(structure.unflatten(one) for one in like_params),
            tuple(other(spot) for spot in self._types if isinstance(spot, _Other)),
        )

    def _unpacked(self, name: str, state: Packed) -> Any:
        form = self.forms[name]
        others = [spot for spot in self._types if isinstance(spot, _Other)]
        found: dict[Hashable, Any] = dict(zip(others, state.others, strict=True))
        for number, tree in enumerate(state.like_params):
            parts = jax.tree.structure(self.params).flatten_up_to(tree)
            found |= {_Moment(number, place): x for place, x in enumerate(parts)}
        leaves = [
            jnp.asarray(found[spot], leaf.dtype)
            for spot, leaf in zip(form.spots, form.leaves, strict=True)
        ]
        return form.structure.unflatten(leaves)


def form(tx: optax.GradientTransformation, params: Any) -> Form:
    """What the states of an optimizer consist of, for these parameters."""
    state = jax.eval_shape(lambda: inner.first_state(Explorer(tx), "", params))
    # As optax.tree.map_params finds out what is like the parameters.
    marked = jax.eval_shape(tx.init, trees.placeholder())
    marks, structure = jax.tree.flatten(marked, is_leaf=trees.is_placeholder)
    places = {path: place for place, (path, _) in enumerate(_by_path(params))}
    shapes = trees.shapes(params)
    counts: collections.Counter[Hashable] = collections.Counter()
    spots: list[Hashable] = []
    for mark, part in zip(marks, structure.flatten_up_to(state), strict=True):
        for path, leaf in _by_path(part):
            place = places.get(path) if trees.is_placeholder(mark) else None
            if place is not None and shapes[place] == leaf.shape:
                spots.append(_Moment(counts[place], place))
                counts[place] += 1
            else:
                kind = leaf.shape, leaf.dtype
                spots.append(_Other(*kind, counts[kind]))
                counts[kind] += 1
    leaves, structure = jax.tree.flatten(state)
    return Form(sum(map(trees.is_placeholder, marks)), structure, spots, leaves)


def _by_path(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
