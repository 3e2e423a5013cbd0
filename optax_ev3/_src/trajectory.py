"""Trajectories: the explorers' branches between two assessments.

Dimensions: ``K`` explorers, those of sweeps counted one by one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_ev3._src import combine, evidence, steps, trees
from optax_ev3._src.explore import Explorer

GRADIENTS = ("own", "shared", "turns")
RESTARTS = ("always", "significant", "never")
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
    combinations: tuple[combine.Combination, ...]

    @property
    def one_step(self) -> bool:
        """Whether every round is one step of all explorers from the same place."""
        longer = self.length > 1 or (self.growth > 1 and self.longest > 1)
        elsewhere = self.restart != "always" or self.restart_state != "keep"
        return not (longer or elsewhere or self.combinations)


class Trajectory(NamedTuple):
    """Where the branches are.

    Attributes:
      step: ``[]`` int32, calls of ``update`` since the round's start.
      length: ``[]`` int32, calls that a branch takes in this round.
      stalled: ``[]`` int32, rounds since the last significant improvement.
      lead: ``[]`` int32, the explorer whose branch is visible; K if none is.
      start: The parameters at the round's start.
      ends: By name, the parameters of the branches, those of a sweep stacked.
      alive: ``[K]`` int32, 0 where a branch became non-finite in this round.
      climbs: ``[K]`` int32, steps of this round that went uphill less those downhill.
      means: By name, averages over the trajectories, or nothing.
      average: Exponential average of the visible parameters, or nothing.
    """

    step: jax.Array
    length: jax.Array
    stalled: jax.Array
    lead: jax.Array
    start: optax.Params
    ends: dict[str, optax.Params]
    alive: jax.Array
    climbs: jax.Array
    means: dict[str, optax.Params]
    average: Any


def init(explorers: Mapping[str, Explorer], plan: Plan, params: Any) -> Trajectory:
    """All branches at ``params``."""
    total = sum(one.size or 1 for one in explorers.values())
    kinds = [type(one) for one in plan.combinations]
    ends = {name: _spread(params, one.size) for name, one in explorers.items()}
    averaged = combine.TrajectoryAverage in kinds
    state = Trajectory(
        step=jnp.zeros([], jnp.int32),
        length=jnp.asarray(plan.length, jnp.int32),
        stalled=jnp.zeros([], jnp.int32),
        lead=jnp.zeros([], jnp.int32),
        start=params,
        ends=ends,
        alive=jnp.ones([total], jnp.int32),
        climbs=jnp.zeros([total], jnp.int32),
        means={k: combine.wide(v) for k, v in ends.items()} if averaged else {},
        average=combine.wide(params) if combine.ExponentialAverage in kinds else (),
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
    calls: jax.Array,
) -> tuple[optax.Updates, dict[str, Any], Trajectory]:
    """One call: every branch, or the one whose turn it is, takes a step.

    Args:
      explorers: By name.
      plan: How trajectories go on.
      state: Where the branches are.
      opt_states: The inner states, by name.
      params: The visible parameters: those of the lead branch.
      call: What the caller gave.
      calls: ``[]`` int32, calls of ``update`` before this one.

    Returns:
      The update of the visible parameters, the inner states, and where the branches
      are.
    """
    turns = plan.gradients == "turns"
    lead = state.step // state.length if turns else state.lead
    walk = _Walk(plan, lead, state.step % state.length, params, call)
    visible, ends, means, new_states, alive, climbs = [], {}, {}, {}, [], []
    first = 0
    for name, one in explorers.items():
        size = one.size or 1
        rows = slice(first, first + size)
        index = jnp.arange(first, first + size, dtype=jnp.int32)
        mean = state.means.get(name, ())
        branch = _Branch(
            opt_states[name], state.ends[name], mean, state.alive[rows], index
        )
        if one.size is None:
            branch = branch._replace(alive=branch.alive[0], number=index[0])

        def go(tx, branch, one=one, name=name):
            return _go(tx, one, name, branch, walk)

        branch, uphill = one.each(go, branch)
        visible.append(trees.Batch(branch.end, one.size))
        new_states[name], ends[name] = branch.opt_state, branch.end
        if state.means:
            means[name] = branch.mean
        alive.append(jnp.reshape(branch.alive, [size]))
        climbs.append(state.climbs[rows] + jnp.reshape(uphill, [size]))
        first += size
    # From the ends, not from the updates, which would all have to be kept for that.
    # Without a lead branch the visible parameters stand still.
    moved = trees.pick(lead, [*visible, trees.Batch(params)])
    update = jax.tree.map(lambda end, p: end - p, moved, params)
    step = state.step + 1
    if turns:
        # The next branch starts where this one did.
        back = (step % state.length == 0) & (step < first * state.length)
        update = trees.where(
            back, jax.tree.map(lambda s, p: s - p, state.start, params), update
        )
    average = state.average
    for one in plan.combinations:
        if isinstance(one, combine.ExponentialAverage):
            weight = combine.exponential_weight(one.decay, calls)
            average = combine.move(average, optax.apply_updates(params, update), weight)
    state = state._replace(
        step=step,
        ends=ends,
        alive=jnp.concatenate(alive),
        climbs=jnp.concatenate(climbs),
        means=means,
        average=average,
    )
    return update, new_states, state


class _Walk(NamedTuple):
    """What all branches of a call have in common."""

    plan: Plan
    lead: jax.Array
    step: jax.Array
    params: optax.Params
    call: steps.Call


class _Branch(NamedTuple):
    """A branch, or those of a sweep."""

    opt_state: Any
    end: optax.Params
    mean: Any
    alive: jax.Array
    number: jax.Array


def _go(tx, one, name, branch, walk):
    """The branch after a step, if it is due, and +1 if uphill, -1 if downhill."""
    if walk.plan.gradients != "turns":
        return _step(tx, one, name, branch, walk)

    def wait():
        return branch, jnp.zeros([], jnp.int32)

    def run():
        return _step(tx, one, name, branch, walk)

    return lax.cond(branch.number == walk.lead, run, wait)


def _step(tx, one, name, branch, walk):
    leads = branch.number == walk.lead
    params = trees.where(leads, walk.params, branch.end)
    loss = steps.loss_of(one, name, walk.call)
    grads, aux = _gradients(one, loss, params, branch.end, leads, walk)
    merge = steps.merge_of(one, name, aux)
    alive = branch.alive > 0
    step = steps.advance(
        tx, one, name, grads, branch.opt_state, params, merge, loss, walk.call, alive
    )
    end = optax.apply_updates(params, step.update)
    end = trees.where(step.finite, end, params)
    mean = branch.mean
    if mean != ():
        mean = combine.move(mean, end, 1 / (walk.step + 1))
    moved = _Branch(
        step.opt_state, end, mean, step.finite.astype(jnp.int32), branch.number
    )
    climbed = jnp.where(step.finite, jnp.where(step.uphill, 1, -1), 0)
    return moved, climbed.astype(jnp.int32)


def _gradients(one, loss, params, end, leads, walk):
    """Gradients of a branch, and what its loss returned beside its value."""
    given, aux = walk.call.grads, walk.call.extra_args.get("aux")
    if one.loss_fn is not None:
        return loss.gradient(params)
    if walk.plan.gradients != "own":
        return given, aux
    if one.merge_fn is not None and aux is None:
        return loss.gradient(params)

    def own():
        # No lead branch: its parameters are those at its end.
        grads, own_aux = loss.gradient(end)
        same = jax.tree.map(lambda o, g: jnp.asarray(o, g.dtype), grads, given)
        return same, None if one.merge_fn is None else own_aux

    return lax.cond(leads, lambda: (given, None if one.merge_fn is None else aux), own)


def restart(
    explorers: Mapping[str, Explorer],
    plan: Plan,
    state: Trajectory,
    opt_states: Mapping[str, Any],
    visible: optax.Params,
    adopted: jax.Array,
    significant: jax.Array,
    seen: evidence.Evidence,
) -> tuple[dict[str, Any], Trajectory]:
    """The next round: which branches start from the visible parameters.

    Args:
      explorers: By name.
      plan: How trajectories go on.
      state: Where the branches are.
      opt_states: The inner states, by name.
      visible: The adopted parameters.
      adopted: ``[]`` int32, index of their candidate.
      significant: ``[]`` bool, whether they became stable.
      seen: The evidence of the round.

    Returns:
      The inner states, and where the branches are.
    """
    total = state.alive.shape[0]
    index = jnp.arange(total, dtype=jnp.int32)
    # The average of a branch belongs to its explorer; other candidates to nobody.
    averages = total if state.means else 0
    owner = jnp.where(adopted < total + averages, adopted % total, total)
    if plan.restart == "never":
        lead = jnp.where(adopted < total, adopted, total)
        fresh = index == lead
    else:
        lead = jnp.where(owner < total, owner, state.lead)
        fresh = jnp.ones([total], bool)
    if plan.restart == "significant":
        objective = evidence.single_objective(seen)
        against = evidence.compare(seen, objective, adopted)
        worse = against.z[:total] < -_WORSE
        fresh = worse | ~seen.valid[:total] | (index == lead)
    ends = {}
    first = 0
    for name, one in explorers.items():
        mask = fresh[first : first + (one.size or 1)]
        mask = mask[0] if one.size is None else mask
        spread = _spread(visible, one.size)
        ends[name] = _select(mask, spread, state.ends[name])
        first += one.size or 1
    states = _renew(
        explorers, plan, opt_states, visible, fresh & (index != owner), owner
    )
    stalled = jnp.where(significant, 0, state.stalled + 1)
    grown = plan.length * plan.growth ** stalled.astype(jnp.float32)
    length = jnp.minimum(jnp.round(grown), float(plan.longest)).astype(jnp.int32)
    return states, state._replace(
        step=jnp.zeros([], jnp.int32),
        length=length,
        stalled=stalled,
        lead=lead.astype(jnp.int32),
        start=visible,
        ends=ends,
        alive=jnp.ones_like(state.alive),
        climbs=jnp.zeros_like(state.climbs),
    )


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


def _spread(tree, size):
    """The tree, or as many copies of it stacked."""
    if size is None:
        return tree
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), tree)


def _select(mask, new, old):
    """Leafwise ``new`` where the mask holds, which runs over leading axes."""

    def one(n, o):
        shaped = mask.reshape(mask.shape + (1,) * (o.ndim - mask.ndim))
        return jnp.where(shaped, n.astype(o.dtype), o)

    return jax.tree.map(one, new, old)
