"""Trajectories: the explorers' branches between two assessments.

Dimensions: ``K`` explorers, those of sweeps counted one by one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import control, evidence, trees
from optax_ev3._src.base.decision import Decision
from optax_ev3._src.explore import averages as combine
from optax_ev3._src.explore import steps
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.history import record

GRADIENTS = ("own", "shared", "turns")
RESTARTS = ("always", "significant", "behind", "never")
RESTART_STATES = ("keep", "new", "copy")

# A branch is shown to be worse where noise would say so with probability 0.00135.
_WORSE = 3.0


class Plan(NamedTuple):
    """How trajectories go on: the arguments of :func:`optax_ev3.ev3`."""

    length: int
    growth: float
    longest: int
    gradients: str
    restart: str
    restart_state: str
    averages: tuple[combine.Average, ...]

    @property
    def one_step(self) -> bool:
        """Whether every round is one step of all explorers from the same place."""
        longer = self.length > 1 or (self.growth > 1 and self.longest > 1)
        elsewhere = self.restart != "always" or self.restart_state != "keep"
        return not (longer or elsewhere or self.averages)

    @property
    def apart(self) -> bool:
        """Whether branches may go on from where they were in the last round."""
        return self.restart != "always"

    @property
    def kinds(self) -> int:
        """How many candidates each branch has: its end and its averages."""
        return 1 + len(self.averages)

    def with_averages(self, flags: jax.Array, count: int) -> jax.Array:
        """Flags ``[K]`` of branches, then of averages, then false: ``[count]``."""
        flags = jnp.tile(flags, self.kinds)
        return jnp.pad(flags, (0, count - flags.shape[0]))

    def owner(self, candidate: jax.Array, total: int) -> jax.Array:
        """The explorer whose branch a candidate is, or its average; else ``total``."""
        count = self.kinds * total
        return jnp.where(candidate < count, candidate % total, total)


class Trajectory(NamedTuple):
    """Where the branches are.

    Attributes:
      step: ``[]`` int32, calls of ``update`` since the round's start.
      length: ``[]`` int32, calls that a branch takes in this round.
      lead: ``[]`` int32, the explorer whose branch is visible; K if none is.
      start: The parameters at the round's start.
      ends: By name, the parameters of the branches, those of a sweep stacked.
      alive: ``[K]`` int32, 0 where a branch became non-finite in this round.
      is_ascent: ``[K]`` int32, 1 where the way from the round's start raises the loss,
        to first order at a branch's last step.
      age: ``[K]`` int32, steps of a branch since it last began elsewhere.
      means: By name, the averages of the branches.
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


def init(explorers: Mapping[str, Explorer], plan: Plan, params: Any) -> Trajectory:
    """All branches at ``params``."""
    total = sum(one.size or 1 for one in explorers.values())
    ends = {name: _spread(params, one.size) for name, one in explorers.items()}
    state = Trajectory(
        step=jnp.zeros([], jnp.int32),
        length=jnp.asarray(plan.length, jnp.int32),
        lead=jnp.zeros([], jnp.int32),
        start=params,
        ends=ends,
        alive=jnp.ones([total], jnp.int32),
        is_ascent=jnp.zeros([total], jnp.int32),
        age=jnp.zeros([total], jnp.int32),
        means={k: _means(plan, v) for k, v in ends.items()},
    )
    # Buffers of their own, so that all can be donated.
    return jax.tree.map(trees.own, state)


