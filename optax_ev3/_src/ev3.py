"""The composer: explore, assess and adapt as one optax transformation."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr, tree_leaves_with_path

from optax_ev3._src import arguments
from optax_ev3._src.adapt import guards
from optax_ev3._src.adapt.confident import confident
from optax_ev3._src.assess import stage as assess
from optax_ev3._src.base import callbacks as named
from optax_ev3._src.base import control, evidence, trees
from optax_ev3._src.base.decision import (
    Decision,
    Rule,
    enforce_validity,
    fallback,
)
from optax_ev3._src.explore import averages as combinations
from optax_ev3._src.explore import evolve, racing, steps, trajectory
from optax_ev3._src.explore import explorers as explore
from optax_ev3._src.history import credit, record

_RESTORE = (
    "To restore a checkpoint with its structure, give the library tx.init(params) as "
    "the target."
)


def ev3(
    inner: Sequence[Any] | Mapping[str, Any],
    assess_fn: assess.AssessFn,
    *,
    loss_fn: Callable[..., Any] | None = None,
    trajectory_length: int = 1,
    trajectory_growth: float = 1.0,
    max_trajectory_length: int | None = None,
    gradients: str | None = None,
    restart: str = "always",
    restart_state: str = "keep",
    combine: Sequence[combinations.Average] = (),
    race: racing.Racing | None = None,
    adapt: Rule | None = None,
    guard: guards.Guard | None = None,
    assess_mode: str = "unroll",
    axis_name: Any = None,
    history_length: int = 64,
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Explore, assess, adapt: many optimizers as one.

    Scores: **higher is better**. A loss becomes a score by
    ``assess_fn=optax_ev3.minimize(loss)``.

    A round is ``trajectory_length`` calls of ``update``, one if not said otherwise. In
    it each explorer proposes new parameters; at its end ``assess_fn`` scores all
    proposals on data that they were not fitted to, beside the ``current`` parameters,
    with which the round began, and the ``stable`` ones, the best known to be good; the
    rule ``adapt`` decides which of these candidates becomes visible. Within a round
    the visible parameters follow the *lead* branch, that of the explorer adopted last.

    What is not finite is never adopted. In rounds of one step an inner optimizer whose
    update is not finite keeps its earlier state. In longer ones a branch does not take
    a step whose gradients are not finite; where its parameters leave the finite numbers
    all the same, it goes on from the visible ones with a new inner state, and is no
    candidate in this round. :func:`optax_ev3.summary` counts such steps by explorer.

    An update of a one-step round has derivatives, in reverse mode too, for what learns
    rates or weights of examples; they are those of the candidate that is adopted, and
    none enters an assessment. Longer rounds have them in forward mode.

    Callbacks get, of the extra arguments of ``update``, just those that their
    signatures name, or all of them where they take ``**kwargs``. What
    ``functools.partial`` has bound stays bound; a default does not bind, the caller's
    argument of the same name replaces it. Inner optimizers
    that ask for ``value``, ``grad``, ``value_fn``, ``grad_fn`` or ``obj_fn`` get them
    from ``loss_fn``, or from the caller; where branches take gradients of their own,
    what the caller says is not of their parameters, and they get them from their loss.

    Args:
      inner: Explorers, a sequence or a mapping from names: optax transformations, or
        what :func:`optax_ev3.explorer`, :func:`optax_ev3.sweep` or
        :func:`optax_ev3.product` return.
      assess_fn: ``assess_fn(params, **named)`` -> scores, higher is better: ``[n]``
        (one for each example), ``[]`` (a single exact figure), or a mapping from
        names of objectives to such arrays; real or boolean. No gradient is taken
        through it. A parameter ``key`` gets a PRNG key of the round, the same for
        all candidates; under ``axis_name`` each device has its own. For data that
        rounds walk through, ``round`` gets ``[]`` int32, the number of rounds that
        have ended, ``run_key`` a PRNG key that is the same in all rounds and on all
        devices, and ``axis_name`` that of the transformation. Extra arguments of
        ``update`` that have one of these names come first.
      loss_fn: ``loss_fn(params, **named)`` -> real scalar: what branches differentiate
        with ``gradients="own"``, and what feeds inner optimizers that need more than a
        gradient, such as line searches. A parameter ``key`` gets a PRNG key of the
        call, the same for all explorers.
      trajectory_length: Calls of ``update`` between two assessments.
      trajectory_growth: The length is multiplied by this after every round without a
        significant improvement, and goes back to the start after one.
      max_trajectory_length: The length stops growing there; None for no bound.
      gradients: Where branches get theirs: ``"own"`` (each from ``loss_fn`` at its own
        parameters; the lead branch uses the caller's), ``"shared"`` (all use the
        caller's, taken at the lead branch: biased on purpose, and free) or ``"turns"``
        (one branch after the other uses the caller's, so that a round takes K times as
        many calls). Default: ``"own"`` with a ``loss_fn``, else ``"shared"``.
        Explorers with a loss of their own always use that.
      restart: Which branches start the next round from the adopted parameters:
        ``"always"`` (all), ``"significant"`` (those shown to be worse by a paired test
        at three standard errors, by the main objective, and those that became
        non-finite), ``"behind"`` (the same, but compared with ``current``, where the
        leader was a round ago: what is slow at first has time to catch up; for
        :func:`optax_ev3.evolve`) or ``"never"`` (independent runs, the best one
        visible; where another candidate is adopted, it stays visible for the next
        round).
      restart_state: What becomes of the inner state of a branch that restarts from
        parameters that are not its own: ``"keep"`` (as the paper), ``"new"``, or
        ``"copy"`` (the winner's, where its structure is the same, else kept).
      combine: More candidates at no gradient cost, see :mod:`optax_ev3.combine`.
      race: Explorers that do not win are paused, and cost nothing, see
        :class:`optax_ev3.explore.Racing`. Assessments are saved in the mode
        ``"unroll"``. Default: nobody is paused.
      adapt: The rule, see :mod:`optax_ev3.adapt`; default
        :func:`optax_ev3.adapt.confident`.
      guard: For a held-out set that is used again and again, see
        :func:`optax_ev3.evidence.ladder`.
      assess_mode: How the C candidates are scored: ``"unroll"`` (C calls in one
        program), ``"vmap"`` (one call on stacked parameters) or ``"map"`` (a compiled
        loop, the quickest to compile).
      axis_name: Name of a mapped axis (``shard_map``, ``pmap``, ``vmap``) over which
        the assessment examples are spread; gradients must be averaged by the caller
        as for any other optimizer.
      history_length: Rounds that :func:`optax_ev3.history` remembers.
      key: Seed or PRNG key of the transformation's own randomness.

    Returns:
      A transformation whose updates have the dtypes of the parameters: what is adopted
      is reached up to their rounding, and nothing is from parameters that are not
      finite (:func:`optax_ev3.stable_params` is exact and finite). ``update`` needs
      ``params``, and as keywords what the callbacks need. Where every explorer
      takes gradients of its own, the gradients that it is given may be None, or
      whatever the loop computes: under ``jit`` the compiler removes what nothing uses.

      Parameters may hold integers, booleans and typed PRNG keys, whose gradients are
      zeros, None, or what ``jax.grad(..., allow_int=True)`` gives. Updates of booleans
      are int8, so that ``optax.apply_updates`` can clear them. Nothing can be added to
      typed keys: they stay as the caller has them, and their update is what the caller
      gave as gradient.

    Raises:
      TypeError: If an argument is of the wrong kind; at trace time, if a callback
        misses a parameter, cannot be traced or returns something else than scores.
      ValueError: If there is no explorer or names are repeated, if a number is out of
        range; at trace time, if scores have the wrong shape or the rule cannot use
        them, or if the state belongs to other explorers.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_ev3
      >>> def score(w, x, y):  # one for each example, higher is better
      ...     return -((w * x - y) ** 2)
      >>> def loss(w, x, y):
      ...     return -score(w, x, y).mean()
      >>> tx = optax_ev3.ev3(
      ...     {"adam": optax.adam(0.1), "sgd": optax.sgd(0.3)}, assess_fn=score
      ... )
      >>> @jax.jit
      ... def step(w, state, train, held_out):
      ...     grads = jax.grad(loss)(w, *train)
      ...     updates, state = tx.update(grads, state, w, x=held_out[0], y=held_out[1])
      ...     return optax.apply_updates(w, updates), state
      >>> x = jnp.linspace(-1.0, 1.0, 64)
      >>> train, held_out = (x[::2], 3 * x[::2]), (x[1::2], 3 * x[1::2])
      >>> w = jnp.zeros([])
      >>> state = tx.init(w)
      >>> for _ in range(60):
      ...     w, state = step(w, state, train, held_out)
      >>> print(f"{w:.2f}")
      3.00

    References:
      Ding et al., `EV3: Ever Evolving Evaluator
      <https://arxiv.org/abs/2310.18893>`_, 2023.
    """
    explorers = explore.collect(inner)
    names = [m for name, one in explorers.items() for m in one.members(name)]
    losses = [loss_fn, *(one.loss_fn for one in explorers.values())]
    assess.check(assess_fn, losses)
    if loss_fn is not None:
        named.check_callback(loss_fn, "loss_fn")
    explore.check_spaces(explorers)
    if gradients is None:
        gradients = "shared" if loss_fn is None else "own"
    plan = arguments.plan(
        trajectory_length,
        trajectory_growth,
        max_trajectory_length,
        gradients,
        restart,
        restart_state,
        combinations.check(combine),
        loss_fn is None and any(one.loss_fn is None for one in explorers.values()),
    )
    more = combinations.names(plan.averages, names)
    explore.check_names([*names, *more])
    if assess_mode not in assess.MODES:
        raise ValueError(
            f"assess_mode must be one of {assess.MODES}, got {assess_mode!r}."
        )
    rule = adapt
    if rule is None:
        rule = confident()
    _check_judges(rule, guard)
    for name in rule.objectives:
        explore.check_characters(name, "an objective")
    history_length = arguments.static_int(history_length, "history_length")
    arguments.check_race(race, plan)
    key_impl = arguments.check_key(key)

    def init_fn(params: optax.Params) -> record.EV3State:
        params = jax.tree.map(trees.array, params)
        states, places = {}, explore.places(explorers)
        for name, one in explorers.items():
            positions = {
                member: record.place(place)
                for member, place in zip(one.members(name), places[name], strict=True)
            }
            states[name] = record.ExplorerState(
                positions,
                steps.first_state(one, name, params),
                jnp.zeros([] if one.size is None else [one.size], jnp.int32),
                evolve.init(one),
            )
        return record.EV3State(
            ev3_round=jnp.zeros([], jnp.int32),
            ev3_calls=jnp.zeros([], jnp.int32),
            ev3_key=trees.own(jax.random.key_data(arguments.typed_key(key))),
            explorers=states,
            combined={
                name: record.place(len(names) + i) for i, name in enumerate(more)
            },
            trajectory=()
            if plan.one_step
            else trajectory.init(explorers, plan, params),
            stable=jax.tree.map(trees.own, params),
            rule_state=rule.init(len(names) + len(more)),
            guarded=() if guard is None else guard.init(arguments.typed_key(key)),
            record=record.empty(
                history_length,
                len(names) + len(more) + 2,
                rule.objectives,
                _hyperparams(states),
            ),
            racing=()
            if race is None
            else racing.empty(race.window, len(names) + len(more) + 2),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, record.EV3State]:
        params = _checked_params(params)
        state = _checked_state(state, params, explorers, [*names, *more], init_fn)
        keys = _keys(state, key_impl, axis_name)
        hyperparams = _hyperparams(state.explorers)
        grads = steps.gradients_for(params, updates)
        call = steps.Call(grads, loss_fn, extra_args, keys.loss, axis_name, hyperparams)
        rests = _resting(explorers, plan, state, race)
        offered = {
            "key": keys.assess,
            "round": state.ev3_round,
            "run_key": keys.run,
        }
        rule_key, resample_key = jax.random.split(keys.rule)
        score = functools.partial(
            assess.score,
            assess_fn,
            mode=assess_mode,
            key=resample_key,
            extra_args=extra_args,
            offered=offered,
            axis_name=axis_name,
        )
        judge = _Judge(rule, guard, rule_key, score, axis_name, plan.one_step)
        walk = _one_step if plan.one_step else _trajectories
        with _about_flattened(params):
            update, state = walk(explorers, plan, state, params, call, judge, rests)
        calls = jnp.asarray(optax.safe_increment(state.ev3_calls))
        update = steps.update_for(params, update, updates)
        return update, state._replace(ev3_calls=calls)

    return optax.GradientTransformationExtraArgs(
        named.Opaque(init_fn), named.Opaque(update_fn)
    )


