"""Parameter mapping: where the arrays of a small model are in those of a larger one.

Every entry of a grown array is one of three: the old array's entry, an entry of the
freshly initialized array, or zero. So one mapping serves all trees that mirror the
parameters: stable parameters, branches, moments.
"""

import collections
import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey, keystr, tree_map_with_path
from jax.tree_util import tree_leaves_with_path as leaves_with_path

from optax_ev3._src.base import checks, sharding

# Of Flax's kernels the last axis is of outputs, the others are of inputs.
_KERNELS = "*kernel"

Path = tuple[Any, ...]  # Of a leaf in a tree: keys of JAX.


@dataclasses.dataclass(frozen=True)
class Growth:
    """Where the arrays of a small model are in those of a larger one.

    By default, an array of the large model continues the array of the small model that
    has the same path, and holds its entries first along every axis. The other entries,
    and arrays that are new, are as the large model was initialized, with one exception:
    in Flax's kernels, entries from new inputs to old outputs are zero. So wider layers
    do not change the outputs. They learn all the same: the zeros have gradients at
    once, the weights of the new units from the next step on.

    A path is the names on the way to an array, joined by ``/``, such as
    ``params/Dense_0/kernel`` or, of NNX, ``blocks/0/linear/kernel``. Patterns of whole
    paths are those of :mod:`fnmatch`, whose ``*`` stands for any characters, ``/`` too.

    Attributes:
      rename: From a path's part in the large model, one or more whole names, to what
        stood there in the small one, as ``{"Dense_3": "Dense_2"}`` where the last layer
        of three became the fourth.
      identity: Patterns of layers that are new and start as the identity: their arrays
        of two or more axes are the identity matrix (of convolutions, in the middle),
        the others zero. That preserves the function where their inputs pass the
        activation behind them unchanged, as what comes from a ReLU does.
      zero: Patterns of arrays that are new and start at zero: the last ones of a
        residual branch, such as the scale of its BatchNorm.
      inputs: From patterns to the axes of inputs, for arrays other than Flax's kernels,
        or where these have several axes of outputs, as attention's. The first pattern
        that matches counts.
      positions: From patterns to a mapping from axes to where the old entries are along
        them, as many increasing integers as there are old entries. The first pattern
        that matches counts here, too.

    Raises:
      TypeError: If an attribute is of the wrong kind.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import growth
      >>> old = {"kernel": jnp.ones([2, 1])}
      >>> fresh = {"kernel": jnp.full([3, 2], 7.0)}
      >>> print(growth.transplant(old, fresh)["kernel"])
      [[1. 7.]
       [1. 7.]
       [0. 7.]]

    References:
      Chen et al., `Net2Net <https://arxiv.org/abs/1511.05641>`_, 2016; Evci et al.,
      `GradMax <https://arxiv.org/abs/2201.05125>`_, 2022, on zeros behind new units.
    """

    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    identity: Sequence[str] = ()
    zero: Sequence[str] = ()
    inputs: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    positions: Mapping[str, Mapping[int, Sequence[int]]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        kinds = {"rename": str, "inputs": Sequence, "positions": Mapping}
        for name, kind in kinds.items():
            given = getattr(self, name)
            if not isinstance(given, Mapping):
                found = type(given).__name__
                raise TypeError(f"{name} must be a mapping, got {found}.")
            for key, value in given.items():
                fits = isinstance(value, kind)
                if not fits or isinstance(value, str) != (name == "rename"):
                    raise TypeError(
                        f"{name} maps {key!r} to {value!r}, expected a {kind.__name__}."
                    )
        for name in ("identity", "zero"):
            given = getattr(self, name)
            patterns = isinstance(given, Iterable) and not isinstance(given, str)
            if not patterns or not all(isinstance(x, str) for x in given):
                raise TypeError(f"{name} must be a list of patterns, got {given!r}.")


def transplant(old: Any, fresh: Any, growth: Growth | None = None) -> Any:
    """Puts the arrays of a small model into those of a larger one.

    It is for trees that no transformation sees, such as statistics that are kept apart;
    :func:`grow` does the same for parameters and state.

    Args:
      old: The small model's arrays, a tree.
      fresh: The large model's, freshly initialized.
      growth: Where the small model's arrays are in the larger one.

    Returns:
      A tree like ``fresh``, with its dtypes.

    Raises:
      TypeError: If ``growth`` is no :class:`Growth`.
      ValueError: If the growth does not fit, as for :func:`grow`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_ev3 import growth
      >>> mean = growth.transplant({"mean": jnp.ones([2])}, {"mean": jnp.zeros([4])})
      >>> print(mean["mean"])
      [1. 1. 0. 0.]
    """
    return apply(array_mappings(old, fresh, growth), old, fresh)


class ArrayMapping(NamedTuple):
    """Where an array of the small model is in one of the large model.

    Attributes:
      old: Path of the array in the small model; None if it is new.
      shapes: Of the array in the small and the large model.
      positions: For each axis, where the old entries are; None if all stay.
      inputs: Axes of inputs.
      start: ``"identity"``, ``"zero"`` or ``"fresh"``: how a new array begins.
    """

    old: Any
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    positions: tuple[np.ndarray, ...] | None
    inputs: frozenset[int]
    start: str

    def put(self, old: Any, into: Any) -> jax.Array:
        """``into`` with the old entries; both may have more axes in front."""
        if self.positions is None:
            return jnp.array(old, into.dtype)
        where = (..., *np.ix_(*self.positions))
        whole, old = _whole(into), _whole(old)
        return _spread(whole.at[where].set(jnp.asarray(old, whole.dtype)), into)

    def begin(self, fresh: Any) -> jax.Array:
        """The large model's array before the old entries come in."""
        return _spread(self._begun(_whole(fresh)), fresh)

    def _begun(self, fresh: jax.Array) -> jax.Array:
        """The same of arrays that are not spread over devices."""
        fresh = jnp.array(fresh, jnp.result_type(fresh))
        if self.start == "zero" or (self.start == "identity" and fresh.ndim < 2):
            return jnp.zeros_like(fresh)
        if self.start == "identity":
            middle = tuple((size - 1) // 2 for size in fresh.shape[:-2])
            eye = jnp.eye(fresh.shape[-1], dtype=fresh.dtype)
            return jnp.zeros_like(fresh).at[middle].set(eye)
        if self.positions is None or not self.inputs:
            return fresh
        # From any input to the old outputs.
        where = np.ix_(
            *(
                np.arange(size) if axis in self.inputs else kept
                for axis, (size, kept) in enumerate(
                    zip(fresh.shape, self.positions, strict=True)
                )
            )
        )
        return fresh.at[where].set(0)


def _whole(leaf: Any) -> jax.Array:
    """The array on all of its devices: types that say how it is spread restrict us."""
    leaf = jnp.asarray(leaf)
    if not sharding.is_explicit(leaf):
        return leaf
    return jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec()))


