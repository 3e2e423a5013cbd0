"""One-step rounds: every call is a round, all explorers from the same parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import finite, memory_bound, select, sharding, trees
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExploreState, RoundInfo
from optax_ev3._src.explore import steps, strategy
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.strategy import Candidates, Context, Explored, Finished


class Step(NamedTuple):
    """One step of an explorer.

    Attributes:
      update: A tree like params, which may hold what is not finite.
      opt_state: The inner state; the old one where the step is not finite.
      finite: ``[]`` bool, whether the update and the parameters after it are finite.
      is_ascent: ``[]`` bool, whether the update raises the loss to first order.
    """

    update: optax.Updates
    opt_state: Any
    finite: jax.Array
    is_ascent: jax.Array


@dataclasses.dataclass(frozen=True)
class OneStep(strategy.Strategy):
    """See :func:`one_step`."""

    averages = ()
    one_step = True

    def init(
        self, explorers: Mapping[str, Explorer], layout: Layout, params: optax.Params
    ) -> ExploreState:
        """All explorers at these parameters."""
        return strategy.first_states(explorers, layout, params)

    def length(self, state: ExploreState) -> jax.Array:
        """One."""
        del state
        return jnp.ones([], jnp.int32)

    def step(self, ctx: Context, state: ExploreState) -> Explored:
        """One step of every explorer."""
        proposed = _propose(ctx, strategy.opt_states(state))
        opt_states = {name: step.opt_state for name, step in proposed.items()}
        skipped = {name: ~step.finite for name, step in proposed.items()}
        state = strategy.with_opt_states(state, opt_states, skipped)
        return Explored(state, proposed, {}, is_over=True, is_broken=False)

    def reinitialized(self, ctx: Context, explored: Explored) -> Any:
        """Inner states stay finite by themselves."""
        del ctx, explored
        return lambda state: state

    def candidates(
        self, ctx: Context, explored: Explored, state: ExploreState, stable: Any
    ) -> Candidates:
        """The parameters after each step, and where no step leads."""
        del state

        # Made when it is assessed: only one at a time takes memory.
        def after(update: optax.Updates) -> optax.Params:
            return trees.plus(ctx.params, update)

        candidates = [x._replace(make=after) for x in _updates(ctx, explored)]
        proposed = explored.proposals
        return Candidates(
            [*candidates, Stacked(ctx.params), Stacked(stable)],
            _flags(ctx, {name: step.finite for name, step in proposed.items()}, True),
            _flags(ctx, {k: step.is_ascent for k, step in proposed.items()}, False),
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
        """All explorers go on from the adopted parameters."""
        del candidates
        everybody = jnp.ones([ctx.layout.explorers], bool)
        state, fresh = strategy.evolved(ctx, state, info, everybody)
        updates = _updates(ctx, explored)
        moves = [*updates, *_stay_or_back(ctx.params, stable)]
        move = select.pick(info.decision.adopted, moves)

        def promote(kept: Any, operands: Any) -> Any:
            params, trees_of, index = operands
            moves = [
                move._replace(tree=tree)
                for move, tree in zip(updates, trees_of, strict=True)
            ]
            moves += _stay_or_back(params, kept)
            return sharding.as_kept(trees.plus(params, select.pick(index, moves)), kept)

        # The candidate is made again: kept from before, it would need its own memory.
        stable = select.apply_if_with_jvp(
            info.decision.significant,
            promote,
            stable,
            (ctx.params, [x.tree for x in updates], info.decision.promoted),
        )
        return Finished(state, stable, fresh, move)

    def update(self, ctx: Context, state: ExploreState, move: Any) -> optax.Updates:
        """The one that is adopted."""
        del ctx, state
        return move


def one_step() -> strategy.Strategy:
    """Every call is a round, in which all explorers take a step with its gradient.

    The default of :func:`optax_ev3.ev3`. All start from the visible parameters, and one
    of the steps is adopted, or none. It needs no ``loss_fn``, and one gradient a call.
    What gains most in one step is not always what gains most in the end: so the default
    rule, :func:`optax_ev3.adapt.farsighted`, lets explorers lead for some calls, and
    looks at their progress.

    Examples:
      >>> import optax, optax_ev3
      >>> tx = optax_ev3.ev3(
      ...     [optax.adam(1e-3), optax.sgd(0.1)],
      ...     assess_fn=lambda w: -(w**2),
      ...     explore=optax_ev3.explore.one_step(),
      ... )
    """
    return OneStep()


def _propose(ctx: Context, opt_states: Mapping[str, Any]) -> dict[str, Step]:
    """One step of every explorer from the same parameters; those of a sweep stacked."""
    params, found = ctx.params, {}
    # Once for all explorers.
    start = trees.total(
        x.sum() for x in jax.tree.leaves(finite.doubled(params)) if trees.is_inexact(x)
    )

    def step(member: steps.Member, state: Any) -> Step:
        if member.has_own_loss:
            grads, aux = member.gradient(params)
        else:
            grads, aux = steps.given_to(member.name, ctx.call)

        def take(grads: Any) -> Any:
            return member.advance(grads, aux, state, params)

        return _checked(take, grads, state, params, start)

    for name, explorer in ctx.explorers.items():
        found[name] = steps.each_member(
            step, explorer, name, ctx.call, opt_states[name]
        )
    return found


def _checked(
    take: Any, grads: Any, opt_state: Any, params: optax.Params, start: jax.Array
) -> Step:
    """One step of one inner optimizer, whose state is held if it is not finite.

    ``start`` is a sum to which twice every parameter contributes.
    """
    update, new = take(grads)
    ok, is_ascent = _examine(update, grads, params, start)
    if memory_bound.is_memory_bound(take, grads):
        # Kept until the check is done, the new state would need memory of its own;
        # computed again, it is written in the place of the old one.
        new = take(select.where(ok, grads, jax.tree.map(jnp.zeros_like, grads)))[1]
    return Step(update, select.where(ok, new, opt_state), ok, is_ascent)


def _examine(
    update: optax.Updates, grads: optax.Updates, params: optax.Params, start: Any
) -> tuple[Any, Any]:
    """Whether a step is finite, and whether it raises the loss to first order."""
    # A sum is finite only where all its terms are: mostly one pass answers both.
    total = steps.slope(finite.doubled(update), grads)
    if total is None:
        return finite.finite_after(params, update), jnp.asarray(False)
    return finite.finite_after(params, update, trees.total([start, total])), total > 0


def _updates(ctx: Context, explored: Explored) -> list[Stacked]:
    """The updates of all explorers."""
    return [
        ctx.explorers[name].stack(step.update)
        for name, step in explored.proposals.items()
    ]


def _stay_or_back(params: optax.Params, stable: optax.Params) -> list[Stacked]:
    """The moves to ``current`` and to ``stable``."""
    return [
        Stacked(select.Lazy(lambda: trees.no_update(params))),
        Stacked(
            select.Lazy(lambda: finite.towards(sharding.on_device(stable), params))
        ),
    ]


def _flags(ctx: Context, found: Mapping[str, jax.Array], others: bool) -> jax.Array:
    """One flag for each explorer, and the same for current and stable."""
    return ctx.layout.tile(ctx.layout.join(found), others)