@contextlib.contextmanager
def _about_flattened(params):
    """Says of errors in callbacks that a wrapper may have changed the parameters."""
    try:
        yield
    except Exception as error:
        if jax.tree_util.all_leaves([params]) and jnp.ndim(params) == 1:
            error.add_note(
                f"The parameters are one vector, of shape {jnp.shape(params)}. If that "
                f"is the work of optax.flatten around ev3, put it inside, around the "
                f"inner optimizers."
            )
        raise


def _hyperparams(states):
    """By evolving group, the numbers of its members."""
    return {
        name: one.evolution.hyperparams
        for name, one in states.items()
        if one.evolution != ()
    }


def _resting(explorers, plan, state, race):
    """By name, which explorers rest in this round; nothing without a race."""
    if race is None:
        return {}
    places = explore.places(explorers)
    total = sum(map(len, places.values()))
    own = [
        [kind * total + i for kind in range(plan.kinds) for i in p]
        for p in places.values()
    ]
    rests = racing.resting(state.racing, own, race.patience, plan.apart)
    # All are called where nothing was valid in the last round.
    rests &= state.record.ended == state.ev3_round
    if not plan.one_step:
        # The visible parameters follow the lead branch.
        lead = state.trajectory.lead
        rests &= jnp.stack([(jnp.asarray(p) != lead).all() for p in places.values()])
    return dict(zip(explorers, rests, strict=True))