def advance(
    explorers: Mapping[str, Explorer],
    plan: Plan,
    state: Trajectory,
    opt_states: Mapping[str, Any],
    params: optax.Params,
    call: steps.Call,
    rests: Mapping[str, jax.Array],
) -> tuple[dict[str, Any], Trajectory, dict[str, jax.Array], dict[str, jax.Array]]:
    """One call: every branch, or the one whose turn it is, takes a step.

    Args:
      explorers: By name.
      plan: How trajectories go on.
      state: Where the branches are.
      opt_states: The inner states, by name.
      params: The visible parameters: those of the lead branch.
      call: What the caller gave.
      rests: By name ``[]`` bool, explorers that take no step; none for all.

    Returns:
      The inner states, where the branches are, and by name ``[]`` bool, those of a
      sweep stacked, whether they are finite (the others are to be mended) and whether
      a step of theirs was due and came to nothing.
    """
    turns = plan.gradients == "turns"
    lead = state.step // state.length if turns else state.lead
    step = state.step % state.length
    last = step == state.length - 1
    call = call._replace(own=plan.gradients == "own")
    walk = _Walk(plan, lead, step, last, state.start, params, call)
    branches, finite, skipped, first = {}, {}, {}, 0
    for name, one in explorers.items():
        branch = _branch(state, opt_states, name, one, first)
        first += one.size or 1

        def go(tx, hyperparams, branch, one=one, name=name, walk=walk):
            loss = steps.loss_of(one, name, call, hyperparams)
            return _go(tx, one, name, branch, loss, walk)

        numbers = call.hyperparams.get(name)

        def all_go(branch, one=one, go=go, numbers=numbers):
            return one.each(go, branch, hyperparams=numbers)

        branches[name] = trees.unless(rests.get(name), all_go, branch)
        finite[name] = trees.finite(branches[name].end, size=one.size)
        skipped[name] = (branches[name].skipped > 0) | ~finite[name]
        # The next explorer waits for this one.
        walk = walk._replace(lead=trees.after(finite[name], walk.lead))
    walked = state._replace(
        step=state.step + 1,
        ends={name: branch.end for name, branch in branches.items()},
        alive=jnp.where(_flat(finite.values()), state.alive, 0),
        is_ascent=_flat(branch.is_ascent for branch in branches.values()),
        age=_flat(branch.age for branch in branches.values()),
        means={name: branch.means for name, branch in branches.items()},
    )
    states = {name: branch.opt_state for name, branch in branches.items()}
    return states, walked, finite, skipped


def visible_params(
    explorers: Mapping[str, Explorer],
    plan: Plan,
    state: Trajectory,
    params: optax.Params,
) -> optax.Params:
    """Where the visible parameters, which follow the lead branch, go from ``params``.

    Without a lead branch that is alive they stand still.
    """
    ends = [trees.Batch(state.ends[k], one.size) for k, one in explorers.items()]
    total = state.alive.shape[0]
    starts, lead = state.step == 0, state.lead
    if plan.gradients == "turns":
        # A branch starts where the one before did.
        starts = state.step % state.length == 0
        starts &= state.step < total * state.length
        lead = (state.step - 1) // state.length
    alive = jnp.append(state.alive, 0)[lead] > 0
    index = jnp.where(starts, total + 1, jnp.where(alive, lead, total))
    return trees.pick(index, [*ends, trees.Batch(params), trees.Batch(state.start)])


def _flat(flags):
    return jnp.concatenate([jnp.atleast_1d(flag) for flag in flags])


class _Walk(NamedTuple):
    """What all branches of a call have in common."""

    plan: Plan
    lead: jax.Array
    step: jax.Array
    last: jax.Array
    start: optax.Params
    params: optax.Params
    call: steps.Call


class _Branch(NamedTuple):
    """A branch, or those of a sweep."""

    opt_state: Any
    end: optax.Params
    means: tuple[Any, ...]
    is_ascent: jax.Array
    age: jax.Array
    number: jax.Array
    skipped: jax.Array


def _branch(state, opt_states, name, one, first):
    """The branch of an explorer, the first of whose numbers is given."""
    rows = slice(first, first + one.size) if one.size else first
    number = jnp.arange(state.alive.shape[0], dtype=jnp.int32)[rows]
    return _Branch(
        opt_states[name],
        state.ends[name],
        state.means[name],
        state.is_ascent[rows],
        state.age[rows],
        number,
        jnp.zeros_like(number),
    )