def _spread(leaf: jax.Array, like: Any) -> jax.Array:
    """The array spread over devices as another one is by its type."""
    return jax.device_put(leaf, like.sharding) if sharding.is_explicit(like) else leaf


def array_mappings(
    old: Any, fresh: Any, growth: Growth | None
) -> dict[Any, ArrayMapping]:
    """By path in the large model, where its arrays come from; raises if one is lost."""
    growth = Growth() if growth is None else growth
    if not isinstance(growth, Growth):
        raise TypeError(f"growth must be a Growth, got {type(growth).__name__}.")
    olds = {path_name(path): (path, leaf) for path, leaf in leaves_with_path(old)}
    news = {path_name(path): (path, leaf) for path, leaf in leaves_with_path(fresh)}
    sources = _sources(growth.rename, olds, news)
    _check_patterns(growth, news)
    return {
        path: _mapping_of_old(name, jnp.shape(leaf), *olds[sources[name]], growth)
        if name in sources
        else _mapping_of_new(name, jnp.shape(leaf), growth)
        for name, (path, leaf) in news.items()
    }


def _mapping_of_new(name: str, shape: tuple[int, ...], growth: Growth) -> ArrayMapping:
    """The mapping of an array that the small model doesn't have."""
    if _matching(name, growth.positions):
        raise ValueError(f"positions: the small model has nothing that becomes {name}.")
    start = _start(name, growth)
    if start == "identity" and len(shape) > 1 and shape[-1] != shape[-2]:
        raise ValueError(
            f"{name} cannot start as the identity: as many inputs as outputs are "
            f"needed, its shape is {shape}."
        )
    return ArrayMapping(None, ((), shape), None, frozenset(), start)


def _mapping_of_old(
    name: str, shape: tuple[int, ...], path: Path, leaf: Any, growth: Growth
) -> ArrayMapping:
    """The mapping of an array that continues one of the small model."""
    start = _start(name, growth)
    if start != "fresh":
        raise ValueError(
            f"{name} is to start as {start}, but it is not new: the small model has it "
            f"as {path_name(path)}."
        )
    inputs = _matching(name, growth.inputs)
    if inputs is None and fnmatch.fnmatchcase(name, _KERNELS):
        inputs = range(len(shape) - 1)
    where = _matching(name, growth.positions) or {}
    return ArrayMapping(
        path,
        (jnp.shape(leaf), shape),
        _positions(name, jnp.shape(leaf), shape, where),
        frozenset(_axis(axis, len(shape), name, "inputs") for axis in inputs or ()),
        start,
    )