def _check_judges(rule, guard):
    """Raises unless rule and guard are such."""
    if not isinstance(rule, Rule):
        raise TypeError(
            "adapt must be a rule, such as optax_ev3.adapt.confident(), got "
            f"{rule!r} of type {type(rule).__name__}."
        )
    if guard is not None and not isinstance(guard, guards.Guard):
        raise TypeError(
            "guard must be a guard, such as optax_ev3.evidence.ladder(), got "
            f"{guard!r} of type {type(guard).__name__}."
        )


class _Verdict(NamedTuple):
    """A decision, and what comes with it.

    Attributes:
      decision: What is done: complete, and of valid candidates.
      overruled: ``[]`` bool, whether the rule decided otherwise.
      seen: The evidence that it rests on, after the guard.
      rule_state: What the rule remembers from now on.
      guarded: What the guard remembers before the decision is settled.
    """

    decision: Decision
    overruled: jax.Array
    seen: Any
    rule_state: Any
    guarded: Any


class _Judge(NamedTuple):
    """Assess and adapt: how scores are made and what decides."""

    rule: Rule
    guard: guards.Guard | None
    key: jax.Array
    score: Callable[..., assess.Scores]
    axis_name: Any
    one_step: bool

    def gather(self, scores: assess.Scores, valid: Any, is_ascent: Any) -> Any:
        """The evidence of the round."""
        return evidence.gather(
            scores.values,
            valid,
            is_ascent,
            self.axis_name,
            scores.binary,
            scores.example_mask,
        )

    def main(self, seen: Any) -> str:
        """The objective that comes first."""
        return evidence.main_objective(seen, self.rule.objectives)

    def decide(self, seen: Any, state: record.EV3State) -> _Verdict:
        """What the rule decides, without candidates that are not valid."""
        guarded, valid = state.guarded, seen.valid
        known = {
            "past": state.record,
            "credit": credit.estimate(state.record.credit, record.groups(state)),
            "one_step": self.one_step,
        }
        seen = dataclasses.replace(seen, **known)
        if self.guard is not None:
            key = jax.random.fold_in(self.key, 1)
            seen, guarded = self.guard.release(seen, guarded, key)
            # A guard may hide scores and candidates; it makes none valid.
            seen = dataclasses.replace(seen, valid=seen.valid & valid, **known)
        self.main(seen)  # What the rule cannot use is an error.
        decision, rule_state = self.rule.decide(seen, state.rule_state, self.key)
        decision, overruled = enforce_validity(decision, seen)
        return _Verdict(decision, overruled, seen, rule_state, guarded)


