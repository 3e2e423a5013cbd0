"""Evolution: explorers whose hyperparameters move with training.

Dimensions: ``G`` members of a group.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ev3._src.base import checks, evidence, trees
from optax_ev3._src.explore import explorers as explore
from optax_ev3._src.history import record

# Of a step, as a share of the range: at the start, at the least, at the most.
_FIRST, _LEAST, _MOST = 0.15, 0.005, 0.25
# By factors: how far members of the first round are apart, and the most of a step. Both
# in powers of 10, since what does harm does not depend on the range.
_APART, _FARTHEST = 0.75, 0.5
# What the last round weighs in the path, where all members are drawn anew, and the most
# by which the logarithm of a spread then changes.
_LATELY = 0.3
_NOISE = 0.4  # standard deviation of a step, in spreads, where all are equally good


class Range(NamedTuple):
    """Where a hyperparameter may lie, and how it moves.

    Attributes:
      low: The least value.
      high: The greatest.
      start: Where the search begins, or None for all over the range.
      logarithmic: Whether it moves by factors, and not by differences.
    """

    low: float
    high: float
    start: float | None
    logarithmic: bool

    def place(self, value: Any, xp: Any = jnp) -> Any:
        """Where a value lies between ``low``, 0, and ``high``, 1.

        ``xp`` is NumPy or jax.numpy, as elsewhere in this class.
        """
        if self.logarithmic:
            # No quotient: it may overflow.
            return (xp.log(value) - math.log(self.low)) / self._factors
        return (value - self.low) / (self.high - self.low)

    @property
    def most(self) -> float:
        """The greatest spread of a step, as a share of the range."""
        return min(_MOST, self._decades(_FARTHEST)) if self.logarithmic else _MOST

    @property
    def _factors(self) -> float:
        return math.log(self.high) - math.log(self.low)

    def _decades(self, count: float) -> float:
        return count * math.log(10) / self._factors

    def first(self, size: int) -> np.ndarray:
        """Where the members begin, as places ``[size]``."""
        quantiles = (np.arange(size) + 0.5) / size
        if self.start is None:
            return quantiles
        start = self.place(self.start, np)
        if not self.logarithmic:
            return _reflected(start + 2 * _MOST * (quantiles - 0.5), np)
        # From the start downwards: rates that are too large lower the loss at first,
        # and do lasting harm; those that are too small only lose time. Where there is
        # little room below, a part of the range.
        span = min(self._decades(_APART) * (size - 1), max(start, _MOST))
        return max(start - span, 0) + np.linspace(0, span, size)

    def value(self, place: Any, xp: Any = jnp) -> Any:
        """The value at a place, brought into the bounds: float32."""
        if self.logarithmic:
            found = xp.exp(math.log(self.low) + place * self._factors)
        else:
            found = self.low + place * (self.high - self.low)
        return xp.clip(found, self.low, self.high).astype(np.float32)


def log_uniform(low: float, high: float, start: float | None = None) -> Range:
    """A range of positive numbers that is searched by factors, as for learning rates.

    Args:
      low: The least value, above 0.
      high: The greatest.
      start: Where the search begins; default: all over the range.

    Returns:
      A range, for :func:`optax_ev3.evolve`.

    Raises:
      TypeError: If a bound is no number.
      ValueError: If the bounds are the wrong way round or not above 0, or ``start`` is
        not between them.

    Examples:
      >>> import optax_ev3
      >>> rate = optax_ev3.log_uniform(1e-6, 1.0, start=1e-3)
    """
    return _range(low, high, start, True)


def uniform(low: float, high: float, start: float | None = None) -> Range:
    """A range that is searched by differences, as for momentum.

    Args:
      low: The least value.
      high: The greatest.
      start: Where the search begins; default: all over the range.

    Returns:
      A range, for :func:`optax_ev3.evolve`.

    Raises:
      TypeError: If a bound is no number.
      ValueError: If the bounds are the wrong way round, or ``start`` is not between
        them.

    Examples:
      >>> import optax_ev3
      >>> momentum = optax_ev3.uniform(0.0, 0.99, start=0.9)
    """
    return _range(low, high, start, False)


def _range(low, high, start, logarithmic):
    low, high = checks.real(low, "low"), checks.real(high, "high")
    most = float(np.finfo(np.float32).max)
    if not (-most <= low < high <= most and np.float32(low) < np.float32(high)):
        raise ValueError(
            f"low must be below high, both finite in float32, got {low} and {high}."
        )
    if logarithmic and low < np.finfo(np.float32).tiny:
        raise ValueError(
            f"low must be above 0 in a logarithmic range, a normal float32, got {low}."
        )
    if start is not None:
        start = checks.real(start, "start")
        if not low <= start <= high:
            raise ValueError(f"start must be from {low} to {high}, got {start}.")
    return Range(low, high, start, logarithmic)


def evolve(
    factory: Callable[..., optax.GradientTransformation],
    space: Mapping[str, Range],
    population: int = 4,
) -> explore.Explorer:
    r"""A group of explorers whose hyperparameters move: no sweep, and no schedule.

    After each round the winner's hyperparameters are kept, and those of members that
    start from other parameters than their own (``restart`` of :func:`optax_ev3.ev3`)
    are drawn anew: normal, by factors in a :func:`optax_ev3.log_uniform` range and by
    differences in a :func:`optax_ev3.uniform` one, in mirrored pairs, within the
    bounds. The winner is the member that was adopted; if none was, the one with the
    highest score. They are drawn around the mean of all members, weighted by
    :math:`e^z` with the paired evidence z of the round against the best: around the
    winner where it is shown to be one, and where all are alike around the middle.
    Scores are those of the main objective, where the rule takes several.

    A :func:`optax_ev3.log_uniform` range with a start is searched from there downwards,
    by powers of 10^0.75 as far as there is room, and there the standard deviation
    :math:`\sigma` is at most half a power of 10: learning rates that are too large
    lower the loss at first, are adopted, and do lasting harm, those that are too small
    only lose time. So the rate rises in a warm-up, a few rounds for each power of 10.

    How far they are drawn follows from the history (cumulative step size adaptation):
    with :math:`\delta` the step of that mean in units of the spread :math:`\sigma`,
    cut to 1 and divided by its standard deviation where all are equally good, and c
    0.3 times the share of the members that are drawn anew,

    .. math:: p \leftarrow (1 - c) p + \sqrt{c (2 - c)}\, \delta, \qquad
              \ln \sigma \leftarrow \ln \sigma + c \min(p^2 - 1, 1),

    so that it grows while the mean moves on in one direction, and shrinks where it
    doesn't. Where no member is finite it grows, and all are drawn anew.

    The hyperparameters are part of the state: nothing is compiled again when they move.
    Short rounds favour learning rates that are too small (Wu et al.), but at the very
    beginning those that are too large; see ``trajectory_length``, ``trajectory_growth``
    and ``restart="behind"`` of :func:`optax_ev3.ev3`. With ``restart_state="copy"``
    inner states follow the winner, too.

    Args:
      factory: Makes an optax transformation from one number of each name, as
        keywords. It is called under ``jax.vmap``: the numbers are traced float32
        scalars.
      space: By name, the range of each hyperparameter. Names that ``factory`` does not
        take are for the explorer's own ``loss_fn``, as arguments of these names:
        ``optax_ev3.explorer(optax_ev3.evolve(...), loss_fn)``. The inner state must not
        hold the numbers, as that of ``optax.inject_hyperparams`` does.
      population: How many members the group has, at least 2.

    Returns:
      An explorer for the ``inner`` argument of :func:`optax_ev3.ev3`, that counts as
      many. They are called NAME/0, NAME/1, ...

    Raises:
      TypeError: If ``factory`` does not make optax transformations, or something else
        than a range is in the space.
      ValueError: If the space is empty, or there are less than two members.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> adams = optax_ev3.evolve(
      ...     optax.adam, {"learning_rate": optax_ev3.log_uniform(1e-6, 1.0, 1e-3)}
      ... )
      >>> adams.members("adam")
      ['adam/0', 'adam/1', 'adam/2', 'adam/3']

    References:
      Jaderberg et al., `Population based training of neural networks
      <https://arxiv.org/abs/1711.09846>`_, 2017; Hansen and Ostermeier, `Completely
      derandomized self-adaptation in evolution strategies
      <https://doi.org/10.1162/106365601750190398>`_, 2001; Wu et al., `Understanding
      short-horizon bias in stochastic meta-optimization
      <https://arxiv.org/abs/1803.02021>`_, 2018.
    """
    if not callable(factory):
        raise TypeError(f"evolve needs a factory of optimizers, got {factory!r}.")
    if not isinstance(space, Mapping):
        raise TypeError(f"space must be a mapping from names, got {space!r}.")
    if not space:
        raise ValueError("space must hold at least one hyperparameter, got none.")
    for name, one in space.items():
        if not isinstance(one, Range):
            raise TypeError(
                f"space[{name!r}] must be a range, such as "
                f"optax_ev3.log_uniform(1e-5, 1.0), got {one!r}."
            )
    size = checks.integer(population, "population", 2)
    # In NumPy, so that a group can be made under jit.
    grid = {}
    for number, (name, one) in enumerate(space.items()):
        order = np.random.default_rng(number).permutation(size) if number else ...
        grid[name] = tuple(one.value(one.first(size), np)[order].tolist())
    return explore.group(factory, grid, dict(space))


class Evolution(NamedTuple):
    """Where the hyperparameters of a group are.

    Attributes:
      hyperparams: By name ``[G]`` float32.
      center: By name ``[]`` float32, the place in the range around which members were
        last drawn.
      spread: By name ``[]`` float32, the standard deviation of a step, as a share of
        the range.
      path: By name ``[]`` float32, the way that the center has gone lately, in steps.
    """

    hyperparams: dict[str, jax.Array]
    center: dict[str, jax.Array]
    spread: dict[str, jax.Array]
    path: dict[str, jax.Array]


def init(one: explore.Explorer) -> Evolution | tuple[()]:
    """Where a group begins; nothing for explorers that don't evolve."""
    if one.space is None or one.grid is None:
        return ()
    grid, space = one.grid, one.space

    def each(fill):
        return {k: jnp.asarray(fill(k), jnp.float32) for k in space}

    return Evolution(
        each(lambda k: grid[k]),
        each(lambda k: space[k].first(one.size).mean()),
        each(lambda k: min(_FIRST, space[k].most)),
        each(lambda _: 0),
    )


