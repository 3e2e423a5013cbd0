"""Growth: moves parameters and the optimizer's state to a larger model."""

import collections
import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, tree_map_with_path
from jax.tree_util import tree_leaves_with_path as leaves_with_path

from optax_ev3._src.applications import parameter_mapping
from optax_ev3._src.applications.parameter_mapping import ArrayMapping, Growth, Path
from optax_ev3._src.base.states import EV3State

_log = logging.getLogger("optax_ev3")


class Grown(NamedTuple):
    """What :func:`grow` returns.

    Attributes:
      params: Parameters of the large model.
      state: State of its transformation.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from optax_ev3 import growth
      >>> tx, small, large = optax.adam(0.1), jnp.ones([2]), jnp.zeros([3])
      >>> grown = growth.grow(tx, tx.init(small), small, large)
      >>> print(grown.params, grown.state[0].mu.shape)
      [1. 1. 0.] (3,)
    """

    params: Any
    state: Any


def grow(
    tx: Any,
    state: Any,
    params: Any,
    fresh: Any,
    growth: Growth | None = None,
    *,
    check: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None,
    tolerance: float = 1e-5,
) -> Grown:
    """Moves parameters and the optimizer's state to a larger model.

    Every array in the state that mirrors a parameter grows as that parameter does:
    stable parameters, branches, averages and the inner optimizers' moments. Moments of
    kept weights stay; those of new weights are as ``tx.init`` makes them, mostly zero.
    Where an optimizer keeps other shapes, such as factored moments, arrays that change
    their shape are initialized again. Everything else stays as it is, in the middle of
    a round too: counts, history, the rule's state, evolved hyperparameters. Only
    :func:`optax_ev3.should_grow` and :func:`optax_ev3.stalled` count rounds from the
    growth on.

    The logger ``optax_ev3`` gets one line about it, at level INFO. Call this function
    outside ``jit``; the step of the larger model then compiles once.

    Args:
      tx: The transformation of the larger model, with as many explorers and settings as
        that of the smaller one; any other optax transformation as well.
      state: The state of the smaller model's transformation.
      params: The smaller model's parameters; for Linen, all variables that the
        transformation sees, those of BatchNorm too.
      fresh: The larger model's, freshly initialized: a tree of arrays.
      growth: Where the smaller model's arrays are in the larger one.
      check: Two functions of parameters, the smaller and the larger model's, to outputs
        on some examples, trees of arrays of the same shapes.
      tolerance: How far the outputs may be apart: the largest difference in an array
        over its largest absolute value.

    Returns:
      The larger model's parameters and state.

    Raises:
      TypeError: If ``growth`` or ``check`` is of the wrong kind.
      ValueError: If the growth does not fit: if an old array would be lost, cut or has
        another number of axes, if a pattern matches nothing, if ``state`` is that of
        other explorers or another history, or if the outputs differ.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import growth
      >>> def init(width):
      ...     make = jax.random.normal
      ...     return {
      ...         "hidden": {"kernel": make(jax.random.key(0), [2, width])},
      ...         "head": {"kernel": make(jax.random.key(1), [width, 3])},
      ...     }
      >>> def apply(params, x=jnp.ones([4, 2])):
      ...     return (
      ...         jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
      ...     )
      >>> tx = optax_ev3.ev3([optax.adam(0.1)], lambda p: -(apply(p) ** 2).mean(1))
      >>> params = init(4)
      >>> state = tx.init(params)
      >>> params, state = growth.grow(tx, state, params, init(8), check=(apply, apply))
      >>> params["head"]["kernel"].shape
      (8, 3)
    """
    mappings = parameter_mapping.array_mappings(params, fresh, growth)
    larger = parameter_mapping.apply(mappings, params, fresh)
    moved = "not checked"
    if check is not None:
        moved = f"{_checked(check, params, larger, tolerance):.1e}, relative"
    fresh_state = tx.init(larger)
    grown = take_along(mappings, state, fresh_state, progress(fresh_state))
    report(mappings, moved)
    return Grown(larger, grown)


def progress(state: Any) -> set[str]:
    """The paths of the counters of rounds without progress, in states of ev3."""

    def is_state(node: Any) -> bool:
        return isinstance(node, EV3State)

    return {
        parameter_mapping.path_name((*path, GetAttrKey("history"), GetAttrKey("since")))
        for path, node in leaves_with_path(state, is_leaf=is_state)
        if is_state(node)
    }


