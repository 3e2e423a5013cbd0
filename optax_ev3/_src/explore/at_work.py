"""The branch of a relay that is at work, apart from those that wait.

Branches of alike explorers wait in one stack. The one at work is taken out of it for
its turn: to step in a row of a stack, it would be copied out and in at each call. All
explorers of a relay with stacks take turns in one room, the single ones, too.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import select, sharding, trees
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExploreState
from optax_ev3._src.explore import inner, strategy
from optax_ev3._src.explore.averages import Average
from optax_ev3._src.explore.branch import (
    AtWork,
    Branch,
    apart,
    first_means,
    parts,
    together,
    with_parts,
)
from optax_ev3._src.explore.explorers import Explorer


def with_room(
    explorers: Mapping[str, Explorer],
    state: ExploreState,
    params: optax.Params,
    kinds: Sequence[Average | None],
) -> ExploreState:
    """The state with room for the branch at work, which is at its start."""
    opt_states = {
        name: inner.first_state(one.first, name, params)
        for name, one in explorers.items()
        if one.size is not None
    }
    if not opt_states:
        return state  # Nothing is to be taken out of a stack.
    room = AtWork(opt_states, params, first_means(kinds, params))
    room = jax.tree.map(trees.owned_copy, room)
    return state._replace(branches=state.branches._replace(at_work=room))


def handed_over(layout: Layout, state: ExploreState, new: jax.Array) -> ExploreState:
    """The state with the branch of this explorer at work; the one that was waits."""
    if state.branches.at_work == ():
        return _with_lead(state, new)
    nobody = layout.explorers

    def put(name: str, row: jax.Array, state: ExploreState) -> ExploreState:
        waiting = parts(state, name)
        own = sharding.as_kept(_own(state, name), waiting)
        if not layout.single[name]:
            own = jax.tree.map(lambda x, n: x.at[row].set(n), waiting, own)
        return _with_lead(with_parts(state, {name: own}), nobody)

    def take(name: str, row: jax.Array, state: ExploreState) -> ExploreState:
        own = parts(state, name)
        if not layout.single[name]:
            own = jax.tree.map(lambda x: x[row], own)
        return _with_own(state, name, sharding.on_device(own))

    state = _where_it_is(layout, state.branches.lead, put, state)
    # Nobody is at work where the old one is back. That the room is filled after it was
    # read has to follow from data: else XLA would keep a copy of it.
    is_free = state.branches.lead == nobody
    state = _where_it_is(layout, jnp.where(is_free, new, nobody), take, state)
    return _with_lead(state, new)


def changed(
    layout: Layout,
    state: ExploreState,
    change: Callable[[str, jax.Array, Any, ExploreState], Any],
) -> ExploreState:
    """The state with ``change(name, row, parts, state)`` of the branch at work."""

    def there(name: str, row: jax.Array, state: ExploreState) -> ExploreState:
        old = _own(state, name)
        new = change(name, row, old, state)
        new = jax.tree.map(lambda n, o: jnp.asarray(n, o.dtype), new, old)
        return _with_own(state, name, new)

    return _where_it_is(layout, state.branches.lead, there, state)


def _where_it_is(
    layout: Layout,
    lead: jax.Array,
    change: Callable[[str, jax.Array, ExploreState], ExploreState],
    state: ExploreState,
) -> ExploreState:
    """The state with what is changed for the name, and the row, of an explorer."""
    for name in layout.members:
        # The whole state is carried: what is read of it need not be copied before.
        there = functools.partial(change, name, lead - layout.rows(name)[0])
        state = select.apply_if(layout.stands_for(name, lead), there, state)
    return state


def _own(state: ExploreState, name: str) -> tuple[Any, Any, Any]:
    """The :func:`parts` of an explorer, or of one member, if it is at work."""
    own, room = parts(state, name), state.branches.at_work
    if room == ():
        return own
    return room.opt_states.get(name, own[0]), room.end, room.means


def _with_own(state: ExploreState, name: str, own: Any) -> ExploreState:
    """The state with other parts of the explorer at work."""
    room = state.branches.at_work
    if room == ():
        return with_parts(state, {name: own})
    opt_state, end, means = own
    opt_states = room.opt_states
    if name in opt_states:
        opt_states = {**opt_states, name: opt_state}
    else:
        state = strategy.with_opt_states(state, {name: opt_state})
    room = AtWork(opt_states, end, means)
    return state._replace(branches=state.branches._replace(at_work=room))


def _with_lead(state: ExploreState, lead: Any) -> ExploreState:
    lead = jnp.full_like(state.branches.lead, lead)
    return state._replace(branches=state.branches._replace(lead=lead))


def branch(state: ExploreState, name: str) -> Branch:
    """The branch that is at work if an explorer of this name is."""
    walked, lead = state.branches, state.branches.lead
    nothing = jnp.zeros([], jnp.int32)
    age = walked.age[lead]
    opt_state, end, means = _own(state, name)
    means = together(means, walked.turn_means)
    return Branch(opt_state, end, means, nothing, age, lead, nothing)


def with_branch(state: ExploreState, name: str, moved: Branch) -> ExploreState:
    """The state with a branch at work that went on."""
    means, turn_means = apart(moved.means, state.branches.turn_means)
    state = _with_own(state, name, (moved.opt_state, moved.end, means))
    return state._replace(branches=state.branches._replace(turn_means=turn_means))


def pick(
    layout: Layout,
    state: ExploreState,
    get: Callable[[Branch], Any],
    then: Callable[[Any], Any] = lambda x: x,
) -> Any:
    """What is of the branch at work, such as its end; see :func:`select.pick`."""

    def of(name: str) -> Any:
        return get(branch(state, name))

    first, *_ = layout.members
    if state.branches.at_work != ():
        return then(of(first))  # Whichever it is, it is the one in the room.
    stacks = [Stacked(of(name)) for name in layout.members]
    return select.pick(state.branches.lead, stacks, then)