def _start(name: str, growth: Growth) -> str:
    """How an array begins where nothing else is put into it."""
    for start, patterns in (("zero", growth.zero), ("identity", _layers(growth))):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            return start
    return "fresh"


def _layers(growth: Growth) -> list[str]:
    """Patterns of the arrays in layers that start as the identity."""
    return [f"{pattern}/*" for pattern in growth.identity]


def _matching(name: str, patterns: Mapping[str, Any]) -> Any:
    """What the first pattern that matches stands for; None without one."""
    found = (v for p, v in patterns.items() if fnmatch.fnmatchcase(name, p))
    return next(found, None)


def _check_patterns(growth: Growth, names: Iterable[str]) -> None:
    """Raises unless every pattern matches something."""
    wanted = [*_layers(growth), *growth.zero, *growth.inputs, *growth.positions]
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"no array of the large model matches {pattern!r}; it has "
                f"{_few(names)}."
            )


def _sources(
    rename: Mapping[str, str], olds: Iterable[str], news: Iterable[str]
) -> dict[str, str]:
    """By name in the large model, the name in the small one; new arrays have none."""
    for new, old in rename.items():
        for part, names, which in ((new, news, "large"), (old, olds, "small")):
            if not any(f"/{part}/" in f"/{name}/" for name in names):
                raise ValueError(
                    f"rename has {part!r}, not found in the {which} model."
                )
    renamed = {name: _renamed(name, rename) for name in news}
    sources = {new: old for new, old in renamed.items() if new != old and old in olds}
    # Where something else has taken its name along, an array is new.
    moved = {*sources, *sources.values()}
    sources |= {new: new for new in renamed if new in olds and new not in moved}
    twice = [old for old, n in collections.Counter(sources.values()).items() if n > 1]
    if twice:
        into = [new for new, old in sources.items() if old == twice[0]]
        raise ValueError(
            f"{twice[0]} of the small model cannot become both {into[0]} and {into[1]}."
        )
    lost = [name for name in olds if name not in sources.values()]
    if lost:
        raise ValueError(
            f"growth would lose {_few(lost)}: the large model has nothing at that "
            f"path; rename says what something at another path was."
        )
    return sources


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    """The path in the small model; the first entry that fits counts."""
    for new, old in rename.items():
        if f"/{new}/" in f"/{name}/":
            return f"/{name}/".replace(f"/{new}/", f"/{old}/", 1).strip("/")
    return name


def _positions(
    name: str,
    old: tuple[int, ...],
    new: tuple[int, ...],
    where: Mapping[int, Sequence[int]],
) -> tuple[np.ndarray, ...] | None:
    """For each axis, where the old entries go; None if the array stays as it is."""
    if len(old) != len(new) or any(o > n for o, n in zip(old, new, strict=True)):
        raise ValueError(
            f"growth cannot put an array of shape {old} into {name}, of shape {new}: "
            f"it needs as many axes, none of them shorter."
        )
    kept = [np.arange(size) for size in old]
    for axis, places in where.items():
        places = np.asarray(places)
        axis = _axis(axis, len(new), name, "positions")
        fits = places.shape == (old[axis],) and np.issubdtype(places.dtype, np.integer)
        if not fits or (places.size and not 0 <= places[0] <= places[-1] < new[axis]):
            raise ValueError(
                f"positions along axis {axis} of {name} must be {old[axis]} integers "
                f"from 0 to {new[axis] - 1}, got {places}."
            )
        if (np.diff(places) <= 0).any():
            raise ValueError(
                f"positions along axis {axis} of {name} must increase, got {places}."
            )
        kept[axis] = places
    return None if old == new else tuple(kept)


def _axis(axis: Any, count: int, name: str, role: str) -> int:
    """The axis, counted from the front."""
    axis = checks.integer(axis, f"an axis in {role}")
    if not -count <= axis < count:
        raise ValueError(f"{role}: {name} has {count} axes, there is no axis {axis}.")
    return axis % count


def apply(mappings: Mapping[Any, ArrayMapping], old: Any, fresh: Any) -> Any:
    """The parameters of the large model, in buffers of their own."""
    leaves = dict(leaves_with_path(old))

    def make(path: Path, leaf: Any) -> jax.Array:
        mapping = mappings[path]
        begun = mapping.begin(leaf)
        return begun if mapping.old is None else mapping.put(leaves[mapping.old], begun)

    return tree_map_with_path(make, fresh)


def path_name(path: Any) -> str:
    """A path as text; without the attribute that holds the array of an NNX variable."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return keystr(path, simple=True, separator="/")


def _few(names: Any) -> str:
    """The first few names."""
    names = [*names]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