def _one_step(explorers, plan, state, params, call, judge, rests):
    """A round of one step of all explorers from the same parameters."""
    opt_states = _opt_states(state)
    proposed = steps.propose(explorers, opt_states, params, call, rests)
    moves = [
        trees.Batch(step.update, explorers[name].size, rests.get(name))
        for name, step in proposed.items()
    ]
    candidates = [m._replace(tree=_apply(params, m)) for m in moves]
    candidates += [trees.Batch(params), trees.Batch(state.stable)]
    valid = _flags([step.finite for step in proposed.values()], True)
    is_ascent = _flags([step.is_ascent for step in proposed.values()], False)
    scores = judge.score(candidates, valid)
    seen = judge.gather(scores, valid, is_ascent)
    moves += _stay_or_back(params, state.stable)
    lasted = _Lasted(explorers, plan, rests, jnp.ones([], jnp.int32))
    skipped = {
        name: ~step.finite & ~rests.get(name, jnp.asarray(False))
        for name, step in proposed.items()
    }
    state = state._replace(
        explorers=_with(state, {k: s.opt_state for k, s in proposed.items()})
    )
    state = _counted(state, skipped)
    decision, state, past = _adapt(judge, seen, state, lasted)
    everybody = jnp.ones(explore.spread(explorers, rests).shape, bool)
    state = _evolved(judge, state, lasted, decision.adopted, past, everybody)
    update = trees.pick(decision.adopted, moves)
    sizes = [one.size for one in explorers.values()]
    updates = [step.update for step in proposed.values()]

    def promote(stable, operands):
        params, updates, index = operands
        pairs = zip(updates, sizes, strict=True)
        moves = [trees.Batch(update, size) for update, size in pairs]
        moves += _stay_or_back(params, stable)
        return trees.plus(params, trees.pick(index, moves))

    return update, state._replace(
        stable=trees.once_with(
            decision.significant,
            promote,
            state.stable,
            (params, updates, decision.promoted),
        ),
    )