def _go(tx, one, name, branch, loss, walk):
    """The branch after a step, if one is due and its gradients are finite."""
    leads = branch.number == walk.lead
    # Others may have changed the visible parameters: a projection, a weight decay.
    end = trees.gate(leads, lambda _: walk.params, branch.end)
    grads, aux = _gradients(one, name, loss, end, leads, walk)
    grads, merge = trees.row_major(grads), steps.merge_of(one, name, aux)

    def step(moving):
        opt_state, end, means, _, age = moving
        update, opt_state = steps.advance(
            tx, one, name, grads, opt_state, end, merge, loss, walk.call
        )
        end = trees.plus(end, update)
        means = tuple(
            combine.move(mean, end, one.weight(walk.step, age))
            for mean, one in zip(means, walk.plan.averages, strict=True)
        )
        is_ascent = control.cond(walk.last, climbs, lambda _: branch.is_ascent, end)
        return opt_state, end, means, is_ascent, age + 1

    def climbs(end):
        slope = steps.slope(trees.minus(end, walk.start), grads)
        return jnp.asarray(False if slope is None else slope > 0, jnp.int32)

    finite, due, take = trees.finite(grads), jnp.asarray(True), trees.gate
    if walk.plan.gradients == "turns":
        due, take = leads, trees.once
    # On CPUs skipped as a whole, a step changes its inner state and its parameters in
    # place: a choice between old and new ones would have to keep both.
    moving = branch.opt_state, end, branch.means, branch.is_ascent, branch.age
    opt_state, end, means, is_ascent, age = take(due & finite, step, moving)
    skipped = (due & ~finite).astype(jnp.int32)
    return _Branch(opt_state, end, means, is_ascent, age, branch.number, skipped)


def mend(
    explorers: Mapping[str, Explorer],
    plan: Plan,
    state: Trajectory,
    opt_states: Mapping[str, Any],
    params: optax.Params,
    finite: Mapping[str, jax.Array],
) -> tuple[dict[str, Any], Trajectory]:
    """Inner states and branches, those that are not finite made anew.

    They go on from the visible parameters, unassessed: the state stays finite without
    the earlier inner states, which are overwritten by then.
    """
    states, ends, means = {}, {}, {}
    for name, one in explorers.items():
        spread, ok = _spread(params, one.size), finite[name]
        states[name] = _select(~ok, steps.init_state(one, params), opt_states[name])
        ends[name] = _select(ok, state.ends[name], spread)
        means[name] = _select(ok, state.means[name], _means(plan, spread))
    age = jnp.where(_flat(finite.values()), state.age, 0)
    return states, state._replace(ends=ends, means=means, age=age)


def _gradients(one, name, loss, params, leads, walk):
    """Gradients of a branch, and what its loss returned beside its value."""
    if one.loss_fn is not None:
        return loss.gradient(params)
    if walk.plan.gradients != "own":
        return steps.given_to(name, walk.call)
    given, aux = walk.call.grads, walk.call.extra_args.get("aux")
    if given is None or (one.merge_fn is not None and aux is None):
        return loss.gradient(params)

    where = trees.difference(params, given)
    if where is not None:
        raise ValueError(f"the gradients are not like the parameters: {where}.")

    def own():
        grads, own_aux = loss.gradient(params)
        same = jax.tree.map(lambda o, g: jnp.asarray(o, g.dtype), grads, given)
        return same, None if one.merge_fn is None else own_aux

    def of_caller():
        return given, None if one.merge_fn is None else aux

    return control.cond(leads, of_caller, own)


