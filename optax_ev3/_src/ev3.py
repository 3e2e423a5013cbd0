"""The transformation, and its arguments."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from optax_ev3._src import arguments, keys
from optax_ev3._src.assess import stage as assess
from optax_ev3._src.base import checks
from optax_ev3._src.base.callbacks import Opaque
from optax_ev3._src.base.decision import Rule
from optax_ev3._src.composer import Composer
from optax_ev3._src.explore import alike
from optax_ev3._src.explore import explorers as members
from optax_ev3._src.explore.strategy import Strategy


def ev3(
    inner: Sequence[Any] | Mapping[str, Any],
    assess_fn: assess.AssessFn,
    *,
    loss_fn: Callable[..., Any] | None = None,
    explore: Strategy | None = None,
    adapt: Rule | None = None,
    assess_mode: str | None = None,
    axis_name: Any = None,
    explorer_axis: str | None = None,
    history_length: int = 64,
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Explore, assess, adapt: many optimizers as one.

    In every round, explorers propose new parameters; ``assess_fn`` scores all proposals
    on data that they were not fitted to, beside the ``current`` parameters, with which
    the round began, and the ``stable`` ones, the best known to be good; the rule
    ``adapt`` decides which of these candidates becomes visible. Scores: **higher is
    better**. A loss becomes a score by ``assess_fn=optax_ev3.minimize(loss)``.

    What is not finite is never adopted, whatever the rule says. In rounds of one step
    an inner optimizer whose update is not finite keeps its earlier state. In longer
    ones a branch does not take a step whose gradients are not finite; where its
    parameters leave the finite numbers all the same, it goes on from the visible ones
    with a new inner state, and is no candidate in this round.
    :func:`optax_ev3.summary` counts such steps by explorer.

    An update of a one-step round has derivatives, in reverse mode too, for what learns
    rates or weights of examples; they are those of the candidate that is adopted, and
    none enters an assessment. Longer rounds have them in forward mode.

    Callbacks get, of the extra arguments of ``update``, those that their signatures
    name, or all of them where they take ``**kwargs``. What ``functools.partial`` has
    bound stays bound; a default does not bind: the caller's argument of the same name
    replaces it. Inner optimizers that ask for ``value``, ``grad``, ``value_fn``,
    ``grad_fn`` or ``obj_fn`` get them from ``loss_fn``, or from the caller; where
    branches take gradients of their own, from their loss.

    Args:
      inner: Explorers, a sequence or a mapping from names: optax transformations, or
        what :func:`optax_ev3.explorer`, :func:`optax_ev3.sweep`,
        :func:`optax_ev3.evolve` or :func:`optax_ev3.product` return.
      assess_fn: ``assess_fn(params, **named)`` -> scores, higher is better: ``[n]``
        (one for each example), ``[]`` (a single exact number), an aggregate metric
        (:mod:`optax_ev3.metrics`), or a mapping from names of objectives to these; real
        or boolean. No gradient is taken through it. A parameter ``key`` gets a PRNG key
        of the round, the same for all candidates; under ``axis_name`` each device has
        its own. For data that rounds walk through, ``round`` gets ``[]`` int32, the
        number of rounds that have ended, ``run_key`` a PRNG key that is the same in all
        rounds and on all devices, and ``axis_name`` that of the transformation. Extra
        arguments of ``update`` that have one of these names come first.
      loss_fn: ``loss_fn(params, **named)`` -> real scalar: what explorers differentiate
        that take gradients of their own, and what feeds inner optimizers that need more
        than a gradient, such as line searches. A parameter ``key`` gets a PRNG key of
        the call, the same for all explorers. Where explorers have a ``merge_fn``
        (:func:`optax_ev3.explorer`), it returns ``(scalar, aux)``.
      explore: How explorers are tried, see :mod:`optax_ev3.explore`. Default:
        ``explore.one_step()``, every call is a round.
      adapt: The rule, see :mod:`optax_ev3.adapt`. Default:
        ``adapt.farsighted()`` for one-step rounds of explorers that do not evolve,
        ``adapt.greedy()`` for branches that never restart, else ``adapt.confident()``.
      assess_mode: How the C candidates are scored: ``"unroll"`` (C calls in one
        program), ``"map"`` (one call in a loop, the quickest to compile) or ``"vmap"``
        (one call on stacked parameters, in which paused explorers cost as much as
        others). Default: ``"unroll"`` in rounds of one step, else ``"map"``.
      axis_name: Name of a mapped axis (``shard_map``, ``pmap``, ``vmap``) over which
        the assessment examples are spread; gradients must be averaged by the caller
        as for any other optimizer.
      explorer_axis: Name of a mesh axis over which explorers are spread that have the
        same loss, and whose optimizers need no more than a gradient. Each device steps
        and assesses its own; others are on all devices. The state must be spread alike,
        see :func:`optax_ev3.state_shardings`, and is best stepped under
        ``jax.set_mesh``.
        Default: all explorers are on all devices.
      history_length: Rounds that :func:`optax_ev3.history` remembers, for people.
      key: Seed or PRNG key of the transformation's own randomness.

    Returns:
      A transformation whose updates have the dtypes of the parameters: what is adopted
      is reached up to their rounding (:func:`optax_ev3.stable_params` is exact).
      ``update`` needs ``params``, and as keywords what the callbacks need. Where every
      explorer takes gradients of its own, those that it is given may be None, or
      whatever the loop computes: under ``jit`` the compiler removes what nothing uses.

      Parameters may hold integers, booleans and typed PRNG keys, whose gradients are
      zeros, None, or what ``jax.grad(..., allow_int=True)`` gives. Updates of booleans
      are int8, so that ``optax.apply_updates`` can clear them. Nothing can be added to
      typed keys: they stay as the caller has them, and their update is what the caller
      gave as gradient.

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
    explorers = members.collect(inner)
    arguments.check_callbacks(assess_fn, loss_fn, explorers)
    strategy = arguments.checked_strategy(explore, explorers, loss_fn is not None)
    assess_mode = arguments.checked_mode(assess_mode, strategy)
    arguments.check_axis(explorer_axis, strategy)
    explorers = alike.stacked(explorers, explorer_axis, strategy.own_gradients)
    arguments.check_spread(explorer_axis, explorers)
    composer = Composer(
        explorers=explorers,
        layout=members.layout_of(explorers, [x.prefix for x in strategy.averages]),
        strategy=strategy,
        rule=arguments.checked_rule(adapt, strategy, explorers),
        assess_fn=assess_fn,
        loss_fn=loss_fn,
        assess_mode=assess_mode,
        axis_name=axis_name,
        history_length=checks.static_int(history_length, "history_length"),
        key=key,
        key_impl=keys.check(key),
    )
    return optax.GradientTransformationExtraArgs(
        Opaque(composer.init), Opaque(composer.update)
    )