def _stay_or_back(params, stable):
    """The moves to ``current`` and to ``stable``."""
    return [
        trees.Batch(trees.Lazy(lambda: trees.no_update(params))),
        trees.Batch(trees.Lazy(lambda: _towards(stable, params))),
    ]


def _trajectories(explorers, plan, state, params, call, judge, rests):
    """One step of the branches; at the end of a round, assess and adapt as well."""
    opt_states, walked, finite, skipped = trajectory.advance(
        explorers,
        plan,
        state.trajectory,
        _opt_states(state),
        params,
        call,
        rests,
    )
    state = state._replace(trajectory=walked, explorers=_with(state, opt_states))
    state = _counted(state, skipped)

    def mend(state):
        opt_states, mended = trajectory.mend(
            explorers, plan, state.trajectory, _opt_states(state), params, finite
        )
        return state._replace(trajectory=mended, explorers=_with(state, opt_states))

    def finish(state):
        return _finish(explorers, plan, state, params, judge, rests)

    turns = walked.alive.shape[0] if plan.gradients == "turns" else 1
    done = walked.step >= turns * walked.length
    broken = ~jnp.stack([flag.all() for flag in finite.values()]).all()
    if not control.is_traced(done) and state.ev3_calls == 0:
        jax.eval_shape(finish, state)  # Errors come in the first call, eager or not.
    # One loop around both: on GPUs the host waits once in a step.
    state = trees.once(
        done | broken,
        lambda state: trees.once(done, finish, trees.once(broken, mend, state)),
        state,
    )
    visible = trajectory.visible_params(explorers, plan, state.trajectory, params)
    return _towards(visible, params), state


def _finish(explorers, plan, state, params, judge, rests):
    """The end of a round: adopt a candidate, and start the next round."""
    walked = state.trajectory
    more = len(state.combined)
    is_ascent = jnp.append(walked.is_ascent > 0, jnp.zeros([more + 2], bool))
    candidates, scores, valid = _assess_round(explorers, plan, state, judge, rests)
    seen = judge.gather(scores, valid, is_ascent)
    lasted = _Lasted(explorers, plan, rests, walked.length)
    decision, state, past = _adapt(judge, seen, state, lasted)
    adopted = decision.adopted
    target = trees.pick(adopted, candidates)
    # Where the caller gets to, but from where no update leads there.
    visible = trees.plus(params, _towards(target, params))
    visible = trees.where(trees.finite(visible), visible, target)
    opt_states = _opt_states(state)
    since = state.record.since
    opt_states, walked, restarted = trajectory.restart(
        explorers, plan, walked, opt_states, visible, decision, past, since
    )

    def promote(_):
        promoted = trees.pick(decision.promoted, candidates)
        return trees.where(decision.promoted == adopted, visible, promoted)

    state = state._replace(explorers=_with(state, opt_states), trajectory=walked)
    state = _evolved(judge, state, lasted, adopted, past, restarted)
    return state._replace(
        stable=trees.once(decision.significant, promote, state.stable),
    )


