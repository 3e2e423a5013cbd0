"""The composer: explore, assess and adapt as one optax transformation."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src import adapt as rules
from optax_ev3._src import assess, evidence, explore, named, record, trees


class ExplorerState(NamedTuple):
    """State of one explorer.

    Attributes:
      position: ``[]`` int32, its index among the candidates.
      opt_state: State of its inner optimizer; PRNG keys in it are raw key data.
    """

    position: jax.Array
    opt_state: Any


class EV3State(NamedTuple):
    """State of :func:`optax_ev3.ev3`: arrays only.

    Attributes:
      ev3_round: ``[]`` int32, calls of ``update`` so far.
      ev3_key: Raw key data of the transformation's own randomness; it never changes.
      explorers: By name, their positions among the candidates and inner states.
      stable: The best parameters known to be good, a tree like params.
      memory: What the rule remembers of past rounds.
      record: Past rounds, see :func:`optax_ev3.history`.
    """

    ev3_round: jax.Array
    ev3_key: jax.Array
    explorers: dict[str, ExplorerState]
    stable: Any
    memory: Any
    record: record.Record


def ev3(
    inner: Sequence[Any] | Mapping[str, Any],
    assess_fn: Callable[..., Any],
    *,
    loss_fn: Callable[..., Any] | None = None,
    trajectory_length: int = 1,
    adapt: rules.Rule | None = None,
    assess_mode: str = "unroll",
    axis_name: Any = None,
    history_length: int = 64,
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Explore, assess, adapt: many optimizers as one.

    Every call of ``update`` is a round. Each explorer proposes new parameters,
    ``assess_fn`` scores all proposals on data that they were not fitted to, beside the
    ``current`` parameters and the ``stable`` ones, the best known to be good; the rule
    ``adapt`` decides which of these candidates becomes visible.

    Callbacks get, of the extra arguments of ``update``, just those that their
    signatures name, or all of them where they take ``**kwargs``. Inner optimizers
    that ask for ``value``, ``grad``, ``value_fn``, ``grad_fn`` or ``obj_fn`` get them
    from ``loss_fn``, or from the caller.

    Args:
      inner: Explorers, a sequence or a mapping from names: optax transformations, or
        what :func:`optax_ev3.explorer` returns.
      assess_fn: ``assess_fn(params, **named)`` -> scores, higher is better: ``[n]``
        (one for each example), ``[]`` (a single exact figure), or a mapping from
        names of objectives to such arrays; real or boolean. No gradient is taken
        through it. A parameter ``key`` gets a PRNG key of the round, the same for
        all candidates; under ``axis_name`` each device has its own.
      loss_fn: ``loss_fn(params, **named)`` -> real scalar, for inner optimizers that
        need more than a gradient, such as line searches.
      trajectory_length: Calls of ``update`` between two assessments. This version
        knows rounds of one step only.
      adapt: The rule, see :mod:`optax_ev3.adapt`; default
        ``optax_ev3.adapt.confident()``.
      assess_mode: How the C candidates are scored: ``"unroll"`` (C calls in one
        program), ``"vmap"`` (one call on stacked parameters) or ``"map"`` (a compiled
        loop, the quickest to compile).
      axis_name: Name of a mapped axis (``shard_map``, ``pmap``, ``vmap``) over which
        the assessment examples are spread; gradients must be averaged by the caller
        as for any other optimizer.
      history_length: Rounds that :func:`optax_ev3.history` remembers.
      key: Seed or PRNG key of the transformation's own randomness.

    Returns:
      A transformation whose updates have the dtypes of the parameters. ``update``
      needs ``params``, and as keywords what the callbacks need.

    Raises:
      TypeError: If an argument is of the wrong kind; at trace time, if a callback
        misses a parameter, cannot be traced or returns something else than scores.
      ValueError: If there is no explorer or names are repeated, if a number is out of
        range; at trace time, if scores have the wrong shape or the rule cannot use
        them, or if the state belongs to other explorers.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3
      >>> def score(w, x, y):  # one for each example, higher is better
      ...     return -((w * x - y) ** 2)
      >>> def loss(w, x, y):
      ...     return -score(w, x, y).mean()
      >>> tx = optax_ev3.ev3(
      ...     {"adam": optax.adam(0.1), "sgd": optax.sgd(0.3)}, assess_fn=score
      ... )
      >>> @jax.jit
      ... def step(w, state, train, held_out):
      ...     grads = jax.grad(loss)(w, *train)
      ...     updates, state = tx.update(grads, state, w, x=held_out[0], y=held_out[1])
      ...     return optax.apply_updates(w, updates), state
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> train, held_out = (x[::2], 3 * x[::2]), (x[1::2], 3 * x[1::2])
      >>> w = jnp.zeros([])
      >>> state = tx.init(w)
      >>> for _ in range(60):
      ...     w, state = step(w, state, train, held_out)
      >>> print(f"{w:.2f}")
      3.00

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    explorers = explore.collect(inner)
    named.check_callback(assess_fn, "assess_fn")
    if loss_fn is not None:
        named.check_callback(loss_fn, "loss_fn")
    if _static_int(trajectory_length, "trajectory_length") != 1:
        raise ValueError(
            f"trajectory_length must be 1 in this version, got {trajectory_length}."
        )
    if assess_mode not in assess.MODES:
        raise ValueError(
            f"assess_mode must be one of {assess.MODES}, got {assess_mode!r}."
        )
    rule = rules.confident() if adapt is None else adapt
    if not isinstance(rule, rules.Rule):
        raise TypeError(
            "adapt must be a rule, such as optax_ev3.adapt.confident(), got "
            f"{adapt!r} of type {type(adapt).__name__}."
        )
    history_length = _static_int(history_length, "history_length")
    key_impl = _check_key(key)

    def init_fn(params: optax.Params) -> EV3State:
        return EV3State(
            ev3_round=jnp.zeros([], jnp.int32),
            ev3_key=trees.own(jax.random.key_data(_typed_key(key))),
            explorers={
                name: ExplorerState(
                    position=jnp.asarray(position, jnp.int32),
                    opt_state=explore.init_state(one.tx, params),
                )
                for position, (name, one) in enumerate(explorers.items())
            },
            stable=jax.tree.map(trees.own, params),
            memory=rule.init(len(explorers)),
            record=record.empty(history_length, len(explorers) + 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EV3State]:
        if params is None:
            raise ValueError(
                "ev3 needs the current value of the parameters: pass them as "
                "tx.update(grads, state, params)."
            )
        _check_call(state, params, explorers, history_length)
        assess_key, rule_key = _round_keys(state, key_impl, axis_name)
        proposals = explore.propose(
            explorers,
            updates,
            {name: one.opt_state for name, one in state.explorers.items()},
            params,
            loss_fn,
            extra_args,
            axis_name,
        )
        candidates = [optax.apply_updates(params, u) for u in proposals.updates]
        candidates += [params, state.stable]
        assess_one = named.bind(assess_fn, "assess_fn", extra_args, {"key": assess_key})
        scores = assess.score(assess_one, candidates, assess_mode)
        seen = evidence.gather(
            scores,
            jnp.append(proposals.finite, jnp.ones([2], bool)),
            jnp.append(proposals.uphill, jnp.zeros([2], bool)),
            axis_name,
        )
        decision, memory = rule.decide(seen, state.memory, rule_key)
        # A round without any valid proposal decides nothing and teaches nothing.
        explored = seen.valid[: len(explorers)].any()
        adopted = jnp.where(explored, decision.adopted, rules.fallback(seen))
        significant = explored & decision.significant
        chosen = _choose(adopted, proposals.updates, params, state.stable)
        visible = optax.apply_updates(params, chosen)
        return chosen, EV3State(
            ev3_round=jnp.asarray(optax.safe_increment(state.ev3_round)),
            ev3_key=state.ev3_key,
            explorers={
                name: ExplorerState(one.position, proposals.opt_states[name])
                for name, one in state.explorers.items()
            },
            stable=trees.where(significant, visible, state.stable),
            memory=trees.where(explored, memory, state.memory),
            record=trees.where(
                explored, record.append(state.record, decision, seen), state.record
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _choose(adopted, proposed, params, stable):
    """The update that makes the adopted candidate visible."""

    def stay():
        # Zeros, whatever p, that are sharded as p is: zeros_like is not in a branch.
        return jax.tree.map(lambda p: ((p != p) & (p == p)).astype(p.dtype), params)

    def back():
        return jax.tree.map(lambda s, p: s - p, stable, params)

    moves = [lambda update=update: update for update in proposed]
    return lax.switch(adopted, [*moves, stay, back])


def _round_keys(state, key_impl, axis_name):
    """Keys of this round for the assessment (each device its own) and the rule."""
    key = jax.random.wrap_key_data(state.ev3_key, impl=key_impl)
    assess_key, rule_key = jax.random.split(jax.random.fold_in(key, state.ev3_round))
    if axis_name is not None:
        assess_key = jax.random.fold_in(assess_key, lax.axis_index(axis_name))
    return assess_key, rule_key


def _typed_key(key: Any) -> jax.Array:
    if trees.is_key(key):
        return key
    if jnp.ndim(key) == 1:
        return jax.random.wrap_key_data(key)
    return jax.random.key(key)


def _check_key(key: Any) -> Any:
    """The PRNG implementation of ``key``, None for the default."""
    if trees.is_key(key) and key.ndim == 0:
        return jax.random.key_impl(key)
    is_integer = not isinstance(key, bool) and isinstance(key, int | jax.Array)
    is_integer = is_integer or hasattr(key, "__index__")
    if is_integer and jnp.issubdtype(jnp.result_type(key), jnp.integer):
        raw = jnp.ndim(key) == 1 and jnp.result_type(key) == jnp.uint32
        if jnp.ndim(key) == 0 or raw:
            return None
    raise TypeError(f"key must be an integer seed or a single PRNG key, got {key!r}.")


def _static_int(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name} must be a Python integer, got {value!r} of type "
            f"{type(value).__name__}. Inside optax.inject_hyperparams, list it among "
            f"the static_args."
        ) from error
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    return number


def _check_call(state, params, explorers, history_length):
    """Raises unless ``update`` was given whole params and a state of its own."""
    if any(map(_is_hole, jax.tree.leaves(params, is_leaf=_is_hole))):
        raise ValueError(
            "assess_fn would see params with holes: optax.masked and optax.partition "
            "must stand inside ev3, around its inner optimizers, and not around it."
        )
    if not isinstance(state, EV3State):
        raise TypeError(
            f"update needs the state that init returned, an EV3State, got "
            f"{type(state).__name__}. To restore a checkpoint with its structure, give "
            f"the library tx.init(params) as the target."
        )
    rows, columns = state.record.mean.shape[-2:]
    if set(state.explorers) != set(explorers):
        raise ValueError(
            f"the state belongs to the {len(state.explorers)} explorers "
            f"{sorted(state.explorers)}, this transformation has {len(explorers)}: "
            f"{sorted(explorers)}."
        )
    if (rows, columns) != (history_length, len(explorers) + 2):
        raise ValueError(
            f"the state remembers {rows} rounds of {columns} candidates, this "
            f"transformation {history_length} of {len(explorers) + 2}."
        )


def _is_hole(node):
    return isinstance(node, optax.MaskedNode)
