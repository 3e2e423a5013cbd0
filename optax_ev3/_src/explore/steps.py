"""Steps: what an explorer's inner optimizer does to parameters, checked."""

import functools
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr, tree_map_with_path

from optax_ev3._src.base import callbacks as named
from optax_ev3._src.base import checks, control, memory_bound, trees, xla
from optax_ev3._src.explore.explorers import Explorer

# What optax's optimizers ask for beyond the gradient; all follow from a loss.
_FROM_LOSS = ("value", "grad", "value_fn", "grad_fn", "obj_fn")


class Call(NamedTuple):
    """What one call of ``update`` gives to all steps.

    Attributes:
      grads: The caller's gradients, or None where every explorer takes its own.
      loss_fn: The loss of explorers that have none of their own, or None.
      extra_args: The extra arguments of ``update``.
      key: PRNG key of the call, for losses that name it.
      axis_name: Mapped axis over which losses and own gradients are averaged, or None.
      hyperparams: By evolving group and name ``[G]``, the numbers of its members.
      own: Whether explorers may be elsewhere than the caller, with gradients of their
        own: they take ``value`` and the like from their losses then.
    """

    grads: optax.Updates
    loss_fn: Callable[..., Any] | None
    extra_args: Mapping[str, Any]
    key: jax.Array
    axis_name: Any = None
    hyperparams: Mapping[str, Mapping[str, jax.Array]] = types.MappingProxyType({})
    own: bool = False


class Step(NamedTuple):
    """One step of an explorer.

    Attributes:
      update: A tree like params, which may hold what is not finite.
      opt_state: The inner state; the old one where the step is not finite.
      finite: ``[]`` bool, whether the update and the parameters after it are finite.
      is_ascent: ``[]`` bool, whether the update raises the loss to first order.
    """

    update: optax.Updates
    opt_state: Any
    finite: jax.Array
    is_ascent: jax.Array


class Loss(NamedTuple):
    """An explorer's loss as functions of the parameters alone.

    Attributes:
      value: params -> ``[]``.
      gradient: params -> gradients, and what else the loss returns (None if nothing).
    """

    value: Callable[[optax.Params], jax.Array]
    gradient: Callable[[optax.Params], tuple[optax.Updates, Any]]


def init_state(one: Explorer, params: optax.Params) -> Any:
    """The inner optimizer's state as arrays that we own, none weakly typed."""
    return one.each(lambda tx, _: jax.tree.map(_owned, tx.init(params)))


def first_state(one: Explorer, name: str, params: optax.Params) -> Any:
    """The inner state, in the dtypes that its first steps bring it to.

    Some begin with an integer to which a fraction is added. An optimizer that needs
    more than a gradient keeps the dtypes of its ``init``.
    """
    nothing = jax.tree.map(
        lambda p: jnp.zeros_like(p) if trees.is_inexact(p) else None, params
    )
    grads = gradients_for(params, nothing)

    def step(tx, state):
        return _inner_update(tx, one, name, state, params, None, {})(grads)[1]

    def init(tx, _):
        state = jax.tree.map(_owned, tx.init(params))
        for _ in range(2):  # From booleans to integers to floats.
            if all(map(trees.is_inexact, jax.tree.leaves(state))):
                break
            try:
                after = jax.eval_shape(functools.partial(step, tx), state)
                state = jax.tree.map(_promoted, state, after)
            except Exception:  # Whatever it is, the first step says it better.
                break
        return state

    state = one.each(init)
    return state if one.size is None else trees.unlike_params(state)


def _owned(leaf):
    return trees.own(trees.raw(leaf))


def _promoted(old, new):
    higher = trees.rank(new.dtype) > trees.rank(old.dtype)
    return old.astype(new.dtype) if higher else old


def gradients_for(params: optax.Params, grads: optax.Updates) -> optax.Updates:
    """Gradients that optimizers can take: arrays, zeros for leaves without gradients.

    For such leaves the caller has what ``jax.grad(..., allow_int=True)`` gives, None,
    or zeros. Gradients of another structure come back as they are.
    """

    def has_none(g):
        return g is None or jnp.result_type(g) == jax.dtypes.float0

    grads = jax.tree.map(lambda g: g if has_none(g) else trees.array(g), grads)
    leaves, structure = jax.tree.flatten(params)
    if all(map(trees.is_inexact, leaves)):
        return grads
    try:
        given = structure.flatten_up_to(grads)
    except ValueError:
        return grads

    def one(p, g):
        if trees.is_key(p):
            return jnp.zeros(p.shape, jnp.int8)
        return jnp.zeros_like(p) if has_none(g) and not trees.is_inexact(p) else g

    return structure.unflatten(map(one, leaves, given))


