"""Which explorers are stacked: alike ones, and some unlike ones with the same loss.

Alike explorers differ in numbers alone, and are stacked like a sweep. Optax makes a
transformation of functions whose closures hold its numbers. Where those of several
differ in floats alone, one of them is enough, with the floats as arrays.
"""

import functools
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ev3._src.base import callbacks, trees
from optax_ev3._src.explore import unlike
from optax_ev3._src.explore.explorers import Explorer

# Two in a stack make no smaller program than two apart, and are copied in and out.
_LEAST = 3

_PLAIN = (bool, int, complex, str, bytes, type(None), np.dtype)

# Makes an object anew from a number for each place where floats differ.
_Maker = Callable[[Sequence[Any]], Any]


class _UnlikeError(Exception):
    """Objects that differ in more than floats."""


class _Template(NamedTuple):
    """What several transformations have in common.

    Attributes:
      make: Makes one of them from its numbers.
      numbers: By place, the number of each.
    """

    make: _Maker
    numbers: list[tuple[float, ...]]

    def __call__(self, **numbers: Any) -> optax.GradientTransformation:
        """The transformation with these numbers, called by their places."""
        places = range(len(self.numbers))
        return self.make([numbers[str(place)] for place in places])


def stacked(
    explorers: Mapping[str, Explorer], axis: str | None = None, by_loss: bool = False
) -> dict[str, Explorer]:
    """The explorers, those that are stacked as one.

    Args:
      explorers: By name.
      axis: The mesh axis over which all that is stacked is spread, or None. With one,
        all are stacked that have the same loss.
      by_loss: Whether unlike explorers are stacked, too, if they have the same loss,
        and states of about the same size.
    """
    found = _stacked_alike(explorers, _LEAST if axis is None else 2)
    # Groups that evolve may copy inner states of others, which must not be packed.
    evolves = any(one.space is not None for one in explorers.values())
    if len(found) > 1 and not evolves and (by_loss or axis is not None):
        found = _stacked_by_loss(found, axis is not None)
    if axis is None:
        return found
    return {
        name: one if one.size is None else one._replace(axis=axis)
        for name, one in found.items()
    }


def _stacked_alike(
    explorers: Mapping[str, Explorer], least: int
) -> dict[str, Explorer]:
    """Groups of at least so many, which differ in numbers alone, as one."""

    def join(group: Mapping[str, Explorer]) -> Explorer | None:
        return _joined(group) if len(group) >= least else None

    return _grouped(explorers, _are_alike, join)


def _stacked_by_loss(
    explorers: Mapping[str, Explorer], all_of_them: bool
) -> dict[str, Explorer]:
    """Unlike explorers with the same loss as one."""
    can = {id(one) for one in explorers.values() if unlike.can_be_joined(one)}

    def fit(first: Explorer, other: Explorer) -> bool:
        return {id(first), id(other)} <= can and _have_same_functions(first, other)

    def choose(group: Mapping[str, Explorer]) -> Mapping[str, Explorer]:
        return group if all_of_them else unlike.worth_it(group)

    def join(group: Mapping[str, Explorer]) -> Explorer | None:
        enough = 2 if all_of_them else _LEAST
        count = sum(len(one.rows) for one in group.values())
        is_worth_it = len(group) > 1 and count >= enough
        return unlike.joined(group) if is_worth_it else None

    return _grouped(explorers, fit, join, choose)


def _grouped(
    explorers: Mapping[str, Explorer],
    fit: Callable[[Explorer, Explorer], bool],
    join: Callable[[Mapping[str, Explorer]], Explorer | None],
    choose: Callable[[Mapping[str, Explorer]], Mapping[str, Explorer]] = dict,
) -> dict[str, Explorer]:
    """The explorers, with those that fit to each other as one, if they can be joined.

    Args:
      explorers: By name.
      fit: Whether the second one belongs to the group of the first.
      join: Makes one of a group; None if that cannot be.
      choose: Those of a group that are to be joined.
    """
    left, found = dict(explorers), {}
    while left:
        name, first = next(iter(left.items()))
        group = {n: one for n, one in left.items() if n == name or fit(first, one)}
        group = choose(group)
        made = join(group)
        if made is None:
            found[name] = left.pop(name)
        else:
            members = made.members(name)
            found[f"{members[0]} and {len(members) - 1} more"] = made
            left = {n: one for n, one in left.items() if n not in group}
    return found


def _are_alike(first: Explorer, other: Explorer) -> bool:
    """Whether two explorers differ in the numbers of their optimizers alone."""
    if first.size is not None or other.size is not None:
        return False
    same = _have_same_functions(first, other)
    return same and bool(_template([first.tx, other.tx]))


def _have_same_functions(first: Explorer, other: Explorer) -> bool:
    """Whether two explorers have the same loss, and merge what it returns alike."""
    pairs = [(first.loss_fn, other.loss_fn), (first.merge_fn, other.merge_fn)]
    return all(
        ours is theirs or bool(ours and theirs and callbacks.same(ours, theirs))
        for ours, theirs in pairs
    )


