"""Explore: the explorers, and how many of them are made at once."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from optax_ev3._src.base import callbacks as named
from optax_ev3._src.base import control, layout, sharding, trees
from optax_ev3._src.base.select import Stacked

# What parts of names consist of.
_PART = re.compile(r"[\w.\- ]+")


class Explorer(NamedTuple):
    """An optimizer that proposes updates, see :func:`explorer`.

    Attributes:
      tx: The inner optimizer.
      loss_fn: What it differentiates in place of the caller's gradients, or None.
      name: How it is called in summaries, or None for a name by its position.
      merge_fn: How auxiliary outputs of the loss become part of the parameters.
      grid: For a :func:`sweep`, G numbers by name; None for a single explorer.
      factory: For a sweep, makes the optimizer from one number of each name.
      space: For a group that evolves, the range of each number; the grid is then where
        they begin.
      labels: Where several explorers are stacked, their names.
      forms: Where unlike ones are, what their inner states consist of, by parameters.
      axis: The mesh axis over which the members of a sweep are spread, or None.

    Examples:
      >>> import optax, optax_ev3
      >>> sweep = optax_ev3.sweep(optax.sgd, learning_rate=[0.1, 0.3])
      >>> isinstance(sweep, optax_ev3.Explorer), sweep.size
      (True, 2)
    """

    tx: optax.GradientTransformation
    loss_fn: Callable[..., Any] | None = None
    name: str | None = None
    merge_fn: Callable[[Any, Any], Any] | None = None
    grid: Mapping[str, tuple[float, ...]] | None = None
    factory: Callable[..., optax.GradientTransformation] | None = None
    space: Mapping[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    forms: Callable[[Any], list[Any]] | None = None
    axis: str | None = None

    @property
    def size(self) -> int | None:
        """How many explorers a sweep holds; None for a single one."""
        return None if self.grid is None else len(next(iter(self.grid.values())))

    @property
    def rows(self) -> range:
        """The places of its members; one for a single explorer."""
        return range(1 if self.size is None else self.size)

    @property
    def first(self) -> "Explorer":
        """The first member of a sweep, alone."""
        return Explorer(self.tx, self.loss_fn, merge_fn=self.merge_fn, forms=self.forms)

    def members(self, name: str) -> list[str]:
        """Names of all explorers that this one, called ``name``, stands for."""
        if self.labels is not None:
            return list(self.labels)
        if self.grid is None:
            return [name]
        if self.space is not None:
            return [f"{name}/{i}" for i in range(self.size or 0)]
        rows = zip(*self.grid.values(), strict=True)
        labels = [
            "/".join(f"{k}_{_text(v)}" for k, v in zip(self.grid, row, strict=True))
            for row in rows
        ]
        return [f"{name}/{label}" for label in labels]

    def each(
        self,
        fn: Callable[..., Any],
        *args: Any,
        hyperparams: Any = None,
        at_once: bool = True,
    ) -> Any:
        """``fn(tx, hyperparams, *args)``; for a sweep, of every member, args stacked.

        Args:
          fn: What to do with an optimizer and its numbers by name.
          *args: More arguments.
          hyperparams: Numbers ``[G]`` by name; default: the grid.
          at_once: Whether ``fn`` is vectorized over members, not called in a loop.
        """
        if self.size is None:
            return fn(self.tx, {}, *args)

        def one(row: jax.Array, *args: Any):
            return fn(*self.member(row, hyperparams), *args)

        rows = jnp.arange(self.size), *args
        if control.is_traced(rows, hyperparams):
            if at_once or self.axis is not None:
                return self.at_once(one)(*rows)
            return control.each_row(lambda row: one(*row), rows)
        return control.stacked(one, *rows)

    def at_once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` of all members of a sweep at once, each device with its own."""

        def with_choices(*args: Any) -> Any:
            with control.members_at_once():
                return fn(*args)

        def with_their_own(*args: Any) -> Any:
            mesh = sharding.current_mesh()
            if self.axis is not None and mesh is not None:
                names = ", ".join(self.members(self.name or "of a sweep"))
                sharding.check_axis(self.axis, self.size or 0, mesh, names)
            args = sharding.leading_alike(*args)
            return jax.vmap(with_choices, spmd_axis_name=self.axis)(*args)

        return with_their_own

    def stack(self, tree: Any, paused: Any = None) -> Stacked:
        """What all members have of a kind."""
        return Stacked(tree, self.size, paused, axis=self.axis)

    def member(
        self, row: jax.Array, hyperparams: Any = None
    ) -> tuple[optax.GradientTransformation, Any]:
        """Of a sweep the optimizer in this row, and its numbers by name."""
        if hyperparams:
            # A sum, as rows may be on several devices, and each has all numbers.
            is_row = jnp.arange(self.size or 0) == row
            numbers = {k: jnp.where(is_row, v, 0).sum() for k, v in hyperparams.items()}
        else:
            numbers = {k: _choice(row, v) for k, v in (self.grid or {}).items()}
        return self._made(numbers), numbers

    def _made(self, numbers: Mapping[str, Any]) -> optax.GradientTransformation:
        """The optimizer with these numbers."""
        if self.factory is None:
            return self.tx
        own = {k: v for k, v in numbers.items() if _takes(self.factory, k)}
        return self.factory(**own)


