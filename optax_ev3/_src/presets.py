"""Presets: named compositions of explorers, a strategy and a rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax
from optax import contrib

from optax_ev3._src.adapt.rules import lower_bound
from optax_ev3._src.assess.stage import AssessFn
from optax_ev3._src.base import checks
from optax_ev3._src.ev3 import ev3
from optax_ev3._src.explore import averages, branches, halving, racing, relay, restarts
from optax_ev3._src.explore.explorers import Explorer, collect
from optax_ev3._src.explore.strategy import Strategy

# Of all calls, those of the last part in which rates fall (Haegele et al.: a fifth).
_COOLDOWN = 0.2
# How many there are where the end is known: in the first two of them all train.
_ROUNDS = 40


def portfolio(
    assess_fn: AssessFn,
    loss_fn: Callable[..., Any] | None = None,
    *,
    inner: Sequence[Any] | Mapping[str, Any] | None = None,
    wrap: Callable[[Any], Any] | None = None,
    total_steps: int | None = None,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """No optimizer and no learning rate to choose: eight of them compete.

    Adam at four learning rates, Muon at three, and SGD with momentum. Evaluate
    :func:`optax_ev3.best_params`: the best of them and of their averages. Muon's
    updates are scaled to be as large as Adam's; it treats matrices alone, and all other
    parameters as Adam does.

    - With a ``loss_fn`` they train side by side, each with gradients of its own
      (:func:`optax_ev3.explore.branches`). Those that do not win are paused, and cost
      nothing.
    - Without one they take turns with the caller's gradients
      (:func:`optax_ev3.explore.relay`): one gradient a call.

    **Say how long the training is**, if it is known. With ``total_steps`` all rates
    fall to zero in the last fifth of the calls. And with a ``loss_fn`` there are about
    40 rounds, in the first four of which seven of eight explorers drop out
    (:class:`optax_ev3.explore.SuccessiveHalving`): a training of a hundred calls or
    more takes about 1.5 gradients a call, or 2 where progress stops. Without
    ``total_steps``, and for groups that evolve, rounds have 25 calls, and two to five
    explorers are at work after the first rounds (:class:`optax_ev3.explore.Racing`).
    Averages do what a cool-down does where there is none.

    Args:
      assess_fn: See :func:`optax_ev3.ev3`.
      loss_fn: See :func:`optax_ev3.ev3`.
      inner: Other explorers, see :func:`optax_ev3.ev3`.
      wrap: What to put around every optimizer, such as ``lambda tx:
        optax.chain(optax.clip_by_global_norm(1.0), tx)``; or, for a model with
        BatchNorm, ``lambda tx: optax_ev3.explorer(tx, merge_fn=merge)``.
      total_steps: Calls of ``update`` in the whole training; rates are zero after
        them, or, with a ``loss_fn``, after their last whole round.
      **kwargs: What else :func:`optax_ev3.ev3` takes, ``explore`` and ``adapt``
        included: they replace what is chosen here.

    Returns:
      A transformation; see :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``total_steps`` is no integer, or ``wrap`` is not callable.
      ValueError: If it is below 1, or given together with ``explore``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3
      >>> def loss(w):
      ...     return ((w - 3.0) ** 2).sum()
      >>> tx = optax_ev3.portfolio(optax_ev3.minimize(loss), total_steps=400)
      >>> w = jnp.zeros(2)
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(400):
      ...     w, state = step(w, state)
      >>> print(bool(jnp.allclose(optax_ev3.best_params(state), 3.0, atol=0.1)))
      True

    References:
      Haegele et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training
      Durations <https://arxiv.org/abs/2405.18392>`_, 2024 (the cool-down); Liu et al.,
      `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025 (the
      scale of Muon's updates).
    """
    if inner is None:
        inner = _eight()
    if wrap is not None:
        inner = _wrapped(inner, wrap)
    if total_steps is not None:
        if "explore" in kwargs:
            raise ValueError(
                "total_steps sets the schedule of the strategy chosen here: give the "
                "one in explore= a schedule of its own."
            )
        total_steps = checks.static_int(total_steps, "total_steps")
    if loss_fn is None:
        schedule = None if total_steps is None else _cooldown(total_steps)
        explore = relay.relay(25, schedule=schedule)
    else:
        explore = _branches(inner, total_steps)
    chosen: dict[str, Any] = {"explore": explore}
    return ev3(inner, assess_fn, loss_fn=loss_fn, **{**chosen, **kwargs})


def _eight() -> dict[str, optax.GradientTransformation]:
    """Optimizers by name, of few kinds: those of a kind are compiled once."""
    adams, muons = (3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2)
    return {
        **{f"adam_{rate:g}": optax.adam(rate) for rate in adams},
        **{f"muon_{rate:g}": contrib.muon(rate, consistent_rms=0.2) for rate in muons},
        "momentum_0.1": optax.sgd(0.1, momentum=0.9),
    }


def _wrapped(
    inner: Sequence[Any] | Mapping[str, Any], wrap: Callable[[Any], Any]
) -> Sequence[Any] | Mapping[str, Any]:
    """The explorers with something around each of them."""
    if not callable(wrap):
        raise TypeError(f"wrap must be a function of an optimizer, got {wrap!r}.")
    if isinstance(inner, Mapping):
        return {name: wrap(tx) for name, tx in inner.items()}
    single = optax.GradientTransformation | Explorer  # Which are tuples.
    if isinstance(inner, single) or not isinstance(inner, Sequence):
        return inner  # No explorers by place: ev3 says so.
    return [wrap(tx) for tx in inner]


def _cooldown(total_steps: int) -> optax.Schedule:
    """One, until it falls to zero in the last part."""
    last = max(round(_COOLDOWN * total_steps), 1)
    return optax.linear_schedule(1.0, 0.0, last, total_steps - last)


def _branches(
    inner: Sequence[Any] | Mapping[str, Any], total_steps: int | None
) -> Strategy:
    """Branches that race, by the number of rounds where it is known."""
    length, schedule = 25, None
    race: racing.Racing | halving.SuccessiveHalving = racing.Racing()
    if total_steps is not None:
        if all(one.space is None for one in collect(inner).values()):
            length = max(round(total_steps / _ROUNDS), 1)
            race = halving.SuccessiveHalving()
        # What comes after the last whole round, if there is any, is not assessed.
        schedule = _cooldown(total_steps // length * length or total_steps)
    return branches.branches(
        length,
        restart=restarts.never(inner_state="copy"),
        averages=[averages.trajectory_average(), averages.branch_average()],
        racing=race,
        schedule=schedule,
    )


def paper(
    inner: Sequence[Any] | Mapping[str, Any],
    assess_fn: AssessFn,
    *,
    loss_fn: Callable[..., Any],
    length: int,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """The paper's algorithm: rounds from the adopted parameters, and its rule.

    Args:
      inner: Explorers, see :func:`optax_ev3.ev3`; the paper's grid of losses and
        optimizers is :func:`optax_ev3.product`.
      assess_fn: See :func:`optax_ev3.ev3`, with scores of at least two examples.
      loss_fn: See :func:`optax_ev3.ev3`.
      length: Calls of ``update`` in a round.
      **kwargs: What else :func:`optax_ev3.ev3` takes, ``explore`` and ``adapt``
        included: they replace what is chosen here.

    Returns:
      A transformation; see :func:`optax_ev3.ev3`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> def score(w):
      ...     return -((w * x - 3 * x) ** 2)
      >>> tx = optax_ev3.paper(
      ...     [optax.adam(1e-2), optax.sgd(0.1)],
      ...     score,
      ...     loss_fn=lambda w: -score(w).mean(),
      ...     length=10,
      ... )

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    chosen: dict[str, Any] = {
        "explore": branches.rounds(length),
        "adapt": lower_bound(),
    }
    return ev3(inner, assess_fn, loss_fn=loss_fn, **{**chosen, **kwargs})
