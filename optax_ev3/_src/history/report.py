"""What a person wants to know of the state: scores, history, stable parameters.

Dimensions: ``R`` rounds, ``C`` candidates, ``M`` objectives, ``G`` members of an
evolving group.
"""

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from optax_ev3._src.base import select
from optax_ev3._src.base.layout import STABLE
from optax_ev3._src.base.states import ExplorerState, place_index
from optax_ev3._src.history.lookup import candidates, find, positions


def stable_params(state: Any) -> Any:
    """The best parameters known to be good.

    Args:
      state: The state of :func:`optax_ev3.ev3`, or any tree that holds just one, such
        as the state of a chain or a Flax ``TrainState``.

    Returns:
      A tree like the parameters that ``init`` was given: exact and finite, where an
      update that leads back to it is rounded, and leads nowhere from parameters that
      are not finite. To go back in full, put it in the place of the parameters.
      From the ``opt_state`` of an ``nnx.Optimizer`` it is an ``nnx.State`` of Flax's
      ``OptVariable``: ``nnx.update(model, stable)`` brings it into the model, and
      ``nnx.to_pure_dict(stable)`` gives its arrays.

    Raises:
      ValueError: If ``state`` holds no state of ev3, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax.chain(
      ...     optax.clip(1.0), optax_ev3.ev3([optax.sgd(0.1)], lambda w: -(w**2))
      ... )
      >>> print(optax_ev3.stable_params(tx.init(jnp.array(2.0))))
      2.0
    """
    # A copy, since Flax NNX changes its variables in place.
    return jax.tree.map(lambda leaf: leaf, find(state).stable)


def best_params(state: Any) -> Any:
    """The best parameters seen, by their held-out score: for evaluation.

    As with ``optax.contrib.schedule_free_eval_params``, these are not the parameters
    that training goes on with: they may be an average, or of another explorer than the
    one at work. After each round they are what was adopted, or the stable parameters
    where these had the higher mean score in that round. In a relay, and in branches
    that never restart, with the default rule, what is adopted is the best of all
    candidates and of the best before. In one-step rounds, whose state keeps no other
    copy, they are the stable parameters.

    Args:
      state: As for :func:`stable_params`.

    Returns:
      A tree like the parameters that ``init`` was given, see :func:`stable_params`.
      Before the first round has ended, these parameters.

    Raises:
      ValueError: If ``state`` holds no state of ev3, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.sgd(0.1), optax.sgd(0.2)],
      ...     optax_ev3.minimize(jnp.square),
      ...     explore=optax_ev3.explore.relay(),
      ... )
      >>> w = jnp.array(2.0)
      >>> updates, state = tx.update(2 * w, tx.init(w), w)
      >>> print(f"{optax_ev3.best_params(state):.1f}")
      1.6
    """
    found = find(state)
    if found.explore.branches == ():
        return stable_params(state)
    past = found.history
    row = (past.rounds - 1) % past.adopted.shape[0]
    mean, stable = past.mean[row], positions(found)[STABLE]
    # Where stable has just been replaced, its score is not that of the new ones.
    is_stable = (past.valid[row, stable] > 0) & (past.significant[row] == 0)
    is_stable &= mean[stable] > mean[past.adopted[row]]
    return select.where(is_stable, found.stable, found.explore.branches.start)