def update_for(
    params: optax.Params, update: optax.Updates, grads: optax.Updates
) -> optax.Updates:
    """The update as the caller gets it: for typed keys what stood for their gradient.

    Nothing can be added to them; who has them among the parameters knows how to pass
    over what their gradients are.
    """
    leaves, structure = jax.tree.flatten(params)
    if not any(map(trees.is_key, leaves)):
        return update
    try:
        given = structure.flatten_up_to(grads)
    except ValueError:
        given = [None] * len(leaves)
    updates = jax.tree.leaves(update)
    return structure.unflatten(
        g if trees.is_key(p) else u
        for p, u, g in zip(leaves, updates, given, strict=True)
    )


def propose(
    explorers: Mapping[str, Explorer],
    opt_states: Mapping[str, Any],
    params: optax.Params,
    call: Call,
    rests: Mapping[str, jax.Array],
) -> dict[str, Step]:
    """One step of every explorer from the same parameters; those of a sweep stacked.

    Explorers that rest propose nothing, and are not finite.
    """
    steps = {}
    # Once for all explorers.
    start = trees.total(
        x.sum() for x in jax.tree.leaves(trees.twice(params)) if trees.is_inexact(x)
    )
    for name, one in explorers.items():

        def step(tx, hyperparams, state, one=one, name=name):
            loss = loss_of(one, name, call, hyperparams)
            if one.loss_fn is not None and loss is not None:
                given, aux = loss.gradient(params)
            else:
                given, aux = given_to(name, call)
            merge = merge_of(one, name, aux)

            def take(grads):
                return advance(tx, one, name, grads, state, params, merge, loss, call)

            return _checked(take, given, state, params, start)

        numbers = call.hyperparams.get(name)

        def go(state, one=one, step=step, numbers=numbers):
            return one.each(step, state, hyperparams=numbers)

        def idle(state, go=go):
            kinds = jax.eval_shape(go, state)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kinds)
            return nothing._replace(opt_state=state)

        state = opt_states[name]
        if name in rests:
            steps[name] = control.cond(rests[name], idle, go, state)
        else:
            steps[name] = go(state)
    return steps


def advance(
    tx: optax.GradientTransformation,
    one: Explorer,
    name: str,
    grads: optax.Updates,
    opt_state: Any,
    params: optax.Params,
    merge: Callable[[optax.Params], optax.Params] | None,
    loss: Loss | None,
    call: Call,
) -> tuple[optax.Updates, Any]:
    """One step of one inner optimizer, as it comes.

    Args:
      tx: The inner optimizer: that of ``one``, or of one member of a sweep.
      one: The explorer.
      name: Its name.
      grads: Gradients at ``params``, or what stands for them.
      opt_state: State of the inner optimizer.
      params: Where the step starts.
      merge: Maps the parameters after the step to those with auxiliary outputs merged.
      loss: The loss of the explorer, for optimizers that need more than a gradient.
      call: What the caller gave.

    Returns:
      The update, like params, and the inner state, like the one before.
    """
    extras, own = call.extra_args, call.own
    inner = _inner_update(tx, one, name, opt_state, params, loss, extras, own)
    update, new = inner(grads)
    update = _like_params(update, params, name)
    if merge is not None:
        update = _merged(update, params, merge)
    return update, _like_state(new, opt_state, name)


def _checked(take, grads, opt_state, params, start):
    """One step of one inner optimizer, whose state is held if it is not finite.

    ``start`` is a sum to which twice every parameter contributes.
    """
    update, new = take(grads)
    ok, is_ascent = _examine(update, grads, params, start)
    if memory_bound.is_memory_bound(take, grads):
        # Kept until the check is done, the new state would need memory of its own;
        # computed again, it is written in the place of the old one.
        new = take(trees.where(ok, grads, jax.tree.map(jnp.zeros_like, grads)))[1]
    return Step(update, trees.where(ok, new, opt_state), ok, is_ascent)


def given_to(name: str, call: Call) -> tuple[optax.Updates, Any]:
    """The caller's gradients, which this explorer needs, and auxiliary outputs."""
    if call.grads is None:
        raise ValueError(
            f"explorer {name!r} takes the caller's gradients, got None: pass them as "
            f"tx.update(grads, state, params), or give the explorer a loss of its own, "
            f"explorer(tx, loss_fn)."
        )
    return call.grads, call.extra_args.get("aux")


