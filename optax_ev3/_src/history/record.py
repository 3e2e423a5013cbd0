"""Record: what happened in past rounds, and what a person wants to know of it.

Dimensions: ``H`` rounds kept, ``C`` candidates, ``M`` objectives, ``G`` members of an
evolving group.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import core

from optax_ev3._src.base.decision import Decision
from optax_ev3._src.base.evidence import Estimate, Evidence, compare, estimate
from optax_ev3._src.explore import explorers as explore
from optax_ev3._src.history import credit as credits

# Candidates that are no explorers.
ALWAYS = (explore.CURRENT, explore.STABLE)

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


class Record(NamedTuple):
    """Ring buffer of the last H rounds, and totals over all of them.

    Attributes:
      rounds: ``[]`` int32, rounds recorded.
      since: ``[]`` int32, rounds since stable was last replaced.
      ended: ``[]`` int32, rounds that had ended when the last one was recorded; more
        may have since, in which nothing was valid.
      adopted: ``[H]`` int32, index of the adopted candidate.
      significant: ``[H]`` int32, 1 where stable was replaced.
      mean: ``[H, C]`` float32, mean scores by the main objective; where not valid the
        last one before, zero without one.
      stderr: ``[H, C]`` float32, their standard errors; zero where not valid.
      z: ``[H, C]`` float32, the evidence against ``current``, paired, in standard
        normal units; zero where not valid.
      others: Means and standard errors of the other objectives, by name, alike.
      valid: ``[H, C]`` int32, 1 where update and scores were finite, 0 where not, and
        -1 where the candidate rested.
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
    ended: jax.Array
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
    credit: credits.Credit
    overruled: jax.Array


class ExplorerState(NamedTuple):
    """State of one explorer.

    Attributes:
      positions: By name, of the explorer or of every member of a sweep, its place among
        the candidates, see :func:`place`.
      opt_state: State of its inner optimizer; PRNG keys in it are raw key data.
      skipped: ``[]`` int32, or ``[G]`` for a sweep of G members, steps that came to
        nothing since gradients, update or parameters were not finite.
      evolution: The hyperparameters of a group that evolves, else nothing.
    """

    positions: dict[str, dict[str, jax.Array]]
    opt_state: Any
    skipped: jax.Array
    evolution: Any = ()


class EV3State(NamedTuple):
    """State of :func:`optax_ev3.ev3`: arrays only.

    Attributes:
      ev3_round: ``[]`` int32, rounds that have ended.
      ev3_calls: ``[]`` int32, calls of ``update`` so far.
      ev3_key: Raw key data of the transformation's own randomness; it never changes.
      explorers: By name, their positions among the candidates and inner states.
      combined: By name, the places of the combined candidates.
      trajectory: Where the branches are; nothing if all rounds have one step.
      stable: The best parameters known to be good, a tree like params.
      rule_state: What the rule remembers of past rounds.
      guarded: What the guard remembers; nothing without one.
      record: Past rounds, see :func:`optax_ev3.history`.
      racing: What the race knows of the last rounds; nothing without one.
    """

    ev3_round: jax.Array
    ev3_calls: jax.Array
    ev3_key: jax.Array
    explorers: dict[str, ExplorerState]
    combined: dict[str, dict[str, jax.Array]]
    trajectory: Any
    stable: Any
    rule_state: Any
    guarded: Any
    record: Record
    racing: Any


def empty(
    length: int,
    candidates: int,
    objectives: Sequence[str] = (),
    hyperparams: Mapping[str, Mapping[str, jax.Array]] | None = None,
) -> Record:
    """A record of nothing, for H = ``length`` and C = ``candidates``."""

    def blank():
        return jnp.zeros([length, candidates], jnp.float32)

    def rows(row):
        return jnp.zeros([length, *jnp.shape(row)], jnp.float32)

    return Record(
        rounds=jnp.zeros([], jnp.int32),
        since=jnp.zeros([], jnp.int32),
        ended=jnp.zeros([], jnp.int32),
        adopted=jnp.zeros([length], jnp.int32),
        significant=jnp.zeros([length], jnp.int32),
        mean=blank(),
        stderr=blank(),
        z=blank(),
        others={name: Estimate(blank(), blank()) for name in objectives[1:]},
        valid=jnp.zeros([length, candidates], jnp.int32),
        length=jnp.zeros([length], jnp.int32),
        examples=jnp.zeros([length], jnp.int32),
        objectives={k: jnp.asarray(i, jnp.int32) for i, k in enumerate(objectives)},
        priorities={name: rows(0.0) for name in objectives},
        hyperparams=jax.tree.map(rows, _dicts(hyperparams or {})),
        adoptions=jnp.zeros([candidates], jnp.int32),
        credit=credits.nothing(candidates - 2),
        overruled=jnp.zeros([], jnp.int32),
    )