def summary(state: Any) -> dict[str, jax.Array]:
    """The last round in figures, for any metric logger; works under ``jit``, too.

    Args:
      state: As for :func:`stable_params`.

    Returns:
      Scalars by name, where NAME stands for each candidate, the explorers and the
      combined ones, ``current`` and ``stable``.

      - ``ev3/calls``: calls of ``update`` so far;
      - ``ev3/round``: rounds that have ended, as many where each has one step;
      - ``ev3/skipped``: rounds among them in which no explorer's update and scores
        were finite; they leave everything else as it was;
      - ``ev3/overruled``: rounds in which the rule decided on a candidate that was not
        valid, or did not exist, and was overruled;
      - ``ev3/skipped_steps/NAME``: steps of this explorer that came to nothing, since
        its gradients, its update or the parameters that it led to were not finite;
        where it was paused, none was due;
      - ``ev3/adopted/NAME``: 1 for the candidate adopted in the last recorded round, 0
        for all others, and for all before the first one;
      - ``ev3/significant``: 1 if that round replaced the stable parameters, else 0;
      - ``ev3/examples``: how many examples it looked at, on all devices; 0 where scores
        are single figures;
      - ``ev3/adopted_score``, ``ev3/adopted_stderr``: mean score of the adopted one and
        its error, by the main objective where the rule takes several;
      - ``ev3/score/NAME``: mean score of each candidate; where it has none in this
        round, the last one that it had, and before the first one 0;
      - ``ev3/objective/OTHER/NAME``: the same by each further objective;
      - ``ev3/valid/NAME``: 1 if these scores are of this round, 0 if they are not:
        before the first round has ended, where the candidate or its scores were not
        finite, and where the explorer was paused;
      - ``ev3/share/NAME``: how often it was adopted, as a share of all rounds;
      - ``ev3/hyperparams/GROUP/NAME``: median over the members of an evolving group.

      All are finite, so that it can be used with ``jax_debug_nans``.

    Raises:
      ValueError: If ``state`` holds no state of ev3, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3({"sgd": optax.sgd(0.1)}, lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> for name, value in optax_ev3.summary(state).items():
      ...     print(f"{name} {value:.2f}")
      ev3/calls 1.00
      ev3/round 1.00
      ev3/skipped 0.00
      ev3/overruled 0.00
      ev3/skipped_steps/sgd 0.00
      ev3/significant 1.00
      ev3/examples 0.00
      ev3/adopted_score -2.56
      ev3/adopted_stderr 0.00
      ev3/adopted/sgd 1.00
      ev3/adopted/current 0.00
      ev3/adopted/stable 0.00
      ev3/score/sgd -2.56
      ev3/score/current -4.00
      ev3/score/stable -4.00
      ev3/valid/sgd 1.00
      ev3/valid/current 1.00
      ev3/valid/stable 1.00
      ev3/share/sgd 1.00
      ev3/share/current 0.00
      ev3/share/stable 0.00
    """
    state = find(state)
    past = state.history
    row = (past.rounds - 1) % past.adopted.shape[0]
    adopted = past.adopted[row]
    valid = past.valid[row] > 0
    mean = past.mean[row]
    others = {name: old.mean[row] for name, old in past.others.items()}
    one_hot = (jnp.arange(valid.shape[0]) == adopted) & (past.rounds > 0)
    one_hot = one_hot.astype(jnp.int32)
    share = past.adoptions / jnp.maximum(past.rounds, 1)
    places = positions(state)
    return {
        "ev3/calls": state.ev3_calls,
        "ev3/round": state.ev3_round,
        "ev3/skipped": state.ev3_round - past.rounds,
        "ev3/overruled": past.overruled,
        **{
            f"ev3/skipped_steps/{name}": count
            for one in state.explore.explorers.values()
            for name, count in _skipped(one).items()
        },
        "ev3/significant": past.significant[row],
        "ev3/examples": past.examples[row],
        "ev3/adopted_score": mean[adopted],
        "ev3/adopted_stderr": past.stderr[row, adopted],
        **{f"ev3/adopted/{name}": one_hot[at] for name, at in places.items()},
        **{f"ev3/score/{name}": mean[at] for name, at in places.items()},
        **{
            f"ev3/objective/{other}/{name}": values[at]
            for other, values in others.items()
            for name, at in places.items()
        },
        **{
            f"ev3/valid/{name}": valid[at].astype(jnp.int32)
            for name, at in places.items()
        },
        **{f"ev3/share/{name}": share[at] for name, at in places.items()},
        **{
            f"ev3/hyperparams/{group}/{name}": jnp.median(values[row])
            for group, names in past.hyperparams.items()
            for name, values in names.items()
        },
    }


def _skipped(one: ExplorerState) -> dict[str, jax.Array]:
    """Steps that came to nothing, by the names of an explorer or a sweep's members."""
    members = sorted(one.positions, key=lambda name: place_index(one.positions[name]))
    if one.skipped.ndim == 0:
        return dict.fromkeys(members, one.skipped)
    return {name: one.skipped[i] for i, name in enumerate(members)}