def _assess_round(explorers, plan, state, judge, rests):
    """All candidates, their scores, and which of them are finite."""
    walked = state.trajectory
    alive = (walked.alive > 0) & ~explore.spread(explorers, rests)
    ends = [
        trees.Batch(walked.ends[k], one.size, rests.get(k))
        for k, one in explorers.items()
    ]
    ends += [
        end._replace(tree=combinations.like(walked.means[k][number], end.tree))
        for number in range(len(plan.averages))
        for k, end in zip(explorers, ends, strict=True)
    ]
    fixed = [trees.Batch(walked.start), trees.Batch(state.stable)]
    valid = jnp.concatenate([*[alive] * plan.kinds, jnp.ones([2], bool)])
    candidates = [*ends, *fixed]
    return candidates, judge.score(candidates, valid), valid


class _Lasted(NamedTuple):
    """A round that ends: who took part, and how long.

    Attributes:
      explorers: By name.
      plan: How trajectories go on.
      rests: By name ``[]`` bool, who did not; none for all who did.
      length: ``[]`` int32, calls of ``update`` in each branch.
    """

    explorers: Mapping[str, explore.Explorer]
    plan: trajectory.Plan
    rests: Mapping[str, jax.Array]
    length: jax.Array


def _adapt(judge, seen, state, lasted):
    """The decision, the state with what is remembered, and what the round was."""
    examples = evidence.examples(seen)
    decision, overruled, seen, rule_state, guarded = judge.decide(seen, state)
    # A round without any valid proposal decides nothing and teaches nothing.
    explored = seen.valid[:-2].any()
    rested = explore.spread(lasted.explorers, lasted.rests)
    rested = lasted.plan.with_averages(rested, seen.valid.shape[0])
    ended = jnp.asarray(optax.safe_increment(state.ev3_round))
    past = record.Round(
        seen,
        judge.main(seen),
        judge.rule.objectives,
        rested,
        lasted.length,
        examples,
        ended,
        _hyperparams(state.explorers),
        overruled,
    )
    appended = record.append(state.record, decision, past)
    raced = state.racing
    if raced != ():
        raced = racing.append(raced, appended)
    decision = decision._replace(
        adopted=jnp.where(explored, decision.adopted, fallback(seen)),
        significant=explored & decision.significant,
    )
    if lasted.rests and judge.rule.forget is not None:
        # That they were not valid says nothing about those who rested.
        rule_state = judge.rule.forget(rule_state, rested[:-2])
    if judge.guard is not None:
        guarded = judge.guard.settle(
            guarded, seen, decision.significant, decision.promoted
        )
    state = state._replace(
        ev3_round=ended,
        rule_state=trees.where(explored, rule_state, state.rule_state),
        guarded=trees.where(explored, guarded, state.guarded),
        record=trees.where(explored, appended, state.record),
        racing=trees.where(explored, raced, state.racing),
    )
    return decision, state, past


def _evolved(judge, state, lasted, adopted, past, restarted):
    """The state after groups that evolve have moved on."""
    if not any(one.space for one in lasted.explorers.values()):
        return state
    groups, fresh = evolve.advance(
        lasted.explorers,
        {name: one.evolution for name, one in state.explorers.items()},
        past,
        lasted.plan.owner(adopted, restarted.shape[0]),
        lasted.plan.kinds,
        restarted,
        jax.random.fold_in(judge.key, 2),
    )
    moved = {k: one._replace(evolution=groups[k]) for k, one in state.explorers.items()}
    state = state._replace(explorers=moved)
    if judge.rule.forget is None:
        return state
    fresh = lasted.plan.with_averages(fresh, past.seen.valid.shape[0] - 2)
    return state._replace(rule_state=judge.rule.forget(state.rule_state, fresh))


def _opt_states(state):
    """The inner states, by name."""
    return {name: one.opt_state for name, one in state.explorers.items()}


def _with(state, opt_states):
    return {
        name: one._replace(opt_state=opt_states[name])
        for name, one in state.explorers.items()
    }


def _counted(state, skipped):
    """The state, with the steps of this call that came to nothing."""
    explorers = {}
    for name, one in state.explorers.items():
        count = jnp.where(skipped[name], optax.safe_increment(one.skipped), one.skipped)
        explorers[name] = one._replace(skipped=count)
    return state._replace(explorers=explorers)


def _flags(found, rest):
    """One flag for each explorer, and the same for current and stable."""
    return jnp.concatenate([*map(jnp.atleast_1d, found), jnp.full([2], rest)])


