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

    place: int
    number: int


class _Other(NamedTuple):
    """Where another array is: the n-th of this type."""

    shape: tuple[int, ...]
    dtype: Any
    number: int


class Form(NamedTuple):
    """What the states of an optimizer consist of.

    Attributes:
      moments: How many of its parts are like the parameters.
      structure: Of its states.
      spots: Where each leaf is in the packed form.
      leaves: Their types.
    """

    moments: int
    structure: Any
    spots: list[Hashable]
    leaves: list[Any]


class Packing:
    """How the states of several optimizers are packed, for these parameters.

    What is like a parameter in the state of one optimizer takes the room of what is
    like it in that of another.

    Attributes:
      optimizers: By name.
      forms: By name, what their states consist of, see :func:`form_of`.
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
                dtypes = self._types.get(spot, leaf).dtype, leaf.dtype
                with jax.numpy_dtype_promotion("standard"):
                    wide = jnp.promote_types(*dtypes)
                self._types[spot] = jax.ShapeDtypeStruct(leaf.shape, wide)

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

        counts = range(max(form.moments for form in self.forms.values()))
        like_params = (
            [moment(_Moment(place, number), p) for place, p in enumerate(leaves)]
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
            found |= {_Moment(place, number): x for place, x in enumerate(parts)}
        leaves = [
            jnp.asarray(found[spot], leaf.dtype)
            for spot, leaf in zip(form.spots, form.leaves, strict=True)
        ]
        return form.structure.unflatten(leaves)


def form_of(tx: optax.GradientTransformation, params: Any) -> Form:
    """What the states of an optimizer consist of, for these parameters."""
    state = jax.eval_shape(lambda: inner.first_state(Explorer(tx), "", params))
    places = {path: place for place, (path, _) in enumerate(_by_path(params))}
    shapes = trees.shapes(params)
    counts: collections.Counter[Hashable] = collections.Counter()
    spots: list[Hashable] = []
    parts = _parts(tx, state)
    for is_like_params, part in parts:
        for path, leaf in _by_path(part):
            place = places.get(path) if is_like_params else None
            # Integers stay apart: in the room of floats they would be rounded.
            is_number = trees.is_inexact(leaf)
            if place is not None and is_number and shapes[place] == leaf.shape:
                spots.append(_Moment(place, counts[place]))
                counts[place] += 1
            else:
                kind = leaf.shape, leaf.dtype
                spots.append(_Other(*kind, counts[kind]))
                counts[kind] += 1
    leaves, structure = jax.tree.flatten(state)
    return Form(sum(like for like, _ in parts), structure, spots, leaves)


def _parts(tx: optax.GradientTransformation, state: Any) -> list[tuple[bool, Any]]:
    """The parts of a state, and whether they are like the parameters.

    They are told apart as ``optax.tree.map_params`` does it.
    """
    try:
        marked = jax.eval_shape(tx.init, trees.placeholder())
        marks, structure = jax.tree.flatten(marked, is_leaf=trees.is_placeholder)
        parts = structure.flatten_up_to(state)
    except Exception:  # Some look into the parameters: there nothing is known to be.
        return [(False, state)]
    return [(trees.is_placeholder(m), x) for m, x in zip(marks, parts, strict=True)]


def _by_path(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