def history(state: Any, confidence: float = 0.95) -> dict[str, np.ndarray]:
    """The last rounds, oldest first.

    Args:
      state: As for :func:`stable_params`, with concrete arrays: not under ``jit``.
      confidence: Of ``lower`` and ``upper``, two-sided.

    Returns:
      NumPy arrays, R rounds by C candidates by M objectives; R is at most
      ``history_length``, and rounds in which nothing was valid are not among them:

      - ``round`` ``[R]``: the number of the round among the recorded ones, from 0;
      - ``candidates`` ``[C]``: the names of the candidates, in their order;
      - ``explorer`` ``[C]``: index of the explorer that each of them is, or is an
        average of; -1 for ``current`` and ``stable``;
      - ``adopted`` ``[R]``: index of the adopted candidate;
      - ``significant`` ``[R]`` bool: whether stable was replaced;
      - ``length`` ``[R]``: calls of ``update`` in each branch of the round;
      - ``paused`` ``[R, C]`` bool: which candidates took no part, and cost nothing:
        those of explorers that a race of branches paused, or that were not at work in
        the turn of a relay;
      - ``examples`` ``[R]``: how many were looked at, 0 for single figures;
      - ``mean``, ``stderr`` ``[R, C]``: scores and their errors, by the main objective
        where the rule takes several; NaN where they are not finite, or the candidate
        was paused;
      - ``lower``, ``upper`` ``[R, C]``: normal bounds of these means, each alone;
      - ``z`` ``[R, C]``: the evidence that a candidate is better than ``current``,
        paired, in standard normal units; NaN like the means;
      - ``mean/OTHER``, ``stderr/OTHER``: by each further objective;
      - ``objectives`` ``[M]``: the names that the rule gives, the main one first;
        empty for a rule that takes one of any name;
      - ``priorities`` ``[R, M]``: what each of them weighed, NaN where the rule does
        not weigh them;
      - ``hyperparams/GROUP/NAME`` ``[R, G]``: numbers of the G members of an evolving
        group (:func:`optax_ev3.evolve`) in that round.

    Raises:
      TypeError: If ``state`` is traced.
      ValueError: If ``confidence`` is not between 0 and 1; if ``state`` holds no state
        of ev3, or more than one, or is that of several runs under ``vmap``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3({"sgd": optax.sgd(0.1)}, lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> past = optax_ev3.history(state)
      >>> print(past["candidates"][past["adopted"]], past["mean"].shape)
      ['sgd'] (1, 3)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
    wide = NormalDist().inv_cdf((1 + confidence) / 2)
    state = find(state)
    if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(state.history)):
        raise TypeError("history needs concrete arrays: call it outside of jit.")
    past = jax.tree.map(np.asarray, state.history)
    if past.rounds.ndim:
        raise ValueError(
            f"history takes one run at a time, got a batch of shape "
            f"{past.rounds.shape}: index the state first."
        )
    kept = min(int(past.rounds), len(past.adopted))
    number = np.arange(int(past.rounds) - kept, int(past.rounds))
    rows = number % len(past.adopted)
    valid = past.valid[rows] > 0
    mean, stderr, z = (
        np.where(valid, values[rows], np.nan)
        for values in (past.mean, past.stderr, past.z)
    )
    names = candidates(state)
    explorers = sum(len(one.positions) for one in state.explore.explorers.values())
    # First the explorers, then their averages, as many of each kind.
    owner = np.arange(len(names)) % explorers
    owner[-2:] = -1
    named = past.objectives
    objectives = sorted(named, key=lambda name: named[name])
    weights = np.stack([past.priorities[k][rows] for k in objectives] or [rows * 0.0])
    weighed = weights.any(axis=0)
    return {
        "round": number,
        "candidates": np.array(names),
        "explorer": owner,
        "adopted": past.adopted[rows],
        "significant": past.significant[rows] > 0,
        "length": past.length[rows],
        "paused": past.valid[rows] < 0,
        "examples": past.examples[rows],
        "mean": mean,
        "stderr": stderr,
        "lower": mean - wide * stderr,
        "upper": mean + wide * stderr,
        "z": z,
        "objectives": np.array(objectives, str),
        "priorities": np.where(weighed, weights, np.nan).T[:, : len(objectives)],
        **{
            f"hyperparams/{group}/{name}": values[rows]
            for group, names in past.hyperparams.items()
            for name, values in names.items()
        },
        **{
            f"{kind}/{name}": np.where(valid, values[rows], np.nan)
            for name, old in past.others.items()
            for kind, values in old._asdict().items()
        },
    }
