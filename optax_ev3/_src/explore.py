"""Explore: explorers, and the parameter updates that they propose."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src import memory_bound, named, trees

# Names of the two candidates that are always there.
CURRENT, STABLE = "current", "stable"

# What optax's optimizers ask for beyond the gradient; all follow from a loss.
_FROM_LOSS = ("value", "grad", "value_fn", "grad_fn", "obj_fn")


class Explorer(NamedTuple):
    """An optimizer that proposes updates, see :func:`explorer`.

    Attributes:
      tx: The inner optimizer.
      loss_fn: What it differentiates in place of the caller's gradients, or None.
      name: How it is called in summaries, or None for a name by its position.
    """

    tx: optax.GradientTransformation
    loss_fn: Callable[..., Any] | None = None
    name: str | None = None


class Proposals(NamedTuple):
    """What the explorers of a round propose.

    Attributes:
      updates: One tree for each explorer, with the structure and dtypes of params.
      opt_states: By name, the inner states; unchanged where the update is not finite.
      finite: ``[K]`` bool, whether each update is finite.
      uphill: ``[K]`` bool, whether each update raises the loss to first order.
    """

    updates: list[optax.Updates]
    opt_states: dict[str, Any]
    finite: jax.Array
    uphill: jax.Array


def explorer(
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Any] | None = None,
    name: str | None = None,
) -> Explorer:
    """An inner optimizer with a loss or a name of its own.

    Args:
      tx: Any optax transformation.
      loss_fn: ``loss_fn(params, **named)`` -> real scalar. The explorer then takes
        the gradient of this loss, and not the caller's; its named arguments come
        from the extra arguments of ``update``. Default: the caller's gradients.
      name: How the explorer is called in :func:`optax_ev3.summary`.

    Returns:
      An explorer, for the ``inner`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``tx`` is no transformation, or ``loss_fn`` not callable.

    Examples:
      >>> import optax, optax_ev3
      >>> sgd = optax_ev3.explorer(optax.sgd(0.1), name="sgd")
      >>> sgd.name
      'sgd'
    """
    what = "an explorer" if name is None else f"explorer {name!r}"
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", 0))):
        raise TypeError(
            f"{what} must be an optax.GradientTransformation, such as "
            f"optax.adam(1e-3), got {tx!r} of type {type(tx).__name__}."
        )
    if loss_fn is not None:
        named.check_callback(loss_fn, f"loss_fn of {what}")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"the name of an explorer must be a string, got {name!r}.")
    return Explorer(tx, loss_fn, name)


def collect(inner: Sequence[Any] | Mapping[str, Any]) -> dict[str, Explorer]:
    """Checks the ``inner`` argument and brings it to explorers by name, in order."""
    if isinstance(inner, optax.GradientTransformation | Explorer):
        raise TypeError(
            "inner must be a sequence or a mapping of explorers, got a single "
            "transformation: write inner=[...] around it."
        )
    if isinstance(inner, Mapping):
        items = [(name, _as_explorer(value, name)) for name, value in inner.items()]
    elif isinstance(inner, Sequence) and not isinstance(inner, str):
        made = [_as_explorer(value, None) for value in inner]
        items = [(e.name or f"explorer_{i}", e) for i, e in enumerate(made)]
    else:
        raise TypeError(
            f"inner must be a sequence or a mapping of explorers, got "
            f"{type(inner).__name__}."
        )
    if not items:
        raise ValueError("inner must hold at least one explorer, got none.")
    names = [name for name, _ in items]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"explorers must have different names, got twice: {repeated}.")
    reserved = sorted({CURRENT, STABLE} & set(names))
    if reserved:
        raise ValueError(
            f"explorers cannot be named {reserved}: candidates that are always there "
            f"have these names."
        )
    return dict(items)


def _as_explorer(value: Any, name: str | None) -> Explorer:
    if isinstance(value, Explorer):
        return explorer(value.tx, value.loss_fn, value.name if name is None else name)
    return explorer(value, name=name)


def init_state(tx: optax.GradientTransformation, params: optax.Params) -> Any:
    """The inner optimizer's state as arrays that we own, none weakly typed."""
    return jax.tree.map(trees.own, tx.init(params))


def propose(
    explorers: Mapping[str, Explorer],
    grads: optax.Updates,
    opt_states: Mapping[str, Any],
    params: optax.Params,
    loss_fn: Callable[..., Any] | None,
    extra_args: Mapping[str, Any],
    axis_name: Any = None,
) -> Proposals:
    """One step of every explorer from the same parameters.

    Args:
      explorers: By name.
      grads: The caller's gradients, shared by all explorers without a loss.
      opt_states: The inner states, by name.
      params: Where all explorers start.
      loss_fn: Feeds inner optimizers that ask for more than a gradient, or None.
      extra_args: The extra arguments of ``update``.
      axis_name: Mapped axis over which losses and own gradients are averaged.

    Returns:
      The proposals, in the order of ``explorers``.
    """
    updates, new_states, finite, uphill = [], {}, [], []
    for name, one in explorers.items():
        loss = _loss_of(one, name, loss_fn, extra_args, axis_name)
        given = grads if one.loss_fn is None else _gradient(loss, params)
        old = opt_states[name]
        step = _inner_update(one, name, old, params, loss, extra_args)
        update, new = step(given)
        update = _like_params(update, params, name)
        ok, climbs = _examine(update, given)
        if memory_bound.is_memory_bound(step, given):
            # Kept until the check is done, the new state would need memory of its
            # own; computed again, it is written in the place of the old one.
            new = step(trees.where(ok, given, jax.tree.map(jnp.zeros_like, given)))[1]
        updates.append(update)
        new_states[name] = _hold(ok, new, old, name)
        finite.append(ok)
        uphill.append(climbs)
    return Proposals(updates, new_states, jnp.stack(finite), jnp.stack(uphill))


def _examine(update: optax.Updates, grads: optax.Updates) -> tuple[Any, Any]:
    """Whether an update is finite, and whether it raises the loss to first order."""

    def check():
        return _all_finite(update)

    alike = jax.tree.structure(update) == jax.tree.structure(grads)
    if not (alike and _shapes(update) == _shapes(grads)):
        # Some optimizers take gradients of another form, such as one for each example.
        return check(), jnp.asarray(False)

    def slope(u, g):
        wide = jnp.promote_types(u.dtype, jnp.float32)
        return jnp.real(jnp.conj(g.astype(wide)) * u.astype(wide)).sum()

    total = sum(jax.tree.leaves(jax.tree.map(slope, update, grads)), jnp.zeros([]))
    # A sum is finite only where all its terms are: mostly one pass answers both.
    return lax.cond(jnp.isfinite(total), lambda: jnp.asarray(True), check), total > 0


def _all_finite(tree):
    checks = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(checks).all() if checks else jnp.asarray(True)


def _loss_of(one, name, loss_fn, extra_args, axis_name):
    """The explorer's loss as a function of the parameters alone, or None."""
    fn, role = loss_fn, "loss_fn"
    if one.loss_fn is not None:
        fn, role = one.loss_fn, f"loss_fn of explorer {name!r}"
    if fn is None:
        return None
    bound = named.bind(fn, role, extra_args)

    def loss(params):
        value = bound(_averaging(params, axis_name))
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{role} must return a real scalar, got shape {shape} of {dtype}."
            )
        return value if axis_name is None else lax.pmean(value, axis_name)

    return loss


def _averaging(params, axis_name):
    """``params``, whose gradients are averaged over the axis.

    Line searches differentiate the loss themselves. Without this their slopes would
    differ between devices, and so would the number of their steps.
    """
    if axis_name is None:
        return params

    @jax.custom_vjp
    def identity(tree):
        return tree

    identity.defvjp(
        lambda tree: (tree, None), lambda _, grads: (lax.pmean(grads, axis_name),)
    )
    return identity(params)


def _gradient(loss, params):
    # Complex gradients point uphill after conjugation, optax's convention.
    return jax.tree.map(jnp.conj, jax.grad(loss)(params))


def _inner_update(one, name, opt_state, params, loss, extra_args):
    """The inner optimizer as a function of gradients, given what else it can take."""
    names, takes_any = named.accepted(one.tx.update, 3)
    opt_state = trees.unpack(opt_state, trees.key_impls(one.tx.init, params))

    def offer(grads):
        if loss is None:
            return dict(extra_args)
        supplied = {
            "value": loss(params),
            "grad": grads,
            "value_fn": loss,
            "grad_fn": lambda p, *_: _gradient(loss, p),
            "obj_fn": loss,
        }
        # A loss of one's own overrides what the caller says of another loss.
        both = (extra_args, supplied) if one.loss_fn else (supplied, extra_args)
        return {**both[0], **both[1]}

    def call(grads, extras):
        updates, new_state = one.tx.update(grads, opt_state, params, **extras)
        return updates, jax.tree.map(trees.raw, new_state)

    def explained(grads, extras):
        try:
            return call(grads, extras)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"explorer {name!r} cannot be updated: {error} Extra arguments that it "
                f"was given: {sorted(extras) or 'none'}. With ev3(..., loss_fn=...) "
                f"explorers get {', '.join(_FROM_LOSS)}."
            ) from error

    def step(grads):
        offered = offer(grads)
        if not takes_any:
            return explained(grads, {k: offered[k] for k in names & offered.keys()})
        try:
            return call(grads, offered)
        except (TypeError, ValueError):
            # Line searches reject what nobody consumes, instead of ignoring it.
            wanted = {*names, "value", "grad", "value_fn"}
            if "value_fn" in offered:
                wanted |= named.accepted(offered["value_fn"], 1)[0]
            return explained(grads, {k: offered[k] for k in wanted & offered.keys()})

    return step


def _like_params(update, params, name):
    """The update with the dtypes of the parameters; raises if it does not fit them."""
    got, expected = jax.tree.structure(update), jax.tree.structure(params)
    what = "structure"
    if got == expected:
        got, expected = _shapes(update), _shapes(params)
        what = "shapes"
    if got != expected:
        raise ValueError(
            f"explorer {name!r} returned updates of {what} {got}, expected {expected}: "
            f"gradients and updates must be like the parameters."
        )
    return jax.tree.map(lambda u, p: jnp.asarray(u, jnp.result_type(p)), update, params)


def _shapes(tree):
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _hold(ok, new, old, name):
    """The new inner state where the update is finite, with the old one's types."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"explorer {name!r} changed the structure of its state from "
            f"{jax.tree.structure(old)} to {jax.tree.structure(new)}."
        )

    return trees.where(ok, new, old)
