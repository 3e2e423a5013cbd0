"""Progress: what the history says of explorers, and of training as a whole."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_ev3._src.base import checks, statistics
from optax_ev3._src.base.layout import CURRENT, STABLE
from optax_ev3._src.history import credit as credits
from optax_ev3._src.history.lookup import find, groups, positions


def credit(state: Any) -> dict[str, jax.Array]:
    """How far each explorer was ahead of the others in late rounds.

    The scores of a round are brought to mean zero and variance one over the candidates
    that were finite, and averaged over rounds, which fade by 0.9; a round in which a
    candidate was not finite counts as -3. Members of a group that evolves share their
    credit. Rules break ties by it.

    Args:
      state: As for :func:`optax_ev3.stable_params`; works under ``jit``, too.

    Returns:
      By the names of explorers and combined candidates, ``[]`` float32, in standard
      deviations; zero for what never took part.

    Raises:
      ValueError: If ``state`` holds no state of ev3, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     {"good": optax.sgd(0.1), "bad": optax.sgd(-0.1)}, lambda w: -(w**2)
      ... )
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> print({name: float(value) for name, value in optax_ev3.credit(state).items()})
      {'bad': -1.0, 'good': 1.0}
    """
    state = find(state)
    found = credits.estimate(state.history.credit, groups(state.explore))
    places = positions(state)
    return {k: found[i] for k, i in places.items() if k not in (CURRENT, STABLE)}


def should_grow(state: Any, rounds: int) -> jax.Array:
    """Whether none of the last rounds was significantly better: ``[]`` bool.

    The paper's test for a larger model: stable parameters were not replaced for so many
    rounds.

    Args:
      state: As for :func:`optax_ev3.stable_params`; works under ``jit``, too.
      rounds: How many, at least 1; those count that were recorded.

    Raises:
      TypeError: If ``rounds`` is no integer.
      ValueError: If it is below 1; if ``state`` holds no state of ev3, or more than
        one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3([optax.sgd(0.1)], lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> print(optax_ev3.should_grow(state, rounds=1))
      False

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    rounds = checks.integer(rounds, "rounds", 1)
    return find(state).history.since >= rounds


def stalled(state: Any, rounds: int = 32, confidence: float = 0.95) -> jax.Array:
    """Whether training gets nowhere, for early stopping: ``[]`` bool.

    So it is where stable parameters were not replaced for so many rounds
    (:func:`should_grow`), and where, over the same rounds, the scores of what was
    adopted do not rise, by a t test of the slope of their regression line on time.

    Args:
      state: As for :func:`optax_ev3.stable_params`; works under ``jit``, too.
      rounds: How many, from 8 to ``history_length``.
      confidence: Of the test, one-sided.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If ``rounds`` is below 8, too few for the confidence, or the history
        is shorter; if ``confidence`` is not between 0.5 and 1; if ``state`` holds no
        state of ev3, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3([optax.sgd(0.1)], lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> print(optax_ev3.stalled(state))
      False
    """
    rounds = checks.integer(rounds, "rounds", 8)
    alpha = checks.error_rate(confidence)
    if 0.5 ** (rounds - 1) >= alpha:
        raise ValueError(
            f"no rise over {rounds} rounds is proof at confidence {confidence}: more "
            f"rounds are needed."
        )
    past = find(state).history
    length = past.adopted.shape[0]
    if rounds > length:
        raise ValueError(
            f"stalled over {rounds} rounds needs a history of as many, history_length "
            f"is {length}."
        )
    row = (past.rounds - 1 - jnp.arange(rounds)) % length
    score = past.mean[row, past.adopted[row]]
    # Brought to at most one before they are squared: huge scores do not overflow.
    score -= score.mean()
    largest = jnp.abs(score).max()
    score /= jnp.where(largest > 0, largest, 1)
    time = -jnp.arange(rounds, dtype=score.dtype)
    time -= time.mean()
    both = (time * score).sum()
    left = jnp.square(time).sum() * jnp.square(score).sum() - both**2
    stderr = jnp.sqrt(jnp.maximum(left, 0) / (rounds - 2))
    rises = statistics.t_to_z(both, stderr, rounds - 1) > statistics.z_value(alpha)
    return (past.since >= rounds) & ~rises
