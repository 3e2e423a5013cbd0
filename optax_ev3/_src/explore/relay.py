"""A relay: branches that take turns with the caller's gradients, one at a time.

Dimensions: ``K`` explorers, ``C`` candidates.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import checks, evidence, finite, select, sharding, trees
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExploreState, RoundInfo
from optax_ev3._src.explore import (
    at_work,
    calls,
    evolve,
    inner,
    restarts,
    steps,
    strategy,
    turns,
)
from optax_ev3._src.explore import averages as _averages
from optax_ev3._src.explore.averages import Average
from optax_ev3._src.explore.branch import (
    Branch,
    BranchesState,
    Walk,
    first_branches,
    first_means,
    stacks,
)
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.racing import Racing
from optax_ev3._src.explore.strategy import Candidates, Context, Explored, Finished

# A challenge takes turns from the leader: it is short.
_RACING = Racing(patience=1, window=2)
# Of so many steps, one enters the averages: they would take as long as the optimizer.
_EVERY = 5
# What the way to a branch may lose of it by rounding: a few times what bfloat16 does.
_ROUNDED = 1 / 64


@dataclasses.dataclass(frozen=True)
class Relay(strategy.Strategy):
    """See :func:`relay`."""

    max_length: int
    averages: tuple[Average, ...]
    racing: Racing | None
    schedule: optax.Schedule | None = None
    takes_turns = True

    @property
    def restarts(self) -> bool:
        """Branches go on from where they are."""
        return False

    def checked(
        self, explorers: Mapping[str, Explorer], has_loss: bool
    ) -> "strategy.Strategy":
        """Raises if a group evolves."""
        del has_loss
        evolve.refuse(
            explorers,
            "explore.relay tries one explorer at a time",
            "explore.branches",
        )
        return self

    @property
    def _lasting(self) -> tuple[Average | None, ...]:
        """The averages that a branch keeps while it waits; gaps for the others."""
        return tuple(one if one.lasts else None for one in self.averages)

    @property
    def _of_turn(self) -> tuple[Average | None, ...]:
        """The averages over a turn; gaps for the others."""
        return tuple(None if one.lasts else one for one in self.averages)

    def init(
        self, explorers: Mapping[str, Explorer], layout: Layout, params: optax.Params
    ) -> ExploreState:
        """All branches at these parameters."""
        length = turns.first_length(self.max_length, layout.explorers)
        state = first_branches(explorers, layout, params, self._lasting, length)
        state = at_work.with_room(explorers, state, params, self._lasting)
        turn_means = jax.tree.map(trees.owned_copy, first_means(self._of_turn, params))
        return state._replace(
            branches=state.branches._replace(turn_means=turn_means),
            racing=turns.init(layout.explorers, self.racing),
        )

    def length(self, state: ExploreState) -> jax.Array:
        """Calls of this turn, which may have ended early."""
        return state.branches.step

    def step(self, ctx: Context, state: ExploreState) -> Explored:
        """One step of the explorer whose turn it is."""
        walked: BranchesState = state.branches
        lead, layout, moved = walked.lead, ctx.layout, []
        walk = Walk(
            self.averages, "shared", walked, lead, ctx.params, _EVERY, climbs=False
        )
        call, is_finite = calls.scaled(ctx.call, self.schedule), jnp.asarray(True)
        for name in layout.members:
            row = lead - layout.rows(name)[0]
            member = steps.member(ctx.explorers[name], name, call, row)

            def go(carry: Any, member: steps.Member = member) -> Any:
                new = walk.advance(member, carry[0])
                return new, finite.finite(new.end)

            takes = layout.stands_for(name, lead) & (walked.step >= 0)
            branch = at_work.branch(state, name)
            branch, is_finite = select.apply_if(takes, go, (branch, is_finite))
            state = at_work.with_branch(state, name, branch)
            moved.append(branch)
        is_skipped = jnp.stack([one.skipped > 0 for one in moved]).any()
        # All begin with the age of the one at work, and that one goes on.
        age = jnp.stack([one.age for one in moved]).max()
        state = _after_step(layout, state, age, is_finite, is_skipped)
        is_last = state.branches.step >= state.branches.length
        is_first = state.branches.step == 1
        return Explored(
            state,
            is_skipped & is_first,
            layout.split(jnp.arange(layout.explorers) != lead),
            is_over=is_last | is_skipped | ~is_finite,
            is_broken=~is_finite,
        )

    def reinitialized(self, ctx: Context, explored: Explored) -> Any:
        """A branch that is not finite begins anew at the best parameters."""
        del explored

        return lambda state: self._begun_anew(ctx, state)

    def _begun_anew(self, ctx: Context, state: ExploreState) -> ExploreState:
        """The branch at work begins at the best parameters."""
        lead, best = state.branches.lead, sharding.on_device(state.branches.start)

        def anew(name: str, row: jax.Array, old: Any, state: Any) -> Any:
            del old, state
            new = inner.member_state(ctx.explorers[name], row, best)
            return new, best, first_means(self._lasting, best)

        state = at_work.changed(ctx.layout, state, anew)
        walked = state.branches._replace(
            age=state.branches.age.at[lead].set(0),
            turn_means=first_means(self._of_turn, best),
        )
        return state._replace(branches=walked)

    def candidates(
        self, ctx: Context, explored: Explored, state: ExploreState, stable: Any
    ) -> Candidates:
        """The branch at work, its averages, and the best parameters before."""
        del explored
        walked, layout = state.branches, ctx.layout
        lead = walked.lead
        rows = layout.of_explorer(lead)
        others = jnp.asarray([layout.current, layout.stable])
        is_lead = jnp.arange(layout.explorers) == lead
        means = [
            at_work.pick(layout, state, functools.partial(_mean, place))
            if kind.lasts
            else walked.turn_means[place]
            for place, kind in enumerate(self.averages)
        ]
        branch = [at_work.pick(layout, state, _end), *means]
        params = [_averages.like(one, ctx.params) for one in branch]
        return Candidates(
            [*map(Stacked, params), Stacked(walked.start), Stacked(stable)],
            layout.tile(is_lead & (walked.alive > 0), True),
            jnp.zeros([layout.candidates], bool),
            jnp.append(rows, others).astype(jnp.int32),
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
        """The best parameters so far stay; it is another one's turn, or the same's."""
        decision, layout, lead = info.decision, ctx.layout, state.branches.lead
        best = select.pick(_place(layout, decision.adopted), candidates.params)

        def promote(stable: optax.Params) -> optax.Params:
            place = _place(layout, jnp.asarray(decision.promoted))
            # What a loop carries, it need not copy.
            new = select.pick(place, [*candidates.params[:-1], Stacked(stable)])
            return sharding.as_kept(new, stable)

        stable = select.apply_if(decision.significant, promote, stable)
        found = _outcome(info, layout, lead)
        coming = turns.advance(state.racing, lead, found, self.max_length, self.racing)
        kept = sharding.as_kept(best, state.branches.start)
        walked = state.branches._replace(start=kept)
        # Gradients that are not finite end a turn. Where they leave a turn without any
        # step, it is the branch's fault, not a batch's: but for a good one, it is left.
        leaves = explored.proposals & ~found.adopted

        def leave(state: ExploreState) -> ExploreState:
            return self._begun_anew(ctx, state)

        def change(state: ExploreState) -> ExploreState:
            return at_work.handed_over(layout, state, coming.lead)

        def join(state: ExploreState) -> ExploreState:
            return _joined(ctx, state, coming.turns.leader)

        state = state._replace(branches=walked, racing=coming.turns)
        state = select.apply_if(leaves, leave, state)
        state = select.apply_if(coming.lead != lead, change, state)
        state = select.apply_if(coming.joins, join, state)

        def begin(end: optax.Params) -> tuple[jax.Array, tuple[Any, ...]]:
            return _is_missed(end, ctx.params), first_means(self._of_turn, end)

        is_missed, turn_means = at_work.pick(layout, state, _end, begin)
        walked = state.branches._replace(
            # Where one update does not lead to the branch, the next one does.
            step=-is_missed.astype(jnp.int32),
            length=coming.length,
            alive=jnp.ones_like(walked.alive),
            turn_means=turn_means,
        )
        return Finished(state._replace(branches=walked), stable, None)

    def update(self, ctx: Context, state: ExploreState, move: Any) -> optax.Updates:
        """The way to the branch at work."""
        del move
        return at_work.pick(
            ctx.layout, state, _end, lambda end: finite.towards(end, ctx.params)
        )


def _after_step(
    layout: Layout,
    state: ExploreState,
    age: jax.Array,
    is_finite: jax.Array,
    is_skipped: jax.Array,
) -> ExploreState:
    """The state after a step of the branch at work."""
    is_lead = jnp.arange(layout.explorers) == state.branches.lead
    skipped = layout.split(is_lead & (is_skipped | ~is_finite))
    state = strategy.with_opt_states(state, {}, skipped)
    walked: BranchesState = state.branches
    walked = walked._replace(
        step=walked.step + 1,
        alive=jnp.where(is_lead & ~is_finite, 0, walked.alive),
        age=jnp.where(is_lead, age, walked.age),
    )
    return state._replace(branches=walked)


def _end(branch: Branch) -> optax.Params:
    return branch.end


def _mean(kind: int, branch: Branch) -> optax.Params:
    return branch.means[kind]


def _joined(ctx: Context, state: ExploreState, leader: jax.Array) -> ExploreState:
    """The branch at work goes on from where the leader is, and with its averages."""

    def join(name: str, row: jax.Array, old: Any, state: ExploreState) -> Any:
        opt_states = strategy.opt_states(state)
        made, fits = restarts.copied(ctx, opt_states, name, leader)
        fits = fits[row] if fits.ndim else fits
        walked = state.branches
        waiting = {k: (walked.ends[k], walked.means[k]) for k in walked.ends}
        end, means = select.pick(leader, stacks(ctx, waiting))
        return select.where(fits, made, old[0]), end, means

    state = at_work.changed(ctx.layout, state, join)
    age = state.branches.age
    age = age.at[state.branches.lead].set(age[leader])
    return state._replace(branches=state.branches._replace(age=age))


def _is_missed(target: optax.Params, params: optax.Params) -> jax.Array:
    """Whether the update to the target is rounded to one that leads elsewhere."""
    reached = trees.plus(params, finite.towards(target, params))

    def misses(new: jax.Array, wanted: jax.Array) -> jax.Array:
        if not trees.is_inexact(wanted) or not wanted.size:
            return jnp.asarray(False)
        error, size = jnp.abs(trees.minus(new, wanted)).max(), jnp.abs(wanted).max()
        return ~(error <= _ROUNDED * size)

    missed = jax.tree.leaves(jax.tree.map(misses, reached, target))
    return jnp.stack(missed).any() if missed else jnp.asarray(False)


def _place(layout: Layout, candidate: Any) -> jax.Array:
    """Where a candidate is among those that take part."""
    is_own = candidate < layout.proposals
    other = candidate - layout.proposals + layout.kinds
    return jnp.where(is_own, candidate // layout.explorers, other)


def _outcome(info: RoundInfo, layout: Layout, lead: jax.Array) -> turns.Outcome:
    """What the turn of ``lead`` has brought, on the examples of the round."""
    told, adopted = info.evidence, info.decision.adopted
    against = evidence.compare(told, info.objective, told.current)
    mean = evidence.estimate(told, info.objective).mean
    own = layout.of_explorer(lead)
    best = own[jnp.argmax(jnp.where(told.valid[own], mean[own], -jnp.inf))]
    return turns.Outcome(
        gain=against.gain[best],
        stderr=against.stderr[best],
        moved=against.gain[adopted],
        adopted=layout.owner(adopted) == lead,
        finite=told.valid[own].any(),
    )


def relay(
    length: int = 25,
    *,
    averages: Sequence[Average] | None = None,
    racing: Racing | None = _RACING,
    schedule: optax.Schedule | None = None,
) -> strategy.Strategy:
    """Explorers take turns with the caller's gradients: the price of one optimizer.

    Branches as in :func:`branches`, that go on from where they are, but in each call of
    ``update`` only one of them takes a step, with the gradient that the caller took at
    its parameters: these are the visible ones. It needs no ``loss_fn``, and one
    gradient a call, whatever the number of explorers.

    First turns are short, 1, 2, 4, ... calls for each explorer, so that a harmful one
    is visible for a few calls only. Then the better half goes on, each time with turns
    of about twice the length, until one explorer is left, which leads. It has turn
    after turn; now and then another explorer challenges it for a turn, and takes the
    lead if it is better after it. A leader that stands still, so that two turns
    bring less than a ten thousandth of all progress, is challenged after each turn.

    At the end of a turn the branch and its averages are assessed beside ``current``,
    here the best parameters so far (:func:`optax_ev3.best_params`), and ``stable``. A
    turn whose gradients or parameters are not finite ends at once. An explorer that was
    never adopted, and fell in two turns in a row by three standard errors, or was not
    finite, gets no turn any more. From parameters so large that rounding would lose the
    next branch on the way, it takes one call more to get there.

    Args:
      length: Calls of ``update`` in a turn.
      averages: More candidates at no gradient cost. Default:
        :func:`trajectory_average`, here that of the turn, and :func:`branch_average`.
      racing: Who is tried again, and when. ``window``: turns of the leader before the
        first challenge, twice as many before each further one. ``patience``: turns that
        a challenger may lose in a row. A turn in which it makes up half of what it was
        behind does not count. From its second challenge on, a challenger that is far
        behind goes on from where the leader is. None: the leader is never challenged.
      schedule: See :func:`branches`.

    Returns:
      For the ``explore`` argument of :func:`optax_ev3.ev3`.

    Raises:
      TypeError: If ``length`` is no integer, or an argument of the wrong kind.
      ValueError: If ``length`` is below 1; in ``ev3``, if an explorer is a group that
        evolves.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3
      >>> from optax_ev3 import explore
      >>> def score(w):
      ...     return -((w - 3.0) ** 2)
      >>> inner = [optax.adam(0.1), optax.sgd(0.3)]
      >>> tx = optax_ev3.ev3(inner, score, explore=explore.relay())
      >>> w = jnp.zeros([])
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(2 * (w - 3.0), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(100):
      ...     w, state = step(w, state)
      >>> print(f"{optax_ev3.best_params(state):.2f}")
      3.00

    References:
      Jamieson and Talwalkar, `Non-stochastic Best Arm Identification and Hyperparameter
      Optimization <https://arxiv.org/abs/1502.07943>`_, 2016 (successive halving).
    """
    if averages is None:
        averages = (_averages.trajectory_average(), _averages.branch_average())
    if racing is not None and not isinstance(racing, Racing):
        raise TypeError(
            f"racing must be None or explore.Racing(...), got {racing!r} of type "
            f"{type(racing).__name__}."
        )
    return Relay(
        max_length=checks.static_int(length, "length"),
        averages=_averages.check(averages),
        racing=racing,
        schedule=calls.checked_schedule(schedule),
    )
