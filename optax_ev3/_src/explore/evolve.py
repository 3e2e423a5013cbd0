"""Evolution: explorers whose hyperparameters move with training.

Dimensions: ``G`` members of a group.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_ev3._src.base import checks, evidence, select
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.states import ExplorerState, RoundInfo
from optax_ev3._src.explore import explorers as members
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.ranges import MOST, Range, reflected

# Of a step, as a share of the range: at the start, at the least.
_FIRST, _LEAST = 0.15, 0.005
# What the last round weighs in the path, where all members are drawn anew, and the most
# by which the logarithm of a spread then changes.
_LATELY = 0.3
_NOISE = 0.4  # standard deviation of a step, in spreads, where all are equally good


def evolve(
    factory: Callable[..., optax.GradientTransformation],
    space: Mapping[str, Range],
    population: int = 4,
) -> Explorer:
    r"""A group of explorers whose hyperparameters move: no sweep, and no schedule.

    After each round the winner's hyperparameters are kept, and those of members that
    start from other parameters than their own (see :mod:`optax_ev3.explore`) are drawn
    anew: normal, by factors in a :func:`optax_ev3.log_uniform` range and by
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
    beginning those that are too large; see ``length``, ``growth`` and
    ``restart=explore.worse_than("start", inner_state="copy")`` of
    :func:`optax_ev3.explore.branches`, with which inner states follow the winner, too.

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
    for name, span in space.items():
        if not isinstance(span, Range):
            raise TypeError(
                f"space[{name!r}] must be a range, such as "
                f"optax_ev3.log_uniform(1e-5, 1.0), got {span!r}."
            )
    size = checks.integer(population, "population", 2)
    # In NumPy, so that a group can be made under jit.
    grid = {}
    for number, (name, span) in enumerate(space.items()):
        order = np.random.default_rng(number).permutation(size) if number else ...
        grid[name] = tuple(span.value(span.first(size), np)[order].tolist())
    return members.group(factory, grid, dict(space))


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


def refuse(explorers: Mapping[str, Explorer], reason: str, instead: str) -> None:
    """Raises if a group evolves, for a strategy that takes none: why, and what does."""
    evolving = [name for name, one in explorers.items() if one.space is not None]
    if evolving:
        raise ValueError(
            f"{reason}, and groups that evolve compare their members in every round: "
            f"take {instead} for {evolving}, or sweep() in place of evolve()."
        )


def init(explorer: Explorer) -> Evolution | tuple[()]:
    """Where a group begins; nothing for explorers that don't evolve."""
    if explorer.space is None or explorer.grid is None:
        return ()
    grid, space = explorer.grid, explorer.space

    def each(fill: Any):
        return {k: jnp.asarray(fill(k), jnp.float32) for k in space}

    return Evolution(
        each(lambda k: grid[k]),
        each(lambda k: space[k].first(explorer.size).mean()),
        each(lambda k: min(_FIRST, space[k].most)),
        each(lambda _: 0),
    )


def advance(
    explorers: Mapping[str, Explorer],
    layout: Layout,
    states: Mapping[str, ExplorerState],
    info: RoundInfo,
    restarted: jax.Array,
) -> tuple[dict[str, ExplorerState], jax.Array]:
    """All explorers after a round, those of groups with new hyperparameters.

    Where a branch goes on, so do its hyperparameters; those of one that starts from
    other parameters are drawn anew. The winner's are kept: those of the member that was
    adopted, else of the one with the highest score.

    Args:
      explorers: By name.
      layout: Where they are among the candidates.
      states: Their states, by name.
      info: The round.
      restarted: ``[K]`` bool, branches that start from other parameters.

    Returns:
      Their states, and ``[K]`` bool, explorers that are others from now on.
    """
    moved, fresh = dict(states), jnp.zeros([layout.explorers], bool)
    key = jax.random.fold_in(info.key, 2)
    owner = layout.owner(info.decision.adopted)
    mean = evidence.estimate(info.evidence, info.objective).mean
    mean = jnp.where(info.evidence.valid, mean, -jnp.inf)
    for number, (name, explorer) in enumerate(explorers.items()):
        if explorer.space is None:
            continue
        own = jnp.asarray(layout.rows(name))
        # A branch is as good as its end or, where there are any, its averages.
        tried = jnp.asarray(layout.all_rows(name)).reshape(layout.kinds, -1)
        best = tried.ravel()[jnp.argmax(mean[tried.ravel()])]
        z = evidence.compare(info.evidence, info.objective, best).z
        z = jnp.where(info.evidence.valid, z, -jnp.inf)[tried].max(axis=0)
        winner = jnp.where(jnp.isin(owner, own), owner, own[jnp.argmax(z)])
        # A group that is paused stays as it is.
        paused = info.paused[own[0]]
        draws = (restarted[own] | ~info.evidence.valid[own]) & (own != winner)
        draws = (draws | ~jnp.isfinite(z).any()) & ~paused
        group = states[name].evolution
        new = move(explorer.space, group, z, ~draws, jax.random.fold_in(key, number))
        moved[name] = states[name]._replace(evolution=select.where(paused, group, new))
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
    for number, (name, span) in enumerate(space.items()):
        values, last = group.hyperparams[name], group.center[name]
        # Members of equal merit pull to all sides: noise does not carry us off.
        center = jnp.where(found, weights @ span.place(values), last)
        # Clipped, so that one long step does not count for many.
        step = jnp.clip((center - last) / group.spread[name], -1, 1) / _NOISE
        # Where few are drawn anew, that the center stays says little.
        lately = _LATELY * jnp.where(found, 1 - stays.mean(), 1)
        path = (1 - lately) * group.path[name]
        path += jnp.sqrt(lately * (2 - lately)) * step
        change = jnp.where(found, jnp.clip(path**2 - 1, -1, 1), 1) * lately
        # Rates that rise in small steps are stopped before they do much harm.
        most = jnp.where(found, span.most, MOST)
        spread = jnp.clip(group.spread[name] * jnp.exp(change), _LEAST, most)
        size = values.shape[0]
        places = center + spread * _mirrored(jax.random.fold_in(key, number), size)
        values = jnp.where(stays & found, values, span.value(reflected(places)))
        moved[name] = values, center, spread, path
    columns = zip(*moved.values(), strict=True)
    return Evolution(
        *(
            {k: x.astype(jnp.float32) for k, x in zip(moved, column, strict=True)}
            for column in columns
        )
    )


def _mirrored(key: jax.Array, size: int) -> jax.Array:
    """Normal draws in pairs of opposite signs, in any order: ``[size]``."""
    half, order = jax.random.split(key)
    draws = jax.random.normal(half, [(size + 1) // 2])
    return jax.random.permutation(order, jnp.concatenate([draws, -draws])[:size])