def advance(
    explorers: Mapping[str, explore.Explorer],
    groups: Mapping[str, Any],
    past: record.Round,
    owner: jax.Array,
    kinds: int,
    restarted: jax.Array,
    key: jax.Array,
) -> tuple[dict[str, Any], jax.Array]:
    """All groups after a round.

    Where a branch goes on, so do its hyperparameters; those of one that starts from
    other parameters are drawn anew. The winner's are kept: those of the member that was
    adopted, else of the one with the highest score.

    Args:
      explorers: By name.
      groups: By name, where a group is, or nothing for explorers that don't evolve.
      past: The round.
      owner: ``[]`` int32, the explorer that was adopted; K if none was.
      kinds: Candidates of each of the K branches: its end and averages.
      restarted: ``[K]`` bool, branches that start from other parameters.
      key: PRNG key of the round.

    Returns:
      The groups, and ``[K]`` bool, explorers that are others from now on.
    """
    seen, objective = past.seen, past.objective
    total = restarted.shape[0]
    mean = evidence.estimate(seen, objective).mean
    mean = jnp.where(seen.valid, mean, -jnp.inf)
    moved, fresh = dict(groups), jnp.zeros([total], bool)
    for number, (name, places) in enumerate(explore.places(explorers).items()):
        space, own = explorers[name].space, jnp.asarray(places)
        if space is None:
            continue
        # A branch is as good as its end or, where there are any, its averages.
        tried = jnp.stack([kind * total + own for kind in range(kinds)])
        best = tried.ravel()[jnp.argmax(mean[tried.ravel()])]
        z = evidence.compare(seen, objective, best).z
        z = jnp.where(seen.valid, z, -jnp.inf)[tried].max(axis=0)
        winner = jnp.where(jnp.isin(owner, own), owner, own[jnp.argmax(z)])
        # A group that rests stays as it is.
        rests = past.rests[own[0]]
        draws = (restarted[own] | ~seen.valid[own]) & (own != winner)
        draws = (draws | ~jnp.isfinite(z).any()) & ~rests
        new = move(space, groups[name], z, ~draws, jax.random.fold_in(key, number))
        moved[name] = trees.where(rests, groups[name], new)
        fresh = fresh.at[own].set(draws)
    return moved, fresh