def take_along(
    mappings: Mapping[Any, ArrayMapping],
    state: Any,
    fresh: Any,
    counters: Container[str],
) -> Any:
    """The larger model's state, with all that the smaller model's state holds.

    Args:
      mappings: Where each parameter comes from.
      state: The state of the smaller model's transformation.
      fresh: The initial state of the larger model's transformation.
      counters: The paths of counters that start from zero, see :func:`progress`.
    """
    leaves = dict(leaves_with_path(state))
    owners = _owners(mappings, [path for path, _ in leaves_with_path(fresh)], leaves)
    used = set()

    def find(path: Path) -> Any:
        used.add(path)
        return leaves.get(path)

    def take(path: Path, new: Any) -> Any:
        if parameter_mapping.path_name(path) in counters:
            # Rounds without progress count anew.
            return jnp.zeros_like(_same(path, find(path), new))
        suffix = owners.get(path)
        if suffix is None:
            return _same(path, find(path), new)
        mapping = mappings[suffix]
        if mapping.old is None:
            return new
        old = find((*path[: len(path) - len(suffix)], *mapping.old))
        if old is None:
            return new
        lead = old.shape[: max(0, old.ndim - len(mapping.shapes[0]))]
        if (old.shape, new.shape) == tuple(lead + shape for shape in mapping.shapes):
            return mapping.put(old, new)
        return old if old.shape == new.shape else new

    # Copies, so that all can be donated.
    grown = tree_map_with_path(
        lambda path, new: jnp.array(take(path, new), new.dtype), fresh
    )
    for path, leaf in leaves.items():
        if path not in used:
            _same(path, leaf, None)  # Raises: it would be lost.
    return grown


def _owners(
    mappings: Mapping[Any, ArrayMapping],
    paths: Sequence[Any],
    before: Mapping[Any, Any],
) -> dict[Any, Any]:
    """By path in the state, the path of the parameter that an array mirrors.

    Explorers and hyperparameters may have the names of parameters. So where several
    parameters fit, it is the one of the most complete copy of the parameters' tree. An
    array that was in the state ``before`` mirrors no new parameter.
    """
    known = {mapping.old for mapping in mappings.values()}
    fits = {
        path: [
            path[i:]
            for i in range(len(path) + 1)
            if path[i:] in mappings and (path[i:] in known or path not in before)
        ]
        for path in paths
    }
    complete = collections.Counter(
        path[: len(path) - len(end)] for path, ends in fits.items() for end in ends
    )
    return {
        path: max(ends, key=lambda e: (complete[path[: len(path) - len(e)]], len(e)))
        for path, ends in fits.items()
        if ends
    }


def _same(path: Any, old: Any, new: Any) -> Any:
    """The old array, which mirrors no parameter; raises unless it fits the new one."""
    found, expected = (
        "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
        for leaf in (old, new)
    )
    if found != expected:
        raise ValueError(
            f"the state does not fit the larger model's transformation, which needs "
            f"the same explorers and settings: at {parameter_mapping.path_name(path)} "
            f"it has {found}, expected {expected}."
        )
    return old


def _checked(check: Any, params: Any, larger: Any, tolerance: float) -> float:
    """The relative difference of the outputs; raises if it is too large."""
    pair = isinstance(check, Sequence) and len(check) == 2
    if not pair or not all(map(callable, check)):
        raise TypeError(
            f"check must be two functions of parameters, the smaller and the larger "
            f"model's, got {check!r}."
        )
    before, after = check[0](params), check[1](larger)
    kinds = [
        f"{[*map(np.shape, jax.tree.leaves(tree))]} in {jax.tree.structure(tree)}"
        for tree in (before, after)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the outputs to check must have the same structure and shapes, got "
            f"{kinds[0]} before and {kinds[1]} after growth."
        )
    worst = 0.0
    for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        largest = np.abs(one).max(initial=0)
        with np.errstate(invalid="ignore"):
            apart = np.abs(one - other).max(initial=0) / (largest or 1)
        worst = max(worst, float(apart), key=_nan_last)
    if not worst <= tolerance:
        raise ValueError(
            f"growth would change the outputs by {worst:.1e} of the largest, more than "
            f"the tolerance {tolerance:.1e}: new layers need identity or zero."
        )
    return worst


def _nan_last(number: float) -> float:
    return math.inf if math.isnan(number) else number


def report(mappings: Mapping[Any, ArrayMapping], moved: str = "not checked") -> None:
    """Logs in one line what has grown."""
    arrays = mappings.values()
    new = sum(one.old is None for one in arrays)
    wider = sum(one.positions is not None for one in arrays)
    before = sum(math.prod(one.shapes[0]) for one in arrays if one.old is not None)
    after = sum(math.prod(one.shapes[1]) for one in arrays)
    _log.info(
        f"grew from {before:,} to {after:,} numbers: of {len(arrays)} arrays {new} are "
        f"new and {wider} larger; change of the outputs: {moved}"
    )