def merge_of(one: Explorer, name: str, aux: Any) -> Callable[[Any], Any] | None:
    """How auxiliary outputs become part of the parameters, or None."""
    if one.merge_fn is None:
        return None
    if aux is None:
        raise TypeError(
            f"explorer {name!r} has a merge_fn, but takes the caller's gradients: pass "
            f"what the caller's loss computed on the side as "
            f"tx.update(grads, state, params, aux=...)."
        )
    merge_fn = one.merge_fn
    return lambda params: merge_fn(params, aux)


def _merged(update, params, merge):
    """The update that leads to the merged parameters."""
    moved = trees.plus(params, update)
    merged = merge(moved)
    if jax.tree.structure(merged) != jax.tree.structure(params):
        raise ValueError(
            f"merge_fn must return parameters of structure "
            f"{jax.tree.structure(params)}, got {jax.tree.structure(merged)}."
        )

    def change(path, new, old, u, p):
        if new is old:
            return u
        if trees.is_key(p):
            raise ValueError(
                f"merge_fn changed the typed PRNG key at params{keystr(path)}, and no "
                f"update can be added to one: keep its raw data, jax.random.key_data, "
                f"among the parameters."
            )
        return trees.minus(jnp.asarray(new, p.dtype), p)

    return tree_map_with_path(change, merged, moved, update, params)


def _examine(
    update: optax.Updates, grads: optax.Updates, params: optax.Params, start: Any
) -> tuple[Any, Any]:
    """Whether a step is finite, and whether it raises the loss to first order."""
    # A sum is finite only where all its terms are: mostly one pass answers both.
    total = slope(trees.twice(update), grads)
    if total is None:
        return trees.finite_after(params, update), jnp.asarray(False)
    return trees.finite_after(params, update, trees.total([start, total])), total > 0


def slope(update: optax.Updates, grads: optax.Updates) -> jax.Array | None:
    """What an update adds to the loss, to first order; None if it cannot be told.

    Some optimizers take gradients of another form, such as one for each example.
    """
    alike = jax.tree.structure(update) == jax.tree.structure(grads)
    if not (alike and _shapes(update) == _shapes(grads)):
        return None

    def product(u, g):
        if not trees.is_inexact(u):
            return jnp.zeros([])
        wide = trees.wide_dtype(u)
        return jnp.real(jnp.conj(g.astype(wide)) * u.astype(wide)).sum()

    return trees.total(jax.tree.leaves(jax.tree.map(product, update, grads)))


def loss_of(
    one: Explorer, name: str, call: Call, hyperparams: Mapping[str, jax.Array]
) -> Loss | None:
    """The explorer's loss, or None where it has none.

    A loss that names hyperparameters of an evolving group gets them.
    """
    fn, role = call.loss_fn, "loss_fn"
    if one.loss_fn is not None:
        fn, role = one.loss_fn, f"loss_fn of explorer {name!r}"
    if fn is None:
        return None
    numbers = hyperparams if one.space and one.loss_fn is not None else {}
    offered = {"key": call.key}
    bound = named.bind(fn, role, call.extra_args, offered, fixed=numbers)

    def with_aux(params):
        value, aux = bound(_averaging(params, call.axis_name)), None
        if one.merge_fn is not None:
            if not (isinstance(value, tuple) and len(value) == 2):
                raise TypeError(
                    f"{role} must return (scalar, aux), since explorer {name!r} has a "
                    f"merge_fn; got {type(value).__name__}."
                )
            value, aux = value
        elif isinstance(value, tuple):
            raise TypeError(
                f"{role} returned {len(value)} values, and explorer {name!r} has no "
                f"merge_fn that says what becomes of auxiliary outputs."
            )
        if not checks.is_array(value):
            raise TypeError(
                f"{role} must return a real scalar, got {type(value).__name__}: "
                f"{value!r}."
            )
        shape, dtype = jnp.shape(value), jnp.result_type(value)
        if shape != () or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{role} must return a real scalar, got shape {shape} of {dtype}."
            )
        if call.axis_name is not None:
            value, aux = lax.pmean((value, aux), call.axis_name)
        return value, aux

    @xla.quick_convolutions
    def gradient(params):
        grads, aux = jax.grad(with_aux, has_aux=True, allow_int=True)(params)
        # Complex gradients point uphill after conjugation, optax's convention.
        return jax.tree.map(jnp.conj, gradients_for(params, grads)), aux

    return Loss(lambda params: with_aux(params)[0], gradient)