def move(
    space: Mapping[str, Range],
    group: Evolution,
    z: jax.Array,
    stays: jax.Array,
    key: jax.Array,
) -> Evolution:
    """The group after a round: some members stay, the others are drawn around the best.

    Args:
      space: The ranges.
      group: Where the group is.
      z: ``[G]``, the evidence of the round for each member, in standard normal units;
        minus infinity where it was not finite.
      stays: ``[G]`` bool, members whose hyperparameters are kept.
      key: PRNG key of the round.
    """
    found = jnp.isfinite(z).any()
    weights = jax.nn.softmax(jnp.where(found, z, 0))
    moved = {}
    for number, (name, one) in enumerate(space.items()):
        values, last = group.hyperparams[name], group.center[name]
        # Members of equal merit pull to all sides: noise does not carry us off.
        center = jnp.where(found, weights @ one.place(values), last)
        # Clipped, so that one long step does not count for many.
        step = jnp.clip((center - last) / group.spread[name], -1, 1) / _NOISE
        # Where few are drawn anew, that the center stays says little.
        lately = _LATELY * jnp.where(found, 1 - stays.mean(), 1)
        path = (1 - lately) * group.path[name]
        path += jnp.sqrt(lately * (2 - lately)) * step
        change = jnp.where(found, jnp.clip(path**2 - 1, -1, 1), 1) * lately
        # Rates that rise in small steps are stopped before they do much harm.
        most = jnp.where(found, one.most, _MOST)
        spread = jnp.clip(group.spread[name] * jnp.exp(change), _LEAST, most)
        size = values.shape[0]
        places = center + spread * _mirrored(jax.random.fold_in(key, number), size)
        values = jnp.where(stays & found, values, one.value(_reflected(places)))
        moved[name] = values, center, spread, path
    columns = zip(*moved.values(), strict=True)
    return Evolution(
        *(
            {k: x.astype(jnp.float32) for k, x in zip(moved, column, strict=True)}
            for column in columns
        )
    )