def _choice(row: jax.Array, numbers: Sequence[float]) -> jax.Array:
    """One of the numbers, weakly typed as they are: bfloat16 stays bfloat16."""
    cases = [jnp.asarray(number) for number in numbers]
    return lax.select_n(row, *cases) if len(cases) > 1 else cases[0]


def explorer(
    tx: optax.GradientTransformation | Explorer,
    loss_fn: Callable[..., Any] | None = None,
    name: str | None = None,
    *,
    merge_fn: Callable[[Any, Any], Any] | None = None,
) -> Explorer:
    """An inner optimizer with a loss or a name of its own.

    Args:
      tx: Any optax transformation, or a :func:`sweep`.
      loss_fn: ``loss_fn(params, **named)`` -> real scalar, or ``(scalar, aux)`` where
        there is a ``merge_fn``. The explorer then takes the gradient of this loss, and
        not the caller's; its named arguments come from the extra arguments of
        ``update``, and ``key`` is a PRNG key of the call, the same for all explorers.
        Default: the ``loss_fn`` of :func:`optax_ev3.ev3` where explorers take gradients
        of their own, else the caller's gradients.
      name: How the explorer is called in :func:`optax_ev3.summary`: letters, digits,
        ``_``, ``-``, ``.``, spaces, and ``/`` between parts, which all loggers take.
      merge_fn: ``merge_fn(params, aux)`` -> params that contain what the loss computed
        on the side, such as BatchNorm statistics; applied after each step. For a step
        with the caller's gradients, ``aux`` is the extra argument ``aux`` of
        ``update``.

    Returns:
      An explorer, for the ``inner`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``tx`` is no transformation, or a function not callable.

    Examples:
      >>> import optax, optax_ev3
      >>> sgd = optax_ev3.explorer(optax.sgd(0.1), name="sgd")
      >>> sgd.name
      'sgd'
    """
    what = "an explorer" if name is None else f"explorer {name!r}"
    made = tx if isinstance(tx, Explorer) else Explorer(tx)
    inner = made.tx
    is_transformation = callable(getattr(inner, "init", None)) and callable(
        getattr(inner, "update", None)
    )
    if not is_transformation:
        raise TypeError(
            f"{what} must be an optax.GradientTransformation, such as "
            f"optax.adam(1e-3), got {inner!r} of type {type(inner).__name__}."
        )
    if loss_fn is not None:
        named.check_callback(loss_fn, f"loss_fn of {what}")
    if merge_fn is not None and not callable(merge_fn):
        raise TypeError(f"merge_fn of {what} must be callable, got {merge_fn!r}.")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"the name of an explorer must be a string, got {name!r}.")
    changes = {"loss_fn": loss_fn, "name": name, "merge_fn": merge_fn}
    return made._replace(**{k: v for k, v in changes.items() if v is not None})