class Round(NamedTuple):
    """What the record keeps of a round, beside the decision.

    Attributes:
      seen: The evidence, after the guard.
      objective: The main one.
      objectives: All that the rule names, in its order.
      rests: ``[C]`` bool, which candidates were not explored.
      length: ``[]`` int32, calls of ``update`` in each branch.
      examples: ``[]`` int32, how many had scores of their own.
      ended: ``[]`` int32, rounds that have ended, with this one.
      hyperparams: By evolving group and name ``[G]``.
      overruled: ``[]`` bool, whether the rule decided on what was not valid.
    """

    seen: Evidence
    objective: str
    objectives: tuple[str, ...]
    rests: jax.Array
    length: jax.Array
    examples: jax.Array
    ended: jax.Array
    hyperparams: Mapping[str, Mapping[str, jax.Array]]
    overruled: jax.Array


def append(record: Record, decision: Decision, last: Round) -> Record:
    """The record with one more round, which takes the place of the oldest."""
    row = record.rounds % record.adopted.shape[0]
    seen = last.seen
    current = seen.valid.shape[0] - 2

    def put(past, new):
        return past.at[row].set(new.astype(past.dtype))

    def clean(past, new):
        return put(past, jnp.where(seen.valid, new, 0))

    def keep(past, new):
        return put(past, jnp.where(seen.valid, new, past[row - 1]))

    def both(past, new):
        return Estimate(keep(past.mean, new.mean), clean(past.stderr, new.stderr))

    newest = estimate(seen, last.objective)
    main = both(Estimate(record.mean, record.stderr), newest)
    valid = jnp.where(last.rests, -1, seen.valid.astype(jnp.int32))
    others = {k: both(past, estimate(seen, k)) for k, past in record.others.items()}
    weights = decision.priorities
    if weights is not None and jnp.shape(weights) != (len(last.objectives),):
        raise ValueError(
            f"a rule must give a priority for each of its objectives, "
            f"{list(last.objectives)}, got shape {jnp.shape(weights)}."
        )
    priorities = {
        name: put(past, jnp.zeros([]) if weights is None else weights[number])
        for name, past in record.priorities.items()
        for number in [last.objectives.index(name)]
    }
    hyperparams = jax.tree.map(put, record.hyperparams, _dicts(last.hyperparams))
    since = jnp.asarray(optax.safe_increment(record.since))
    rounds = jnp.asarray(optax.safe_increment(record.rounds))
    return record._replace(
        rounds=rounds,
        since=jnp.where(decision.significant, 0, since),
        ended=last.ended,
        adopted=put(record.adopted, decision.adopted),
        significant=put(record.significant, decision.significant),
        mean=main.mean,
        stderr=main.stderr,
        z=clean(record.z, compare(seen, last.objective, current).z),
        others=others,
        valid=put(record.valid, valid),
        length=put(record.length, last.length),
        examples=put(record.examples, last.examples),
        priorities=priorities,
        hyperparams=hyperparams,
        # Together as many as rounds, which are counted up to the greatest int32.
        adoptions=record.adoptions.at[decision.adopted].add(rounds - record.rounds),
        credit=credits.add(record.credit, valid, newest.mean),
        overruled=jnp.where(
            last.overruled, optax.safe_increment(record.overruled), record.overruled
        ),
    )


def _dicts(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group: dict(names) for group, names in groups.items()}


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
        where it was paused, or it was another one's turn, none was due;
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
    record = state.record
    row = (record.rounds - 1) % record.adopted.shape[0]
    adopted = record.adopted[row]
    valid = record.valid[row] > 0
    mean = record.mean[row]
    others = {name: past.mean[row] for name, past in record.others.items()}
    one_hot = (jnp.arange(valid.shape[0]) == adopted) & (record.rounds > 0)
    one_hot = one_hot.astype(jnp.int32)
    share = record.adoptions / jnp.maximum(record.rounds, 1)
    places = positions(state)
    return {
        "ev3/calls": state.ev3_calls,
        "ev3/round": state.ev3_round,
        "ev3/skipped": state.ev3_round - record.rounds,
        "ev3/overruled": record.overruled,
        **{
            f"ev3/skipped_steps/{name}": count
            for one in state.explorers.values()
            for name, count in _skipped(one).items()
        },
        "ev3/significant": record.significant[row],
        "ev3/examples": record.examples[row],
        "ev3/adopted_score": mean[adopted],
        "ev3/adopted_stderr": record.stderr[row, adopted],
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
            for group, names in record.hyperparams.items()
            for name, values in names.items()
        },
    }