def _reflected(places: Any, xp: Any = jnp) -> Any:
    """Places, reflected at the bounds, which else would collect what lies beyond."""
    return 1 - xp.abs(1 - xp.abs(places))


def _mirrored(key: jax.Array, size: int) -> jax.Array:
    """Normal draws in pairs of opposite signs, in any order: ``[size]``."""
    half, order = jax.random.split(key)
    draws = jax.random.normal(half, [(size + 1) // 2])
    return jax.random.permutation(order, jnp.concatenate([draws, -draws])[:size])


def found_schedule(
    state: Any, name: str, explorer: str | None = None
) -> optax.Schedule:
    """The schedule that evolution found, to train again without EV3.

    By step, the number of the member whose branch was adopted at the end of the round;
    where none of the group was, the one before goes on, and after the end the last one.
    Rounds in which nothing was finite are not in the history, nor in the schedule.

    Args:
      state: As for :func:`optax_ev3.stable_params`, with concrete arrays.
      name: The hyperparameter.
      explorer: The name of the group; default: the only one that has it.

    Returns:
      A schedule: maps the count of steps, ``[]`` integer, to ``[]`` float32.

    Raises:
      ValueError: If there is no such hyperparameter or several groups have it, if no
        round has ended or no member was adopted in any, or if the history does not
        reach back to the first one: give ``ev3`` a longer ``history_length``.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_ev3
      >>> sgd = optax_ev3.evolve(
      ...     optax.sgd, {"learning_rate": optax_ev3.log_uniform(0.01, 0.1, 0.05)}
      ... )
      >>> tx = optax_ev3.ev3({"sgd": sgd}, lambda w: -(w**2))
      >>> w = jnp.array(2.0)
      >>> _, state = tx.update(2 * w, tx.init(w), w)
      >>> schedule = optax_ev3.found_schedule(state, "learning_rate")
      >>> again = optax.sgd(schedule)
    """
    past = record.history(state)
    having = [
        key.removeprefix("hyperparams/").removesuffix("/" + name)
        for key in past
        if key.startswith("hyperparams/") and key.endswith("/" + name)
    ]
    groups = having if explorer is None else [g for g in having if g == explorer]
    if len(groups) != 1:
        raise ValueError(
            f"expected one evolving group with {name!r}, found {groups}; "
            f"hyperparameters in the history: "
            f"{[k for k in past if k.startswith('hyperparams/')]}."
        )
    if not len(past["round"]):
        raise ValueError("no round has ended yet: there is no schedule.")
    if past["round"][0] > 0:
        raise ValueError(
            f"the history holds the last {len(past['round'])} of "
            f"{past['round'][-1] + 1} rounds, a schedule needs all: give ev3 a longer "
            f"history_length."
        )
    members = past[f"hyperparams/{groups[0]}/{name}"]
    winner = record.winners(past["candidates"], past["adopted"], groups[0])
    if (winner < 0).all():
        raise ValueError(
            f"no member of {groups[0]!r} was adopted in any round: it has no schedule."
        )
    rows = np.arange(len(members))
    known = np.maximum.accumulate(np.where(winner >= 0, rows, -1))
    known = np.where(known < 0, rows[winner >= 0][:1].sum(), known)
    values = jnp.asarray(members[known, winner[known]], jnp.float32)
    ends = jnp.asarray(np.cumsum(past["length"]))

    def schedule(count):
        row = jnp.searchsorted(ends, count, side="right")
        return values[jnp.minimum(row, len(values) - 1)]

    return schedule
