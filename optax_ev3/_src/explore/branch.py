"""One step of a branch: a trajectory of an explorer, or those of a sweep.

Dimensions: ``K`` explorers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import control, finite, select, sharding, trees, xla
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExploreState
from optax_ev3._src.explore import averages, inner, steps, strategy
from optax_ev3._src.explore.averages import Average
from optax_ev3._src.explore.explorers import Explorer


class AtWork(NamedTuple):
    """Of a relay, the room for the branch that is at work: one for all explorers.

    Attributes:
      opt_states: By the name of each stack, the inner state of one member. It is of use
        where that member is at work.
      end: The parameters of the branch.
      means: Its averages, but for those of the turn.
    """

    opt_states: dict[str, Any]
    end: optax.Params
    means: tuple[optax.Params, ...]


class BranchesState(NamedTuple):
    """Where the branches are.

    Attributes:
      step: ``[]`` int32, calls of ``update`` since the round's start; -1 where it takes
        one more to get to the branch, in a relay.
      length: ``[]`` int32, calls in this round.
      lead: ``[]`` int32, the explorer whose branch is visible; K if none is.
      start: The parameters at the round's start.
      ends: By name, the parameters of the branches, those of a sweep stacked.
      alive: ``[K]`` int32, 0 where a branch became non-finite in this round.
      is_ascent: ``[K]`` int32, 1 where the way from the round's start raises the loss,
        to first order at a branch's last step.
      age: ``[K]`` int32, steps of a branch since it last began elsewhere.
      means: By name, the averages of the branches, in the order of the strategy's.
      turn_means: In a relay, the averages over this turn, of the branch at work; they
        have no value in its next turn. Their places in ``means`` are empty there, and
        here those of the others.
      at_work: An :class:`AtWork` in a relay with stacks; what ``ends``, ``means`` and
        the stack have of that branch is older. Else nothing.
    """

    step: jax.Array
    length: jax.Array
    lead: jax.Array
    start: optax.Params
    ends: dict[str, optax.Params]
    alive: jax.Array
    is_ascent: jax.Array
    age: jax.Array
    means: dict[str, tuple[optax.Params, ...]]
    turn_means: tuple[Any, ...] = ()
    at_work: Any = ()


class Branch(NamedTuple):
    """A branch, or those of a sweep stacked, in one call.

    Attributes:
      opt_state: The inner state.
      end: The parameters.
      means: Their averages.
      is_ascent: ``[]`` int32, see :class:`BranchesState`.
      age: ``[]`` int32, see :class:`BranchesState`.
      number: ``[]`` int32, which explorer it is.
      skipped: ``[]`` int32, 1 where its step came to nothing.
    """

    opt_state: Any
    end: optax.Params
    means: tuple[optax.Params, ...]
    is_ascent: jax.Array
    age: jax.Array
    number: jax.Array
    skipped: jax.Array


def first_branches(
    explorers: Mapping[str, Explorer],
    layout: Layout,
    params: optax.Params,
    kinds: Sequence[Average | None],
    length: int,
    lead: int = 0,
) -> ExploreState:
    """All branches at these parameters, before the first round of this length."""
    ends = {k: select.spread(params, one.size) for k, one in explorers.items()}
    nothing = jnp.zeros([layout.explorers], jnp.int32)
    branches = BranchesState(
        step=jnp.zeros([], jnp.int32),
        length=jnp.asarray(length, jnp.int32),
        lead=jnp.asarray(lead, jnp.int32),
        start=params,
        ends=ends,
        alive=nothing + 1,
        is_ascent=nothing,
        age=nothing,
        means={name: first_means(kinds, end) for name, end in ends.items()},
    )
    # Buffers of their own, so that all can be donated.
    branches = jax.tree.map(trees.owned_copy, branches)
    return strategy.first_states(explorers, layout, params)._replace(branches=branches)


def first_means(
    kinds: Sequence[Average | None], end: optax.Params
) -> tuple[optax.Params, ...]:
    """Averages that begin; places without a kind are empty."""
    return tuple(() if kind is None else averages.begun(kind, end) for kind in kinds)


def together(means: Sequence[Any], turn_means: Sequence[Any]) -> tuple[Any, ...]:
    """Averages that last, and those of a turn, of which each fills the other's gaps."""
    pairs = zip(means, turn_means, strict=True)
    return tuple(mean if _is_gap(other) else other for mean, other in pairs)