def _joined(explorers: Mapping[str, Explorer]) -> Explorer | None:
    """Alike explorers as one; None if their numbers cannot be arrays."""
    first, *_ = explorers.values()
    template = _template([one.tx for one in explorers.values()])
    if first.size is not None or template is None:
        return None
    # The same optimizer several times differs in nothing.
    rows = template.numbers or [(0.0,) * len(explorers)]
    made = first._replace(
        name=None,
        grid={str(place): row for place, row in enumerate(rows)},
        factory=template,
        labels=tuple(explorers),
    )
    return made if _can_be_traced(made) else None


def _template(objects: Sequence[Any]) -> _Template | None:
    """What the objects have in common; None if they differ in more than floats."""
    numbers: list[tuple[float, ...]] = []
    try:
        return _Template(_maker(objects, numbers, frozenset()), numbers)
    except _UnlikeError:
        return None


def _maker(
    objects: Sequence[Any], numbers: list[tuple[float, ...]], within: frozenset[int]
) -> _Maker:
    """Makes one of the objects; appends the floats in which they differ.

    Args:
      objects: What stands in the same place of several optimizers.
      numbers: By place, the floats in which they differ.
      within: The functions that these are closures of, by ``id``.
    """
    first, kind = objects[0], type(objects[0])
    if all(one is first for one in objects):
        return lambda _: first
    if any(type(one) is not kind for one in objects):
        raise _UnlikeError
    if kind in (float, np.float64, np.float32):
        return _maker_of_numbers(objects, numbers)
    if isinstance(first, _PLAIN):
        if any(one != first for one in objects):
            raise _UnlikeError
        return lambda _: first

    def parts(get: Callable[[Any], Sequence[Any]]) -> Callable[[Any], list[Any]]:
        columns = [list(get(one)) for one in objects]
        if len({len(column) for column in columns}) > 1 or id(first) in within:
            raise _UnlikeError
        rows = zip(*columns, strict=True)
        makers = [_maker(row, numbers, within | {id(first)}) for row in rows]
        return lambda found: [make(found) for make in makers]

    if isinstance(first, tuple):
        of_tuple, build = parts(tuple), getattr(kind, "_make", kind)
        return lambda found: build(of_tuple(found))
    if kind is list:
        return parts(list)
    if kind is dict:
        keys = list(first)
        if any(list(one) != keys for one in objects):
            raise _UnlikeError
        of_dict = parts(lambda one: list(one.values()))
        return lambda found: dict(zip(keys, of_dict(found), strict=True))
    if kind is functools.partial:
        of_partial = parts(lambda one: (one.func, one.args, one.keywords))

        def make_partial(found: Any) -> Any:
            fn, args, keywords = of_partial(found)
            return functools.partial(fn, *args, **keywords)

        return make_partial
    if kind is types.FunctionType:
        if any(_code(one) != _code(first) for one in objects):
            raise _UnlikeError
        of_function = parts(_held)
        return lambda found: _with_closure(first, of_function(found))
    raise _UnlikeError


def _maker_of_numbers(
    objects: Sequence[Any], numbers: list[tuple[float, ...]]
) -> _Maker:
    """Makes a float: that of all objects, or one that is given by its place."""
    first = objects[0]
    if all(one == first for one in objects):
        return lambda _: first
    place = len(numbers)
    numbers.append(tuple(objects))
    return lambda found: found[place]


def _code(function: Any) -> Hashable:
    """What functions must have in common, beside what they hold."""
    return function.__code__, id(function.__globals__)


def _held(function: Any) -> Sequence[Any]:
    """The objects that a function holds."""
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as error:  # A cell that is not filled yet.
        raise _UnlikeError from error
    return function.__defaults__, function.__kwdefaults__, *cells


def _with_closure(function: Any, held: Sequence[Any]) -> Any:
    """The function that holds other objects."""
    defaults, by_keyword, *cells = held
    made = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        defaults,
        tuple(map(types.CellType, cells)),
    )
    made.__kwdefaults__ = by_keyword
    made.__dict__.update(function.__dict__)
    return made


def _can_be_traced(explorer: Explorer) -> bool:
    """Whether states and updates are the same where the numbers are arrays.

    Python cannot decide by an array, as some optimizers do by their numbers. One that
    cannot be tried here, such as one for parameters of a certain structure, is left
    alone.
    """
    params = {"w": jnp.zeros([3, 4]), "b": jnp.zeros([4])}

    def first_step(tx: optax.GradientTransformation) -> Any:
        state = tx.init(params)
        return state, tx.update(params, state, params)

    def of_member(row: jax.Array) -> Any:
        return first_step(explorer.member(row)[0])

    try:
        alone = jax.eval_shape(lambda: first_step(explorer.tx))
        stacked = jax.eval_shape(of_member, 0)
    except Exception:  # Whatever it is: apart, it raises where it is used.
        return False
    return trees.types(alone) == trees.types(stacked)
