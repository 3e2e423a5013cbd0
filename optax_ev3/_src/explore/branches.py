"""Rounds and branches: trajectories of several steps between two assessments.

Dimensions: ``K`` explorers, ``C`` candidates.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import checks, finite, select, sharding, trees
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExploreState, RoundInfo
from optax_ev3._src.explore import (
    averages,
    calls,
    evolve,
    halving,
    restarts,
    steps,
    strategy,
)
from optax_ev3._src.explore import racing as races
from optax_ev3._src.explore.averages import Average
from optax_ev3._src.explore.branch import (
    Walk,
    after_step,
    begun_anew,
    branches_by_name,
    first_branches,
    stacks,
)
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.halving import SuccessiveHalving
from optax_ev3._src.explore.racing import Racing
from optax_ev3._src.explore.restarts import Never, Restart, WorseThan
from optax_ev3._src.explore.strategy import Candidates, Context, Explored, Finished

_GRADIENTS = ("own", "shared")
# Without a bound on its growth, a length stops growing here.
_LONGEST = 2**24


@dataclasses.dataclass(frozen=True)
class Branches(strategy.Strategy):
    """Trajectories: see :func:`rounds` and :func:`branches`."""

    first_length: int
    growth: float
    max_length: int
    gradients: str | None
    restart: Restart
    averages: tuple[Average, ...]
    racing: Racing | SuccessiveHalving | None
    schedule: optax.Schedule | None = None

    @property
    def restarts(self) -> bool:
        """Whether branches start from what is adopted."""
        return not isinstance(self.restart, Never)

    @property
    def own_gradients(self) -> bool:
        """Whether they are asked for, or there is a loss."""
        return self.gradients == "own"

    def checked(
        self, explorers: Mapping[str, Explorer], has_loss: bool
    ) -> "strategy.Strategy":
        """With the gradients that there are; raises if a loss is missing."""
        gradients = self.gradients or ("own" if has_loss else "shared")
        losses = has_loss or all(
            explorer.loss_fn is not None for explorer in explorers.values()
        )
        if gradients == "own" and not losses:
            raise ValueError(
                'gradients="own" needs a loss_fn: branches differentiate it at their '
                "own parameters."
            )
        race = self.racing
        if isinstance(race, SuccessiveHalving):
            evolve.refuse(
                explorers,
                "explore.SuccessiveHalving pauses single explorers",
                "explore.Racing",
            )
            race = race.begun_by(explorers)
        return dataclasses.replace(self, gradients=gradients, racing=race)

    def init(
        self, explorers: Mapping[str, Explorer], layout: Layout, params: optax.Params
    ) -> ExploreState:
        """All branches at these parameters."""
        race: Any = ()
        if self.racing is not None:
            race = races.init(self.racing.window, layout.candidates)
        lead = 0
        if isinstance(self.racing, SuccessiveHalving):
            lead = layout.names.index(self.racing.first or layout.names[0])
        state = first_branches(
            explorers, layout, params, self.averages, self.first_length, lead
        )
        return state._replace(racing=race)

    def _paused(self, ctx: Context, state: ExploreState) -> dict[str, jax.Array]:
        """Those who lose the race, but for the lead branch, which is visible."""
        if self.racing is None:
            return {}
        lead, found = state.branches.lead, {}
        if isinstance(self.racing, SuccessiveHalving):
            return halving.paused(state.racing, ctx.layout, self.racing, lead)
        as_one = [name for name, one in ctx.explorers.items() if one.space is not None]
        flags = races.paused(state.racing, ctx.layout, self.racing, as_one)
        for name, flag in flags.items():
            leads = jnp.asarray(ctx.layout.rows(name)) == lead
            found[name] = flag & ~(leads if flag.ndim else leads.any())
        return found

    def length(self, state: ExploreState) -> jax.Array:
        """That of this round."""
        return state.branches.length

    def step(self, ctx: Context, state: ExploreState) -> Explored:
        """One step of every branch."""
        walked, paused = state.branches, self._paused(ctx, state)
        call = calls.scaled(ctx.call, self.schedule)
        call = call._replace(own=self.gradients == "own")
        walk = Walk(self.averages, self.gradients, walked, walked.lead, ctx.params)
        moved, alive = {}, {}
        for name, branch in branches_by_name(state, ctx.layout).items():
            explorer = ctx.explorers[name]

            moved[name] = steps.one_by_one(
                walk.advance, explorer, name, call, branch, paused.get(name)
            )
            alive[name] = finite.finite(moved[name].end, size=explorer.size)
            # The next explorer waits for this one.
            lead = select.computed_after(alive[name], walk.lead)
            walk = walk._replace(lead=lead)
        state = after_step(state, ctx.layout, moved, alive)
        return Explored(
            state,
            alive,
            paused,
            is_over=state.branches.step >= state.branches.length,
            is_broken=~jnp.stack([flag.all() for flag in alive.values()]).all(),
        )

    def reinitialized(self, ctx: Context, explored: Explored) -> Any:
        """Branches that are not finite go on from the visible parameters.

        They do so unassessed: the state stays finite without the earlier inner states,
        which are overwritten by then.
        """
        broken = {name: ~flag for name, flag in explored.proposals.items()}
        return lambda state: begun_anew(ctx, state, broken, ctx.params, self.averages)

    def candidates(
        self, ctx: Context, explored: Explored, state: ExploreState, stable: Any
    ) -> Candidates:
        """The ends of the branches, their averages, and where the round began."""
        walked, paused, layout = state.branches, explored.paused, ctx.layout
        ends = [
            explorer.stack(walked.ends[name], paused.get(name))
            for name, explorer in ctx.explorers.items()
        ]
        means = [
            end._replace(tree=averages.like(walked.means[name][kind], end.tree))
            for kind in range(len(self.averages))
            for name, end in zip(ctx.explorers, ends, strict=True)
        ]
        alive = (walked.alive > 0) & ~layout.repeat(paused)
        is_ascent = jnp.zeros([layout.candidates], bool)
        return Candidates(
            [*ends, *means, Stacked(walked.start), Stacked(stable)],
            layout.tile(alive, True),
            is_ascent.at[: layout.explorers].set(walked.is_ascent > 0),
        )

    def finish(
        self,
        ctx: Context,
        explored: Explored,
        candidates: Candidates,
        state: ExploreState,
        stable: Any,
        info: RoundInfo,
    ) -> Finished:
        """Some branches start anew from the adopted parameters, the others go on."""
        del explored
        decision = info.decision
        target = select.pick(decision.adopted, candidates.params)
        # Where the caller gets to, but from where no update leads there.
        visible = trees.plus(ctx.params, finite.towards(target, ctx.params))
        visible = select.where(finite.finite(visible), visible, target)

        def promote(stable: Any) -> Any:
            # What a loop carries, it need not copy.
            params = [*candidates.params[:-1], Stacked(stable)]
            promoted = select.pick(decision.promoted, params)
            is_adopted = decision.promoted == decision.adopted
            new = select.where(is_adopted, visible, promoted)
            return sharding.as_kept(new, stable)

        state, moved = self._restarted(ctx, state, visible, info)
        state, fresh = strategy.evolved(ctx, state, info, moved)
        if self.racing is not None:
            state = state._replace(racing=races.append(state.racing, info))
        stable = select.apply_if(decision.significant, promote, stable)
        return Finished(state, stable, fresh)

    def update(self, ctx: Context, state: ExploreState, move: Any) -> optax.Updates:
        """The way to the lead branch; none without one that is alive."""
        del move
        walked, params = state.branches, ctx.params
        ends = stacks(ctx, walked.ends)
        nowhere, start = ctx.layout.explorers, ctx.layout.explorers + 1
        alive = jnp.append(walked.alive, 0)[walked.lead] > 0
        index = jnp.where(alive, walked.lead, nowhere)
        index = jnp.where(walked.step == 0, start, index)
        stops = [*ends, Stacked(params), Stacked(walked.start)]
        return select.pick(index, stops, lambda end: finite.towards(end, params))

    def _restarted(
        self, ctx: Context, state: ExploreState, visible: optax.Params, info: RoundInfo
    ) -> tuple[ExploreState, jax.Array]:
        """The next round, and ``[K]`` bool, who starts from others' parameters."""
        walked, layout, adopted = state.branches, ctx.layout, info.decision.adopted
        index, owner = jnp.arange(layout.explorers), layout.owner(adopted)
        lead = self.restart.lead(adopted, walked.lead, layout)
        anew = self.restart.restarts(info, lead, layout)
        # Those who are paused go with the others, to come back where these are.
        anew |= info.paused[: layout.explorers]
        moved = anew & (index != owner)
        states = restarts.inner_states(ctx, state, self.restart, visible, moved, owner)
        ends = {
            name: select.where_rows(
                mask,
                select.spread(visible, ctx.explorers[name].size),
                walked.ends[name],
            )
            for name, mask in layout.split(anew).items()
        }
        grown = self.first_length * self.growth ** info.since.astype(jnp.float32)
        length = jnp.minimum(jnp.round(grown), float(self.max_length))
        branches = walked._replace(
            step=jnp.zeros([], jnp.int32),
            length=length.astype(jnp.int32),
            lead=lead.astype(jnp.int32),
            start=sharding.as_kept(visible, walked.start),
            ends=ends,
            alive=jnp.ones_like(walked.alive),
            is_ascent=jnp.zeros_like(walked.is_ascent),
            # Its owner, too, leaves its own path where an average was adopted.
            age=jnp.where(anew & (index != adopted), 0, walked.age),
        )
        state = strategy.with_opt_states(state, states)
        return state._replace(branches=branches), moved