def apart(
    means: Sequence[Any], turn_means: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Averages that last, and those of a turn, with the gaps that there were."""
    pairs = list(zip(means, turn_means, strict=True))
    return (
        tuple(mean if _is_gap(other) else () for mean, other in pairs),
        tuple(() if _is_gap(other) else mean for mean, other in pairs),
    )


def _is_gap(mean: Any) -> bool:
    return isinstance(mean, tuple) and not mean


def branches_by_name(state: ExploreState, layout: Layout) -> dict[str, Branch]:
    """The branches, those of a sweep stacked."""
    walked: BranchesState = state.branches
    number = jnp.arange(layout.explorers, dtype=jnp.int32)
    rows = [walked.is_ascent, walked.age, number, jnp.zeros_like(number)]
    rows = [layout.split(row) for row in rows]
    return {
        name: Branch(*parts(state, name), *(row[name] for row in rows))
        for name in layout.members
    }


def stacks(ctx: strategy.Context, trees: Mapping[str, Any]) -> list[Stacked]:
    """What each explorer has of a kind, given by name, in their order."""
    return [one.stack(trees[name]) for name, one in ctx.explorers.items()]


def after_step(
    state: ExploreState,
    layout: Layout,
    moved: Mapping[str, Branch],
    alive: Mapping[str, jax.Array],
) -> ExploreState:
    """The state with branches that took a step; by name, which ends are finite."""
    walked: BranchesState = state.branches
    skipped = {k: (moved[k].skipped > 0) | ~alive[k] for k in moved}
    opt_states = {name: branch.opt_state for name, branch in moved.items()}
    state = strategy.with_opt_states(state, opt_states, skipped)
    join = layout.join
    walked = walked._replace(
        step=walked.step + 1,
        ends={name: branch.end for name, branch in moved.items()},
        alive=jnp.where(join(alive), walked.alive, 0),
        is_ascent=join({name: branch.is_ascent for name, branch in moved.items()}),
        age=join({name: branch.age for name, branch in moved.items()}),
        means={name: branch.means for name, branch in moved.items()},
    )
    return state._replace(branches=walked)


def begun_anew(
    ctx: strategy.Context,
    state: ExploreState,
    which: Mapping[str, jax.Array],
    params: optax.Params,
    kinds: Sequence[Average],
) -> ExploreState:
    """Some branches begin at these parameters, with new inner states."""

    def begin(name: str) -> Callable[[Any], Any]:
        explorer, flags = ctx.explorers[name], which[name]

        def anew(old: Any) -> Any:
            end = select.spread(params, explorer.size)
            new = inner.init_state(explorer, params), end, first_means(kinds, end)
            return select.replace_rows(flags, new, old)

        return lambda own: select.select_or_apply(flags.any(), anew, own)

    # One explorer after the other: none needs memory for all.
    state = with_parts(state, {name: begin(name)(parts(state, name)) for name in which})
    walked: BranchesState = state.branches
    age = jnp.where(ctx.layout.join(which), 0, walked.age)
    return state._replace(branches=walked._replace(age=age))


def parts(state: ExploreState, name: str) -> tuple[Any, Any, Any]:
    """Of an explorer the inner state, the end of its branch, and its averages."""
    walked: BranchesState = state.branches
    opt_state = state.explorers[name].opt_state
    return opt_state, walked.ends[name], walked.means[name]


def with_parts(state: ExploreState, new: Mapping[str, Any]) -> ExploreState:
    """The state with other :func:`parts` of some explorers, by name."""
    walked: BranchesState = state.branches
    walked = walked._replace(
        ends=walked.ends | {name: own[1] for name, own in new.items()},
        means=walked.means | {name: own[2] for name, own in new.items()},
    )
    opt_states = {name: own[0] for name, own in new.items()}
    return strategy.with_opt_states(state, opt_states)._replace(branches=walked)


class Walk(NamedTuple):
    """What all branches of a call have in common.

    Attributes:
      averages: Which averages the branches keep.
      gradients_of: ``"own"`` or ``"shared"``, whose gradients they take.
      state: Where the branches are.
      lead: ``[]`` int32, the explorer whose branch is visible.
      params: The visible parameters.
      every: Of so many steps, one enters the averages; and the last one.
      climbs: Whether it matters if a branch raises the loss.
    """

    averages: Sequence[Average]
    gradients_of: str | None
    state: BranchesState
    lead: jax.Array
    params: optax.Params
    every: int = 1
    climbs: bool = True

    def advance(self, member: steps.Member, branch: Branch) -> Branch:
        """The branch after a step, if its gradients are finite."""
        leads = branch.number == self.lead
        # Others may have changed the visible parameters: a projection, a weight decay.
        end = select.select_or_apply(leads, lambda _: self.params, branch.end)
        grads, aux = self.gradients(member, end, leads)
        grads = xla.row_major(grads)
        is_last = self.state.step == self.state.length - 1

        def step(moving: Any) -> Any:
            opt_state, end, means, _, age = moving
            update, opt_state = member.advance(grads, aux, opt_state, end)
            end = trees.plus(end, update)
            means = self.averaged(means, end, age, is_last)
            is_ascent = branch.is_ascent
            if self.climbs:
                is_ascent = control.cond(
                    is_last, climbs, lambda _: branch.is_ascent, end
                )
            return opt_state, end, means, is_ascent, age + 1

        def climbs(end: Any) -> jax.Array:
            start = sharding.on_device(self.state.start)
            slope = steps.slope(trees.minus(end, start), grads)
            return jnp.asarray(False if slope is None else slope > 0, jnp.int32)

        # On CPUs skipped as a whole, a step changes its inner state and its parameters
        # in place: a choice between old and new ones would have to keep both.
        moving = branch.opt_state, end, branch.means, branch.is_ascent, branch.age
        ok = finite.finite(grads)
        moved = select.select_or_apply(ok, step, moving)
        opt_state, end, means, is_ascent, age = moved
        skipped = (~ok).astype(jnp.int32)
        return Branch(opt_state, end, means, is_ascent, age, branch.number, skipped)

    def averaged(
        self, means: Any, end: optax.Params, age: jax.Array, is_last: jax.Array
    ) -> Any:
        """The averages after a step that led to ``end``."""

        def move(means: Any) -> Any:
            weights = [one.weight(self.state.step, age, every) for one in self.averages]
            pairs = zip(means, weights, strict=True)
            return tuple(averages.move(mean, end, x, age) for mean, x in pairs)

        every = self.every
        if every == 1 or not means:
            return move(means)
        is_due = is_last | (self.state.step % every == every - 1)
        return select.apply_if(is_due, move, means)

    def gradients(
        self, member: steps.Member, params: optax.Params, leads: jax.Array
    ) -> tuple[optax.Updates, Any]:
        """Gradients of a branch, and what its loss returned beside its value."""
        if member.has_own_loss:
            return member.gradient(params)
        if self.gradients_of != "own":
            return steps.given_to(member.name, member.call)
        given, aux = member.call.grads, member.call.extra_args.get("aux")
        merges = member.explorer.merge_fn is not None
        if given is None or (merges and aux is None):
            return member.gradient(params)
        where = trees.difference(params, given)
        if where is not None:
            raise ValueError(f"the gradients are not like the parameters: {where}.")

        def own() -> Any:
            grads, own_aux = member.gradient(params)
            same = jax.tree.map(lambda o, g: jnp.asarray(o, g.dtype), grads, given)
            return same, own_aux if merges else None

        def of_caller() -> Any:
            return given, aux if merges else None

        return control.cond(leads, of_caller, own)
