"""Presets: named compositions of explorers, a strategy and a rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from optax_ev3._src.adapt.rules import greedy, lower_bound
from optax_ev3._src.assess.stage import AssessFn
from optax_ev3._src.ev3 import ev3
from optax_ev3._src.explore import averages, branches, racing, restarts


def portfolio(
    assess_fn: AssessFn,
    loss_fn: Callable[..., Any],
    *,
    inner: Sequence[Any] | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
    """No optimizer and no learning rate to choose: eight of them race.

    Adam at five learning rates, SGD with momentum at two, and RMSProp train apart, each
    with gradients of its own; the best of them and of their averages is visible. Those
    that do not win are paused, and cost nothing: after the first rounds two to five are
    at work at a time.

    Args:
      assess_fn: See :func:`optax_ev3.ev3`.
      loss_fn: See :func:`optax_ev3.ev3`.
      inner: Other explorers, see :func:`optax_ev3.ev3`.
      **kwargs: What else :func:`optax_ev3.ev3` takes, ``explore`` and ``adapt``
        included: they replace what is chosen here.

    Returns:
      A transformation; see :func:`optax_ev3.ev3`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3
      >>> def loss(w):
      ...     return ((w - 3.0) ** 2).sum()
      >>> tx = optax_ev3.portfolio(optax_ev3.minimize(loss), loss)
      >>> w = jnp.zeros(2)
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(None, state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(200):
      ...     w, state = step(w, state)
      >>> print(bool(jnp.allclose(w, 3.0, atol=0.1)))
      True
    """
    if inner is None:
        # Apart, not as a sweep, which races as one.
        rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
        inner = {
            **{f"adam_{rate:g}": optax.adam(rate) for rate in rates},
            "momentum_0.01": optax.sgd(0.01, momentum=0.9),
            "momentum_0.1": optax.sgd(0.1, momentum=0.9),
            "rmsprop_0.001": optax.rmsprop(1e-3),
        }
    chosen: dict[str, Any] = {
        "explore": branches.branches(
            25,
            restart=restarts.never(inner_state="copy"),
            averages=[averages.trajectory_average(), averages.branch_average()],
            racing=racing.Racing(patience=2, window=8),
        ),
        "adapt": greedy(),
    }
    return ev3(inner, assess_fn, loss_fn=loss_fn, **{**chosen, **kwargs})


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