def restart(
    explorers: Mapping[str, Explorer],
    plan: Plan,
    state: Trajectory,
    opt_states: Mapping[str, Any],
    visible: optax.Params,
    decision: Decision,
    past: record.Round,
    since: jax.Array,
) -> tuple[dict[str, Any], Trajectory, jax.Array]:
    """The next round: which branches start from the visible parameters.

    Args:
      explorers: By name.
      plan: How trajectories go on.
      state: Where the branches are.
      opt_states: The inner states, by name.
      visible: The adopted parameters.
      decision: What was decided.
      past: The round that ends.
      since: ``[]`` int32, rounds since stable was last replaced.

    Returns:
      The inner states, where the branches are, and ``[K]`` bool, which branches
      start from parameters that are not their own.
    """
    adopted = decision.adopted
    total = state.alive.shape[0]
    index = jnp.arange(total, dtype=jnp.int32)
    owner = plan.owner(adopted, total)
    if plan.restart == "never":
        lead = jnp.where(adopted < total, adopted, total)
        fresh = index == lead
    else:
        lead = jnp.where(owner < total, owner, state.lead)
        fresh = jnp.ones([total], bool)
    if plan.restart in ("significant", "behind"):
        # Those that are slow at first may get further than the leader in the end: they
        # are behind where they have not reached what it had a round ago.
        current = past.seen.valid.shape[0] - 2
        rival = adopted if plan.restart == "significant" else current
        against = evidence.compare(past.seen, past.objective, rival)
        worse = against.z[:total] < -_WORSE
        fresh = worse | ~past.seen.valid[:total] | (index == lead)
    # Those who rest go with the others, so that they come back where these are.
    fresh |= past.rests[:total]
    ends = {}
    first = 0
    for name, one in explorers.items():
        mask = fresh[first : first + (one.size or 1)]
        mask = mask[0] if one.size is None else mask
        spread = _spread(visible, one.size)
        ends[name] = _select(mask, spread, state.ends[name])
        first += one.size or 1
    moved = fresh & (index != owner)
    # Its owner, too, leaves its own path where an average was adopted.
    elsewhere = fresh & (index != adopted)
    states = _renew(explorers, plan, opt_states, visible, moved, owner)
    grown = plan.length * plan.growth ** since.astype(jnp.float32)
    length = jnp.minimum(jnp.round(grown), float(plan.longest)).astype(jnp.int32)
    state = state._replace(
        step=jnp.zeros([], jnp.int32),
        length=length,
        lead=lead.astype(jnp.int32),
        start=visible,
        ends=ends,
        alive=jnp.ones_like(state.alive),
        is_ascent=jnp.zeros_like(state.is_ascent),
        age=jnp.where(elsewhere, 0, state.age),
    )
    return states, state, moved


def _renew(explorers, plan, opt_states, visible, fresh, owner):
    """The inner states of branches that restart: kept, made anew, or copied."""
    if plan.restart_state == "keep":
        return dict(opt_states)
    firsts, first = {}, 0
    for name, one in explorers.items():
        firsts[name] = first
        first += one.size or 1
    renewed = {}
    for name, one in explorers.items():
        size = one.size or 1
        mask = fresh[firsts[name] : firsts[name] + size]
        mask = mask[0] if one.size is None else mask
        if plan.restart_state == "new":
            made = steps.init_state(one, visible)
        else:
            made, known = _copied(explorers, opt_states, firsts, name, owner)
            mask = mask & known
        renewed[name] = _select(mask, made, opt_states[name])
    return renewed


def _copied(explorers, opt_states, firsts, name, owner):
    """The owner's state for this explorer, and whether it fits."""
    target = opt_states[name]
    single = explorers[name].size is None
    wanted = _member_types(target, single)
    sources, fits = [], []
    for other, one in explorers.items():
        alone = one.size is None
        fit = _member_types(opt_states[other], alone) == wanted
        place = opt_states[other] if fit else target
        size = one.size or 1
        if fit:
            sources.append(trees.Batch(place, one.size))
        else:
            sources += [trees.Batch(_first(target, single))] * size
        fits += [fit] * size
    nobody = trees.Batch(_first(target, single))
    state = trees.pick(owner, [*sources, nobody])
    known = jnp.asarray([*fits, False])[owner]
    return _spread(state, explorers[name].size), known


def _first(tree, single):
    return tree if single else jax.tree.map(lambda x: x[0], tree)


def _member_types(state, single):
    leaves, structure = jax.tree.flatten(state)
    return structure, [(x.shape[0 if single else 1 :], x.dtype) for x in leaves]


def _means(plan, tree):
    """Averages that begin."""
    return tuple(combine.wide(tree) for _ in plan.averages)


def _spread(tree, size):
    """The tree, or as many copies of it stacked."""
    if size is None:
        return tree
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)
    return trees.unlike_params(stacked)


def _select(mask, new, old):
    """Leafwise ``new`` where the mask holds, which runs over leading axes."""

    def one(n, o):
        shaped = mask.reshape(mask.shape + (1,) * (o.ndim - mask.ndim))
        return jnp.where(shaped, jnp.asarray(n, o.dtype), o)

    return jax.tree.map(one, new, old)