def product(
    optimizers: Sequence[Any] | Mapping[str, Any],
    losses: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]],
) -> list[Explorer]:
    """The paper's grid: every loss with every optimizer.

    Args:
      optimizers: Optax transformations or explorers, a sequence or a mapping from
        names.
      losses: Loss functions, a sequence or a mapping from names, see
        :func:`explorer`. Without names they are called as the functions are.

    Returns:
      Explorers, the first loss with all optimizers, then the second, for the ``inner``
      argument of :func:`optax_ev3.ev3`. They are called OPTIMIZER/LOSS.

    Raises:
      TypeError: If an optimizer is no transformation or a loss not callable.
      ValueError: If there are no optimizers or no losses.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> def l1(w):
      ...     return jnp.abs(w)
      >>> def l2(w):
      ...     return w**2
      >>> grid = optax_ev3.product({"sgd": optax.sgd(0.1)}, [l1, l2])
      >>> [one.name for one in grid]
      ['sgd/l1', 'sgd/l2']

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    inner = collect(optimizers)
    if not isinstance(losses, Mapping):
        losses = list(losses)
        names = [getattr(f, "__name__", "loss") for f in losses]
        numbered = len(set(names)) < len(names) or "<lambda>" in names
        keys = [f"loss_{i}" for i in range(len(names))] if numbered else names
        losses = dict(zip(keys, losses, strict=True))
    if not losses:
        raise ValueError("product needs at least one loss, got none.")
    return [
        explorer(one, loss, f"{name}/{label}")
        for label, loss in losses.items()
        for name, one in inner.items()
    ]


def sweep(
    factory: Callable[..., optax.GradientTransformation], **grid: Sequence[float]
) -> Explorer:
    """Explorers of one structure that differ in numbers, batched into one.

    All combinations of the numbers are explored. Compile time does not grow with their
    number; their states, and their updates in one-step rounds, take the memory of as
    many copies. Where branches or losses of their own are stepped, it is one member
    after another, with the memory for the activations of one; else all by ``jax.vmap``.

    Args:
      factory: Makes an optax transformation from one number of each name, as
        keywords. The numbers are traced float32 scalars, weakly typed like Python's.
      **grid: By name, the numbers, a sequence of floats.

    Returns:
      An explorer for the ``inner`` argument of :func:`optax_ev3.ev3`, that counts as
      many. They are called NAME/learning_rate_0.001, where NAME is the key in
      ``inner``, or else the name of the factory.

    Raises:
      TypeError: If ``factory`` does not make optax transformations.
      ValueError: If a grid is empty, or the states of two members differ in structure
        or shapes.

    Examples:
      >>> import optax, optax_ev3
      >>> adams = optax_ev3.sweep(optax.adam, learning_rate=[1e-4, 1e-3], b1=[0.9])
      >>> adams.members("adam")
      ['adam/learning_rate_0.0001/b1_0.9', 'adam/learning_rate_0.001/b1_0.9']
    """
    if not callable(factory):
        raise TypeError(f"sweep needs a factory of optimizers, got {factory!r}.")
    if not grid:
        raise ValueError("sweep needs numbers, such as learning_rate=[1e-3, 1e-2].")
    for name, values in grid.items():
        if np.ndim(values) != 1 or len(values) == 0:
            raise ValueError(
                f"sweep needs a sequence of numbers for {name}, got {values!r}."
            )
        if not _takes(factory, name):
            raise TypeError(
                f"the factory of a sweep must have a free argument {name!r}; what "
                f"functools.partial has bound is not free. It takes "
                f"{sorted(named.free(factory, 0).names) or 'no argument'}."
            )
    rows = list(itertools.product(*(np.asarray(v).tolist() for v in grid.values())))
    columns = dict(zip(grid, zip(*rows, strict=True), strict=True))
    first, *others = [
        _abstract_state(factory, dict(zip(grid, row, strict=True))) for row in rows
    ]
    for row, other in zip(rows[1:], others, strict=True):
        if other != first:
            raise ValueError(
                f"the members of a sweep must have states of one structure: that of "
                f"{dict(zip(grid, row, strict=True))} is {other}, that of "
                f"{dict(zip(grid, rows[0], strict=True))} is {first}."
            )
    name = getattr(factory, "__name__", None)
    example = factory(**dict(zip(grid, rows[0], strict=True)))
    return Explorer(
        example,
        name=None if name == "<lambda>" else name,
        grid=columns,
        factory=factory,
    )


def group(
    factory: Callable[..., optax.GradientTransformation],
    grid: Mapping[str, tuple[float, ...]],
    space: Mapping[str, Any],
) -> Explorer:
    """Explorers whose numbers move within ``space``, beginning on the grid."""
    first = {k: v[0] for k, v in grid.items() if _takes(factory, k)}
    name = getattr(factory, "__name__", None)
    made = explorer(factory(**first), name=None if name == "<lambda>" else name)
    return made._replace(grid=grid, factory=factory, space=space)


def _takes(factory: Callable[..., Any] | None, name: str) -> bool:
    """Whether a factory takes a number of this name."""
    return factory is not None and named.free(factory, 0).takes(name)


def check_spaces(explorers: Mapping[str, Explorer]) -> None:
    """Raises unless somebody takes every hyperparameter."""
    for name, one in explorers.items():
        for wanted in one.space or ():
            by_name = set()
            if one.loss_fn is not None:
                by_name = named.free(one.loss_fn, 1).names
            if not (_takes(one.factory, wanted) or wanted in by_name):
                raise ValueError(
                    f"nobody takes the hyperparameter {wanted!r} of explorer {name!r}: "
                    f"neither its factory nor a loss_fn of its own has a free argument "
                    f"of this name (what functools.partial has bound is not free). "
                    f"Give it one: explorer(evolve(...), loss_fn)."
                )


def _abstract_state(factory: Any, numbers: Any):
    """Structure, shapes and dtypes of the state for parameters of two shapes."""
    made = explorer(factory(**numbers)).tx
    probe = {"w": jnp.zeros([3, 4]), "b": jnp.zeros([4])}
    return trees.types(jax.eval_shape(made.init, probe))


def collect(inner: Sequence[Any] | Mapping[str, Any]) -> dict[str, Explorer]:
    """Checks the ``inner`` argument and brings it to explorers by name, in order."""
    if isinstance(inner, optax.GradientTransformation | Explorer):
        raise TypeError(
            "inner must be a sequence or a mapping of explorers, got a single "
            "transformation: write inner=[...] around it."
        )
    if isinstance(inner, Mapping):
        items = [(name, explorer(value, name=name)) for name, value in inner.items()]
    elif isinstance(inner, Sequence) and not isinstance(inner, str):
        made = [explorer(value) for value in inner]
        items = [(e.name or f"explorer_{i}", e) for i, e in enumerate(made)]
    else:
        raise TypeError(
            f"inner must be a sequence or a mapping of explorers, such as a list, got "
            f"{type(inner).__name__}."
        )
    if not items:
        raise ValueError("inner must hold at least one explorer, got none.")
    check_names([name for name, _ in items])
    return dict(items)


def check_names(names: Sequence[str]) -> None:
    """Raises unless names are different, not reserved, and such as loggers take."""
    for name in names:
        check_characters(name, "an explorer")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"explorers must have different names, got twice: {repeated}.")
    reserved = sorted({layout.CURRENT, layout.STABLE} & set(names))
    if reserved:
        raise ValueError(
            f"explorers cannot be named {reserved}: candidates that are always there "
            f"have these names."
        )


def check_characters(name: str, what: str) -> None:
    """Raises unless all loggers take the name: MLflow and TensorBoard, as a path."""
    if not all(_PART.fullmatch(x) and x.strip(".") for x in name.split("/")):
        raise ValueError(
            f"the name of {what} must consist of letters, digits, '_', '-', '.' and "
            f"spaces, in parts with '/' between them, got {name!r}."
        )


def _text(number: float) -> str:
    """A number as a part of a name."""
    return f"{number:.6g}".replace("e+", "e")


def layout_of(
    explorers: Mapping[str, Explorer], prefixes: Sequence[str] = ()
) -> layout.Layout:
    """The candidates that there are; raises on names that are used twice."""
    found = layout.Layout(
        members={name: one.members(name) for name, one in explorers.items()},
        single={name: one.size is None for name, one in explorers.items()},
        prefixes=tuple(prefixes),
    )
    check_names(found.names[: found.proposals])
    return found
