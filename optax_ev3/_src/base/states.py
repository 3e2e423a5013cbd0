"""The state of the transformation, and what is known of a round.

Dimensions: ``K`` explorers, those of sweeps counted one by one, ``C`` candidates, ``H``
rounds kept, ``G`` members of a sweep or an evolving group.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base.decision import Decision
from optax_ev3._src.base.evidence import Estimate, Evidence


class ExplorerState(NamedTuple):
    """State of one explorer.

    Attributes:
      positions: By name, of the explorer or of every member of a sweep, its place among
        the candidates, see :func:`place`.
      opt_state: State of its inner optimizer; PRNG keys in it are raw key data.
      skipped: ``[]`` int32, or ``[G]`` for a sweep of G members, steps that came to
        nothing since gradients, update or parameters were not finite.
      evolution: The hyperparameters of a group that evolves, else nothing.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3({"adam": optax.adam(0.1)}, lambda w: -(w**2))
      >>> explorers = tx.init(jnp.zeros([])).explore.explorers
      >>> print(explorers["adam"].opt_state[0].count)
      0
    """

    positions: dict[str, dict[str, jax.Array]]
    opt_state: Any
    skipped: jax.Array
    evolution: Any = ()


class ExploreState(NamedTuple):
    """State of the stage that explores.

    Attributes:
      explorers: By name.
      averages: By name, the places of the averages among the candidates.
      branches: Where the explorers are; nothing where all start from the visible
        parameters in each call.
      racing: What the race knows of the last rounds; nothing without one.
    """

    explorers: dict[str, ExplorerState]
    averages: dict[str, dict[str, jax.Array]]
    branches: Any = ()
    racing: Any = ()


class Credit(NamedTuple):
    """Faded sums over all rounds, for each candidate but ``current`` and ``stable``.

    Attributes:
      ahead: ``[C - 2]`` float32, how far it was ahead of the others.
      weight: ``[C - 2]`` float32, what the rounds weigh in which it took part.
    """

    ahead: jax.Array
    weight: jax.Array


class History(NamedTuple):
    """Ring buffer of the last H rounds, and totals over all of them.

    Attributes:
      rounds: ``[]`` int32, rounds recorded.
      since: ``[]`` int32, rounds since stable was last replaced.
      adopted: ``[H]`` int32, index of the adopted candidate.
      significant: ``[H]`` int32, 1 where stable was replaced.
      mean: ``[H, C]`` float32, mean scores by the main objective; where not valid the
        last one before, zero without one.
      stderr: ``[H, C]`` float32, their standard errors; zero where not valid.
      z: ``[H, C]`` float32, the evidence against ``current``, paired, in standard
        normal units; zero where not valid.
      others: Means and standard errors of the other objectives, by name, alike.
      valid: ``[H, C]`` int32, 1 where update and scores were finite, 0 where not, and
        -1 where the candidate was paused.
      length: ``[H]`` int32, calls of ``update`` in each branch of the round.
      examples: ``[H]`` int32, examples with scores of their own.
      objectives: By name, ``[]`` int32, the place of each objective that the rule
        names.
      priorities: By name, ``[H]`` float32, what each of them weighed; all zero where
        the rule does not weigh them.
      hyperparams: By evolving group and name ``[H, G]`` float32.
      adoptions: ``[C]`` int32, how often each candidate was adopted, over all rounds.
      credit: How good each candidate has been lately.
      overruled: ``[]`` int32, rounds in which the rule decided on a candidate that was
        not valid.
    """

    rounds: jax.Array
    since: jax.Array
    adopted: jax.Array
    significant: jax.Array
    mean: jax.Array
    stderr: jax.Array
    z: jax.Array
    others: dict[str, Estimate]
    valid: jax.Array
    length: jax.Array
    examples: jax.Array
    objectives: dict[str, jax.Array]
    priorities: dict[str, jax.Array]
    hyperparams: dict[str, dict[str, jax.Array]]
    adoptions: jax.Array
    credit: Credit
    overruled: jax.Array


class EV3State(NamedTuple):
    """State of :func:`optax_ev3.ev3`: arrays only.

    Attributes:
      ev3_round: ``[]`` int32, rounds that have ended.
      ev3_calls: ``[]`` int32, calls of ``update`` so far.
      ev3_key: Raw key data of the transformation's own randomness; it never changes.
      explore: Where the explorers are.
      stable: The best parameters known to be good, a tree like params.
      rule_state: What the rule remembers of past rounds.
      history: Past rounds, see :func:`optax_ev3.history`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> tx = optax_ev3.ev3({"adam": optax.adam(0.1)}, lambda w: -(w**2))
      >>> state = tx.init(jnp.zeros([]))
      >>> print(state.ev3_calls, state.stable)
      0 0.0
    """

    ev3_round: jax.Array
    ev3_calls: jax.Array
    ev3_key: jax.Array
    explore: ExploreState
    stable: optax.Params
    rule_state: Any
    history: History


def put_row(buffer: jax.Array, count: jax.Array, row: jax.Array) -> jax.Array:
    """The ring buffer, of ``count`` rows so far, with the newest for the oldest."""
    return buffer.at[count % buffer.shape[0]].set(row.astype(buffer.dtype))


class RoundInfo(NamedTuple):
    """A round that ends.

    Attributes:
      evidence: What may be told of the scores.
      objective: The main one.
      objectives: All that the rule names, in its order.
      decision: What is done.
      overruled: ``[]`` bool, whether the rule decided on what was not valid.
      explored: ``[]`` bool, whether any proposal was valid. If not, the round decides
        nothing and teaches nothing.
      paused: ``[C]`` bool, which candidates took no part.
      length: ``[]`` int32, calls of ``update`` in each branch.
      examples: ``[]`` int32, how many had scores of their own.
      since: ``[]`` int32, rounds since stable was last replaced.
      hyperparams: By evolving group and name ``[G]``.
      key: PRNG key of the round.
    """

    evidence: Evidence
    objective: str
    objectives: tuple[str, ...]
    decision: Decision
    overruled: jax.Array
    explored: jax.Array
    paused: jax.Array
    length: jax.Array
    examples: jax.Array
    since: jax.Array
    hyperparams: Mapping[str, Mapping[str, jax.Array]]
    key: jax.Array

    @property
    def validity(self) -> jax.Array:
        """``[C]`` int32, 1 for valid candidates, -1 for paused ones, 0 for others."""
        return jnp.where(self.paused, -1, self.evidence.valid.astype(jnp.int32))


def place(index: int) -> dict[str, jax.Array]:
    """The place of a candidate among all, as a part of the state.

    The index is in the key, too, and so in the structure of the state: one of explorers
    in another order does not fit, wherever it is restored. (Flax NNX would take a plain
    number for the index of a sequence.)
    """
    return {f"candidate_{index}": jnp.asarray(index, jnp.int32)}


def place_index(place: Mapping[str, Any]) -> int:
    """The index that :func:`place` was given."""
    (key,) = place
    return int(key.removeprefix("candidate_"))


def hyperparams(
    explorers: Mapping[str, ExplorerState],
) -> dict[str, dict[str, jax.Array]]:
    """By evolving group, the numbers of its members."""
    return {
        name: dict(one.evolution.hyperparams)
        for name, one in explorers.items()
        if one.evolution != ()
    }
