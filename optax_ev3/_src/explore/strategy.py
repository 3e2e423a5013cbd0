"""Strategies: how explorers are tried. What they have in common.

Dimensions: ``K`` explorers, ``C`` candidates.
"""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import sharding, states
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExplorerState, ExploreState, RoundInfo
from optax_ev3._src.explore import evolve, inner
from optax_ev3._src.explore.averages import Average
from optax_ev3._src.explore.calls import Call
from optax_ev3._src.explore.explorers import Explorer


class Context(NamedTuple):
    """What a strategy knows in a call of ``update``, beside its state.

    Attributes:
      explorers: By name.
      layout: Which candidates there are.
      params: The visible parameters.
      call: What else the caller gave.
    """

    explorers: Mapping[str, Explorer]
    layout: Layout
    params: optax.Params
    call: Call


class Explored(NamedTuple):
    """What a call has explored.

    Attributes:
      state: The state after it.
      proposals: What else the strategy needs at the round's end.
      paused: By name, who takes no part in this round: ``[]`` bool, or ``[G]`` for the
        members of a sweep; none for all.
      is_over: ``[]`` bool, whether the round ends.
      is_broken: ``[]`` bool, whether something is to be reinitialized.
    """

    state: ExploreState
    proposals: Any
    paused: Mapping[str, jax.Array]
    is_over: Any
    is_broken: Any


class Candidates(NamedTuple):
    """The candidates of a round.

    Attributes:
      params: C trees, some of them stacked; or those of ``rows`` alone.
      finite: ``[C]`` bool, which of them took part and are finite.
      is_ascent: ``[C]`` bool, whose update raises the explorer's loss to first order.
      rows: int32, which candidates ``params`` are, where most take no part; None for
        all, in their order.
    """

    params: list[Stacked]
    finite: jax.Array
    is_ascent: jax.Array
    rows: jax.Array | None = None


class Finished(NamedTuple):
    """How the next round begins.

    Attributes:
      state: Where the explorers are.
      stable: The stable parameters.
      fresh: ``[K]`` bool, explorers with new hyperparameters; None for nobody.
      move: The update that is adopted; nothing where the state says where to go.
    """

    state: ExploreState
    stable: optax.Params
    fresh: jax.Array | None
    move: Any = ()


class Strategy(abc.ABC):
    """How explorers are tried: from where, with which gradients, for how long.

    All methods are pure functions of arrays.

    Examples:
      >>> from optax_ev3 import explore
      >>> isinstance(explore.relay(), explore.Strategy)
      True
    """

    averages: tuple[Average, ...]
    # Whether every round is one step, which says little.
    one_step: bool = False
    # Whether one explorer works at a time.
    takes_turns: bool = False

    @property
    def restarts(self) -> bool:
        """Whether explorers start from what is adopted: then a harmful choice lasts."""
        return True

    @property
    def own_gradients(self) -> bool:
        """Whether each explorer takes the gradient of a loss, at its own parameters."""
        return False

    def checked(self, explorers: Mapping[str, Explorer], has_loss: bool) -> "Strategy":
        """The strategy with its defaults for these explorers; raises if they misfit."""
        del explorers, has_loss
        return self

    @abc.abstractmethod
    def init(
        self, explorers: Mapping[str, Explorer], layout: Layout, params: optax.Params
    ) -> ExploreState:
        """All explorers at these parameters."""

    @abc.abstractmethod
    def length(self, state: ExploreState) -> jax.Array:
        """Calls of ``update`` in this round: ``[]`` int32."""

    @abc.abstractmethod
    def step(self, ctx: Context, state: ExploreState) -> Explored:
        """What explorers do in one call."""

    @abc.abstractmethod
    def reinitialized(self, ctx: Context, explored: Explored) -> Any:
        """Maps a state to the same with what is not finite made anew."""

    @abc.abstractmethod
    def candidates(
        self, ctx: Context, explored: Explored, state: ExploreState, stable: Any
    ) -> Candidates:
        """What a round that ends proposes."""

    @abc.abstractmethod
    def finish(
        self,
        ctx: Context,
        explored: Explored,
        candidates: Candidates,
        state: ExploreState,
        stable: Any,
        info: RoundInfo,
    ) -> Finished:
        """The start of the next round, after what was decided."""

    @abc.abstractmethod
    def update(self, ctx: Context, state: ExploreState, move: Any) -> optax.Updates:
        """The update of the visible parameters."""


def first_states(
    explorers: Mapping[str, Explorer], layout: Layout, params: optax.Params
) -> ExploreState:
    """The states of explorers at these parameters."""
    found = {}
    names = layout.names
    for name, explorer in explorers.items():
        rows = layout.rows(name)
        found[name] = ExplorerState(
            {names[row]: states.place(row) for row in rows},
            inner.first_state(explorer, name, params),
            jnp.zeros([] if explorer.size is None else [explorer.size], jnp.int32),
            evolve.init(explorer),
        )
    averages = range(layout.explorers, layout.proposals)
    return ExploreState(found, {names[row]: states.place(row) for row in averages})


def opt_states(state: ExploreState) -> dict[str, Any]:
    """The inner states, by name."""
    return {name: explorer.opt_state for name, explorer in state.explorers.items()}


def with_opt_states(
    state: ExploreState, new: Mapping[str, Any], skipped: Any = None
) -> ExploreState:
    """The state with new inner states; ``skipped`` counts steps that came to nothing.

    Args:
      state: The state.
      new: The inner states that are new, by name.
      skipped: By name, ``[]`` bool, or ``[G]`` for a sweep; None for no step.
    """
    explorers = {}
    for name, explorer in state.explorers.items():
        count = explorer.skipped
        if skipped is not None:
            flags = sharding.replicated(skipped[name])
            count = jnp.where(flags, optax.safe_increment(count), count)
        explorers[name] = explorer._replace(
            opt_state=new.get(name, explorer.opt_state), skipped=count
        )
    return state._replace(explorers=explorers)


def evolved(
    ctx: Context, state: ExploreState, info: RoundInfo, restarted: jax.Array
) -> tuple[ExploreState, jax.Array | None]:
    """The state after evolving groups have moved on, and who is another from now on."""
    if not any(explorer.space for explorer in ctx.explorers.values()):
        return state, None
    explorers, fresh = evolve.advance(
        ctx.explorers, ctx.layout, state.explorers, info, restarted
    )
    return state._replace(explorers=explorers), fresh