def _averaging(params, axis_name):
    """``params``, whose gradients are averaged over the axis.

    Line searches differentiate the loss themselves. Without this their slopes would
    differ between devices, and so would the number of their steps.
    """
    if axis_name is None:
        return params

    @jax.custom_vjp
    def identity(leaves):
        return leaves

    identity.defvjp(
        lambda leaves: (leaves, None), lambda _, grads: (lax.pmean(grads, axis_name),)
    )
    leaves, structure = jax.tree.flatten(params)
    inexact = [i for i, leaf in enumerate(leaves) if trees.is_inexact(leaf)]
    averaging = identity([leaves[i] for i in inexact])
    for i, leaf in zip(inexact, averaging, strict=True):
        leaves[i] = leaf
    return structure.unflatten(leaves)


def _inner_update(tx, one, name, opt_state, params, loss, extra_args, own=False):
    """The inner optimizer as a function of gradients, given what else it can take."""
    takes = named.free(tx.update, 3)
    opt_state = trees.unpack(opt_state, trees.key_impls(tx.init, params))

    def offer(grads):
        if loss is None:
            return dict(extra_args)
        supplied = {
            "value": loss.value(params),
            "grad": grads,
            "value_fn": loss.value,
            "grad_fn": lambda p, *_: loss.gradient(p)[0],
            "obj_fn": loss.value,
        }
        # What the caller says is of another loss, or of other parameters.
        last = one.loss_fn is not None or own
        both = (extra_args, supplied) if last else (supplied, extra_args)
        return {**both[0], **both[1]}

    def call(grads, extras):
        updates, new_state = tx.update(grads, opt_state, params, **extras)
        return updates, jax.tree.map(trees.raw, new_state)

    def explained(grads, extras):
        try:
            return call(grads, extras)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            where = trees.difference(params, grads)
            hint = ""
            if _misses_argument(error):
                hint = (
                    f" Extra arguments that it was given: {sorted(extras) or 'none'}. "
                    f"With ev3(..., loss_fn=...) explorers get {', '.join(_FROM_LOSS)}."
                )
            elif where is not None:
                hint = f" The gradients are not like the parameters: {where}."
            raise kind(f"explorer {name!r} cannot be updated: {error}{hint}") from error

    def step(grads):
        offered = {k: v for k, v in offer(grads).items() if takes.takes(k)}
        if not takes.takes_any:
            return explained(grads, offered)
        try:
            return call(grads, offered)
        except (TypeError, ValueError):
            # Line searches reject what nobody consumes, instead of ignoring it.
            wanted = {*takes.names, "value", "grad", "value_fn"}
            if "value_fn" in offered:
                wanted |= named.free(offered["value_fn"], 1).names
            return explained(grads, {k: offered[k] for k in wanted & offered.keys()})

    return step


def _misses_argument(error):
    """Whether an optimizer says that it was not given what follows from a loss."""
    says = str(error)
    return any(re.search(rf"\b{name}\b", says) for name in _FROM_LOSS) and any(
        word in says for word in ("missing", "provide", "require", "need to pass")
    )


def _like_params(update, params, name):
    """The update with the dtypes of the parameters; raises if it does not fit them."""
    where, got, expected = trees.difference(params, update), None, None
    if where is None:
        got, expected = _shapes(update), _shapes(params)
    if got != expected or where is not None:
        what = f"shapes {got}, expected {expected}"
        if where is not None:
            what = f"another structure, {where}"
        raise ValueError(
            f"explorer {name!r} returned updates of {what}: gradients and updates must "
            f"be like the parameters."
        )

    def one(u, p):
        if trees.is_inexact(p):
            return jnp.asarray(u, p.dtype)
        # What optax.apply_updates leads to, which rounds sums of integers and floats.
        moved = p if trees.is_key(p) else jnp.asarray(p + u, p.dtype)
        return trees.minus(moved, p)

    return jax.tree.map(one, update, params)


def _shapes(tree):
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _like_state(new, old, name):
    """The new inner state with the old one's types; raises if it does not fit it."""
    where = trees.difference(old, new)
    if where is not None:
        raise ValueError(
            f"explorer {name!r} changed the structure of its state: {where}."
        )

    def one(path, n, o):
        got, expected = (f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in (n, o))
        lost = trees.rank(jnp.result_type(n)) > trees.rank(o.dtype)
        if jnp.shape(n) != o.shape or lost:
            raise ValueError(
                f"explorer {name!r} changed its state at {keystr(path) or 'the top'} "
                f"from {expected} to {got}: its init must return the shapes and types "
                f"that its update does."
            )
        return jnp.asarray(n, o.dtype)

    return tree_map_with_path(one, new, old)
