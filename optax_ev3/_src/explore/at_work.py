"""The branch of a relay that is at work, apart from those that wait.

Branches of alike explorers wait in one stack. The one at work is taken out of it for
its turn: to step in a row of a stack, it would be copied out and in at each call.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import select, sharding, trees
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExploreState
from optax_ev3._src.explore import inner
from optax_ev3._src.explore.averages import Average
from optax_ev3._src.explore.branch import Branch, first_means, parts, with_parts
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.strategy import Context


def with_room(
    explorers: Mapping[str, Explorer],
    state: ExploreState,
    params: optax.Params,
    kinds: Sequence[Average],
) -> ExploreState:
    """The state with room for a branch of each stack, all of them at their start."""
    room = {}
    for name, explorer in explorers.items():
        if explorer.size is not None:
            opt_state = inner.first_state(explorer.first, name, params)
            own = opt_state, params, first_means(kinds, params)
            room[name] = jax.tree.map(trees.owned_copy, own)
    return state._replace(branches=state.branches._replace(at_work=room))


def taken_out(layout: Layout, state: ExploreState, lead: jax.Array) -> ExploreState:
    """The state with the branch of this explorer taken out of its stack."""

    def take(name: str, row: jax.Array, state: ExploreState) -> ExploreState:
        own = jax.tree.map(lambda x: x[row], parts(state, name))
        own = sharding.on_device(own)
        return _with_own(state, {name: own})

    return _where_it_is(layout, state.branches.at_work, lead, take, state)


def put_back(layout: Layout, state: ExploreState, lead: jax.Array) -> ExploreState:
    """The state with the branch of this explorer, at work so far, in its stack."""

    def put(name: str, row: jax.Array, state: ExploreState) -> ExploreState:
        waiting, own = parts(state, name), state.branches.at_work[name]
        own = sharding.as_kept(own, waiting)
        waiting = jax.tree.map(lambda x, n: x.at[row].set(n), waiting, own)
        return with_parts(state, {name: waiting})

    return _where_it_is(layout, state.branches.at_work, lead, put, state)


def changed(
    layout: Layout,
    state: ExploreState,
    lead: jax.Array,
    change: Callable[[str, jax.Array, Any, ExploreState], Any],
) -> ExploreState:
    """The state with ``change(name, row, parts, state)`` of the branch at work."""

    def there(name: str, row: jax.Array, state: ExploreState) -> ExploreState:
        old = state.branches.at_work.get(name, parts(state, name))
        new = change(name, row, old, state)
        new = jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)
        return _with_own(state, {name: new})

    return _where_it_is(layout, layout.members, lead, there, state)


def _where_it_is(
    layout: Layout,
    names: Iterable[str],
    lead: jax.Array,
    change: Callable[[str, jax.Array, ExploreState], ExploreState],
    state: ExploreState,
) -> ExploreState:
    """The state with what is changed for the name, and the row, of an explorer."""
    for name in names:
        # The whole state is carried: what is read of it need not be copied before.
        there = functools.partial(change, name, lead - layout.rows(name)[0])
        state = select.apply_if(layout.stands_for(name, lead), there, state)
    return state


def _with_own(state: ExploreState, own: Mapping[str, Any]) -> ExploreState:
    """The state with other :func:`parts` of what is at work, by name."""
    own, walked = dict(own), state.branches
    room = {name: own.pop(name, old) for name, old in walked.at_work.items()}
    state = with_parts(state, own)
    return state._replace(branches=state.branches._replace(at_work=room))


def branches(layout: Layout, state: ExploreState) -> dict[str, Branch]:
    """By name, the branch that is at work if one of this kind is."""
    walked, lead = state.branches, state.branches.lead
    nothing = jnp.zeros([], jnp.int32)
    own: dict[str, Any] = {name: parts(state, name) for name in layout.members}
    return {
        name: Branch(opt_state, end, means, nothing, walked.age[lead], lead, nothing)
        for name, (opt_state, end, means) in (own | walked.at_work).items()
    }


def with_branches(state: ExploreState, moved: Mapping[str, Branch]) -> ExploreState:
    """The state with branches at work that went on."""
    own = {name: (one.opt_state, one.end, one.means) for name, one in moved.items()}
    return _with_own(state, own)


def pick(
    ctx: Context,
    state: ExploreState,
    lead: jax.Array,
    get: Callable[[Branch], Any],
    then: Callable[[Any], Any] = lambda x: x,
) -> Any:
    """What the branch at work has; see :func:`optax_ev3._src.base.select.pick`."""
    kinds = [i for i, names in enumerate(ctx.layout.members.values()) for _ in names]
    stacks = [Stacked(get(one)) for one in branches(ctx.layout, state).values()]
    return select.pick(jnp.asarray(kinds)[lead], stacks, then)