def rounds(
    length: int,
    *,
    growth: float = 1.0,
    max_length: int | None = None,
    gradients: str | None = None,
    restart_state: str = "keep",
    averages: Sequence[Average] = (),
) -> strategy.Strategy:
    """The paper's: trajectories that start each round from the adopted parameters.

    Each explorer takes ``length`` steps on its own before the candidates are assessed.
    Within a round the visible parameters follow the lead branch: that of the explorer
    that was adopted last.

    Args:
      length: Calls of ``update`` between two assessments.
      growth: The length is multiplied by this after every round without a significant
        improvement, and goes back to the start after one.
      max_length: The length stops growing there; None for no bound.
      gradients: Where branches get theirs: ``"own"`` (each from ``loss_fn`` at its own
        parameters; the lead branch uses the caller's) or ``"shared"`` (all use the
        caller's, taken at the lead branch: biased on purpose, and free). Default:
        ``"own"`` with a ``loss_fn``, else ``"shared"``. Explorers with a loss of their
        own always use that.
      restart_state: What becomes of the inner state of a branch that starts from
        parameters that are not its own: ``"keep"`` (as the paper), ``"new"``, or
        ``"copy"`` (the winner's, where its structure is the same, else kept).
      averages: More candidates at no gradient cost: :func:`trajectory_average`,
        :func:`branch_average`.

    Returns:
      For the ``explore`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If a number is traced, or of the wrong kind.
      ValueError: If a number is out of range, or there is no such choice.

    Examples:
      >>> import optax, optax_ev3
      >>> from optax_ev3 import explore
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     loss_fn=lambda w: w**2,
      ...     explore=explore.rounds(10, averages=[explore.trajectory_average()]),
      ... )

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    inner_state = restarts.checked_inner_state(restart_state, "restart_state")
    return _made(
        length, growth, max_length, gradients, Restart(inner_state), averages, None
    )


def branches(
    length: int = 25,
    *,
    growth: float = 1.0,
    max_length: int | None = None,
    gradients: str | None = None,
    restart: Restart | None = None,
    averages: Sequence[Average] = (),
    racing: Racing | SuccessiveHalving | None = None,
    schedule: optax.Schedule | None = None,
) -> strategy.Strategy:
    """Trajectories that go on from where they are.

    As in :func:`rounds`, every explorer takes ``length`` steps on its own, and the best
    candidate becomes visible. But explorers are not brought together again: those that
    are slow at first may turn out to be the best. Those that do not win can be paused.

    Args:
      length: Calls of ``update`` between two assessments.
      growth: See :func:`rounds`.
      max_length: See :func:`rounds`.
      gradients: See :func:`rounds`.
      restart: Which branches start anew from the adopted parameters all the same:
        :func:`never` (default), or :func:`worse_than`.
      averages: See :func:`rounds`.
      racing: Who is paused, and costs nothing then. :class:`Racing`: explorers that do
        not win. :class:`SuccessiveHalving`: the worse half, after each round. Default:
        nobody is paused.
      schedule: Factor of all updates, by calls of ``update`` so far, such as
        ``optax.linear_schedule``: rates that fall in the last part of a training.
        Default: updates are the inner optimizers' own.

    Returns:
      For the ``explore`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If a number is traced, or an argument of the wrong kind.
      ValueError: If a number is out of range, or there is no such choice.

    Examples:
      >>> import optax, optax_ev3
      >>> from optax_ev3 import explore
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     loss_fn=lambda w: w**2,
      ...     explore=explore.branches(
      ...         averages=[explore.branch_average(0.98)], racing=explore.Racing()
      ...     ),
      ... )

    References:
      Jaderberg et al., `Population based training of neural networks
      <https://arxiv.org/abs/1711.09846>`_, 2017; Li et al., `Hyperband
      <https://arxiv.org/abs/1603.06560>`_, 2018.
    """
    if restart is None:
        restart = Never()
    if not isinstance(restart, Never | WorseThan):
        raise TypeError(
            f"restart must be explore.never() or explore.worse_than(...), got "
            f"{restart!r}. For branches that always start from the adopted parameters "
            f"there is explore.rounds."
        )
    if racing is not None and not isinstance(racing, Racing | SuccessiveHalving):
        patience = racing if isinstance(racing, int) else 2
        raise TypeError(
            f"racing must be None, explore.Racing(patience={patience}), or "
            f"explore.SuccessiveHalving(), got {racing!r} of type "
            f"{type(racing).__name__}."
        )
    made = _made(length, growth, max_length, gradients, restart, averages, racing)
    return dataclasses.replace(made, schedule=calls.checked_schedule(schedule))


def _made(
    length: Any,
    growth: Any,
    max_length: Any,
    gradients: str | None,
    restart: Restart,
    kept: Sequence[Average],
    race: Racing | SuccessiveHalving | None,
) -> Branches:
    """The strategy; raises on arguments that make no sense."""
    length = checks.static_int(length, "length")
    growth = checks.static_float(growth, "growth")
    if max_length is None:
        max_length = max(_LONGEST, length)
    max_length = checks.static_int(max_length, "max_length")
    if max_length < length:
        raise ValueError(
            f"max_length must be at least length, {length}, got {max_length}."
        )
    if gradients not in (None, *_GRADIENTS):
        raise ValueError(
            f"gradients must be one of {_GRADIENTS}, or None, got {gradients!r}."
        )
    return Branches(
        first_length=length,
        growth=growth,
        max_length=max_length,
        gradients=gradients,
        restart=restart,
        averages=averages.check(kept),
        racing=race,
    )