def _skipped(one: ExplorerState) -> dict[str, jax.Array]:
    """Steps that came to nothing, by the names of an explorer or a sweep's members."""
    members = sorted(one.positions, key=lambda name: _index(one.positions[name]))
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
      - ``adopted`` ``[R]``: index of the adopted candidate;
      - ``significant`` ``[R]`` bool: whether stable was replaced;
      - ``length`` ``[R]``: calls of ``update`` in each branch of the round;
      - ``examples`` ``[R]``: how many were looked at, 0 for single figures;
      - ``mean``, ``stderr`` ``[R, C]``: scores and their errors, by the main objective
        where the rule takes several; NaN where they are not finite, or the candidate
        rested (see ``race`` of :func:`optax_ev3.ev3`);
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
    if any(isinstance(leaf, core.Tracer) for leaf in jax.tree.leaves(state.record)):
        raise TypeError("history needs concrete arrays: call it outside of jit.")
    record = jax.tree.map(np.asarray, state.record)
    if record.rounds.ndim:
        raise ValueError(
            f"history takes one run at a time, got a batch of shape "
            f"{record.rounds.shape}: index the state first."
        )
    kept = min(int(record.rounds), len(record.adopted))
    number = np.arange(int(record.rounds) - kept, int(record.rounds))
    rows = number % len(record.adopted)
    valid = record.valid[rows] > 0
    mean, stderr, z = (
        np.where(valid, values[rows], np.nan)
        for values in (record.mean, record.stderr, record.z)
    )
    named = record.objectives
    objectives = sorted(named, key=lambda name: named[name])
    weights = np.stack([record.priorities[k][rows] for k in objectives] or [rows * 0.0])
    weighed = weights.any(axis=0)
    return {
        "round": number,
        "candidates": np.array(candidates(state)),
        "adopted": record.adopted[rows],
        "significant": record.significant[rows] > 0,
        "length": record.length[rows],
        "examples": record.examples[rows],
        "mean": mean,
        "stderr": stderr,
        "lower": mean - wide * stderr,
        "upper": mean + wide * stderr,
        "z": z,
        "objectives": np.array(objectives, str),
        "priorities": np.where(weighed, weights, np.nan).T[:, : len(objectives)],
        **{
            f"hyperparams/{group}/{name}": values[rows]
            for group, names in record.hyperparams.items()
            for name, values in names.items()
        },
        **{
            f"{kind}/{name}": np.where(valid, values[rows], np.nan)
            for name, past in record.others.items()
            for kind, values in past._asdict().items()
        },
    }


def place(index: int) -> dict[str, jax.Array]:
    """The place of a candidate among all, as a part of the state.

    The index is in the key, too, and so in the structure of the state: one of explorers
    in another order does not fit, wherever it is restored. (Flax NNX would take a plain
    number for the index of a sequence.)
    """
    return {f"candidate_{index}": jnp.asarray(index, jnp.int32)}


def _index(place: Mapping[str, Any]) -> int:
    (key,) = place
    return int(key.removeprefix("candidate_"))


def positions(state: Any) -> dict[str, int]:
    """Index of every candidate by its name."""
    named = dict(state.combined)
    for one in state.explorers.values():
        named.update(one.positions)
    count = len(named)
    found = {name: _index(place) for name, place in named.items()}
    return {**found, explore.CURRENT: count, explore.STABLE: count + 1}


def candidates(state: Any) -> list[str]:
    """The names of all candidates, in their order."""
    places = positions(state)
    return sorted(places, key=lambda name: places[name])


def winners(candidates: Iterable[str], adopted: Any, group: str) -> np.ndarray:
    """By round ``[R]``, the member of a group whose end or average was adopted, or -1.

    Args:
      candidates: Their names.
      adopted: Which one, by round.
      group: The name of the group, whose members are called ``GROUP/i``.
    """
    member = re.compile(rf"(?:(?:branch_)?average/)?{re.escape(group)}/(\d+)")
    found = map(member.fullmatch, candidates)
    owners = np.array([int(match[1]) if match else -1 for match in found])
    return owners[np.asarray(adopted, int)]


def groups(state: Any) -> list[jax.Array]:
    """Where the members of evolving groups are among the candidates."""
    return [
        jnp.asarray([_index(place) for place in one.positions.values()])
        for one in state.explorers.values()
        if one.evolution != ()
    ]


def find(tree: Any) -> EV3State:
    """The only state of ev3 in ``tree``; its record and its counters are arrays."""

    def is_state(node):
        return isinstance(node, EV3State)

    found = [x for x in jax.tree.leaves(tree, is_leaf=is_state) if is_state(x)]
    if len(found) != 1:
        raise ValueError(
            f"expected a tree with one state of ev3, found {len(found)} in "
            f"{type(tree).__name__}."
        )
    state = found[0]
    return state._replace(
        ev3_round=_unboxed(state.ev3_round),
        ev3_calls=_unboxed(state.ev3_calls),
        explorers={
            name: one._replace(skipped=_unboxed(one.skipped))
            for name, one in state.explorers.items()
        },
        record=_unboxed(state.record),
    )


def _unboxed(tree: Any) -> Any:
    """The arrays of a tree of tuples and dictionaries, whatever they are kept in.

    Flax NNX keeps each in a variable: a node of its own, with one leaf.
    """

    def is_box(node):
        return not isinstance(node, tuple | dict)

    def unbox(box):
        (leaf,) = jax.tree.leaves(box)
        # Variables may be leaves themselves, or hold a reference to the array.
        return leaf if isinstance(leaf, _ARRAYS) else leaf[...]

    return jax.tree.map(unbox, tree, is_leaf=is_box)