def _apply(params, move):
    """Params after an update, or after each of several updates."""
    if move.size is None:
        return trees.plus(params, move.tree)
    return jax.vmap(lambda update: trees.plus(params, update))(move.tree)


def _towards(target, params):
    """The update that leads to the target, as far as one update can."""
    return jax.tree.map(trees.in_range, trees.minus(target, params))


class _Keys(NamedTuple):
    """PRNG keys; under an axis every device has its own to assess and for losses.

    Attributes:
      assess: Of this round, for the assessment.
      rule: Of this round, for the rule.
      loss: Of this call, for losses.
      run: The same at all times.
    """

    assess: jax.Array
    rule: jax.Array
    loss: jax.Array
    run: jax.Array


def _keys(state, key_impl, axis_name):
    key = jax.random.wrap_key_data(state.ev3_key, impl=key_impl)
    assess_key, rule_key = jax.random.split(jax.random.fold_in(key, state.ev3_round))
    # Rounds count from the front, calls from the back: no key is used twice. No number
    # is left for the run: its key is a third one of the first round.
    loss_key = jax.random.fold_in(key, -1 - state.ev3_calls)
    run_key = jax.random.fold_in(jax.random.fold_in(key, 0), 2)
    if axis_name is not None:
        device = lax.axis_index(axis_name)
        assess_key = jax.random.fold_in(assess_key, device)
        loss_key = jax.random.fold_in(loss_key, device)
    return _Keys(assess_key, rule_key, loss_key, run_key)


def _checked_params(params: optax.Params | None) -> optax.Params:
    """The parameters as arrays; raises unless ``update`` was given all of them."""
    if params is None:
        raise ValueError(
            "ev3 needs the current value of the parameters: pass them as "
            "tx.update(grads, state, params), or, where the loop does not, let the "
            "state hold them: optax_ev3.keep_params(tx)."
        )
    if any(map(_is_hole, jax.tree.leaves(params, is_leaf=_is_hole))):
        raise ValueError(
            "assess_fn would see params with holes: optax.masked and optax.partition "
            "must stand inside ev3, around its inner optimizers, and not around it."
        )
    return jax.tree.map(trees.array, params)


def _checked_state(state, params, explorers, candidates, init_fn):
    """The state with the dtypes that ``init`` gave it; raises if it is another's."""
    if not isinstance(state, record.EV3State):
        raise TypeError(
            f"update needs the state that init returned, an EV3State, got "
            f"{type(state).__name__}. {_RESTORE}"
        )
    if set(state.explorers) != set(explorers):
        raise ValueError(
            f"the state belongs to the {len(state.explorers)} explorers "
            f"{sorted(state.explorers)}, this transformation has {len(explorers)}: "
            f"{sorted(explorers)}."
        )
    order = record.candidates(state)[:-2]
    if sorted(order) == sorted(candidates) and order != candidates:
        raise ValueError(
            f"the state belongs to candidates in the order {order}, this "
            f"transformation has them in the order {candidates}: give ev3 its "
            f"explorers, and what it combines, in the order of the state's."
        )
    expected = jax.eval_shape(init_fn, params)
    want, got = (
        {keystr(path): leaf for path, leaf in tree_leaves_with_path(tree)}
        for tree in (expected, state)
    )
    for path in [*want, *got]:
        if path in want and path in got and _fits(got[path], want[path]):
            continue
        found, needed = (
            _spec(leaves[path]) if path in leaves else "nothing"
            for leaves in (got, want)
        )
        is_key = trees.is_key(got.get(path)) and not trees.is_key(want.get(path))
        raise ValueError(
            f"the state does not belong to this transformation and these parameters: "
            f"at {path} it has {found}, expected {needed}."
            + " PRNG keys are kept as jax.random.key_data(key)."
            * is_key
        )
    where = trees.difference(expected, state)
    if where is not None:
        raise ValueError(
            f"the state has another structure than init returned: {where}. {_RESTORE}"
        )
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), state, expected)


def _fits(leaf, like):
    """Whether a leaf may be cast: optax, too, takes a Python number for a float16."""
    dtype = jnp.result_type(leaf)
    higher = trees.rank(dtype) > trees.rank(like.dtype)
    kinds = dtype == like.dtype or (trees.rank(dtype) >= 0 and not higher)
    return kinds and jnp.shape(leaf) == like.shape


def _spec(leaf):
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _is_hole(node):
    return isinstance(node, optax.MaskedNode)
