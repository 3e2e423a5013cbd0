"""The composer: explore, assess, adapt."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src import arguments, inputs, keys
from optax_ev3._src.adapt.decide import decide
from optax_ev3._src.assess import stage as assess
from optax_ev3._src.base import control, select, trees
from optax_ev3._src.base.decision import Rule
from optax_ev3._src.base.evidence import Evidence, examples, gather
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.states import EV3State, RoundInfo, hyperparams
from optax_ev3._src.explore import calls
from optax_ev3._src.explore.calls import Call
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.strategy import Candidates, Context, Explored, Strategy
from optax_ev3._src.history import buffer, credit, lookup


class Composer(NamedTuple):
    """The transformation: the arguments of :func:`optax_ev3.ev3`, checked."""

    explorers: Mapping[str, Explorer]
    layout: Layout
    strategy: Strategy
    rule: Rule
    assess_fn: assess.AssessFn
    loss_fn: Callable[..., Any] | None
    assess_mode: str
    axis_name: Any
    history_length: int
    key: Any
    key_impl: Any

    def init(self, params: optax.Params) -> EV3State:
        params = inputs.as_arrays(params)
        explore = self.strategy.init(self.explorers, self.layout, params)
        return EV3State(
            ev3_round=jnp.zeros([], jnp.int32),
            ev3_calls=jnp.zeros([], jnp.int32),
            ev3_key=trees.owned_copy(jax.random.key_data(keys.typed(self.key))),
            explore=explore,
            stable=jax.tree.map(trees.owned_copy, params),
            # Rules may use an array twice; donated, each needs a buffer of its own.
            rule_state=jax.tree.map(
                trees.owned_copy, self.rule.init(self.layout.proposals)
            ),
            history=buffer.empty(
                self.history_length,
                self.layout,
                self.rule.objectives,
                hyperparams(explore.explorers),
            ),
        )

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EV3State]:
        params = inputs.checked_params(params)
        state = inputs.checked_state(state, params, self.layout, self.init)
        functions = assess.innermost(self.assess_fn), self.loss_fn
        arguments.check_aux(extra_args.get("aux"), self.explorers, functions)
        now = keys.split(state, self.key_impl, self.axis_name)
        grads = calls.gradients_for(params, updates)
        numbers = hyperparams(state.explore.explorers)
        call = Call(
            grads,
            self.loss_fn,
            extra_args,
            now.loss,
            self.axis_name,
            numbers,
            count=state.ev3_calls,
        )
        ctx = Context(self.explorers, self.layout, params, call)
        with inputs.about_flattened(params):
            explored = self.strategy.step(ctx, state.explore)
            state = state._replace(explore=explored.state)
            end_round = functools.partial(self._end_round, ctx, explored, now)
            is_known = explored.is_over is True or control.is_traced(explored.is_over)
            if not is_known and state.ev3_calls == 0:
                # Errors come in the first call of an eager round, not in its last.
                jax.eval_shape(end_round, (state, ()))

            def conclude(carry: Any) -> Any:
                state, move = carry
                renew = self.strategy.reinitialized(ctx, explored)
                explore = select.apply_if(explored.is_broken, renew, state.explore)
                carry = state._replace(explore=explore), move
                return select.apply_if(explored.is_over, end_round, carry)

            # One conditional around both: on GPUs the host waits once in a step.
            due = explored.is_over | explored.is_broken
            state, move = select.apply_if(due, conclude, (state, ()))
            update = self.strategy.update(ctx, state.explore, move)
        update = calls.update_for(params, update, updates)
        counted = jnp.asarray(optax.safe_increment(state.ev3_calls))
        return update, state._replace(ev3_calls=counted)

    def _end_round(
        self, ctx: Context, explored: Explored, now: keys.Keys, carry: Any
    ) -> tuple[EV3State, Any]:
        """Assess, adapt, and begin the next round."""
        state, _ = carry
        candidates = self.strategy.candidates(
            ctx, explored, state.explore, state.stable
        )
        evidence = self._assess(ctx, candidates, now, state.ev3_round)
        state, info = self._adapt(ctx, explored, now, state, evidence)
        finished = self.strategy.finish(
            ctx, explored, candidates, state.explore, state.stable, info
        )
        if finished.fresh is not None:
            state = self._forgotten(state, self.layout.tile(finished.fresh))
        state = state._replace(explore=finished.state, stable=finished.stable)
        return state, finished.move

    def _assess(
        self, ctx: Context, candidates: Candidates, now: keys.Keys, ended: jax.Array
    ) -> Evidence:
        """The scores of all candidates; ``ended`` rounds were before this one."""
        offered = {"key": now.assess, "round": ended, "run_key": now.run}
        rows, valid = candidates.rows, candidates.finite
        scores = assess.score(
            self.assess_fn,
            candidates.params,
            valid if rows is None else valid[rows],
            mode=self.assess_mode,
            key=now.resample,
            extra_args=ctx.call.extra_args,
            offered=offered,
            axis_name=self.axis_name,
        )
        return gather(
            assess.spread(scores.values, rows, self.layout.candidates),
            candidates.finite,
            candidates.is_ascent,
            self.axis_name,
            scores.binary,
            scores.example_mask,
        )

    def _adapt(
        self,
        ctx: Context,
        explored: Explored,
        now: keys.Keys,
        state: EV3State,
        evidence: Evidence,
    ) -> tuple[EV3State, RoundInfo]:
        """What the rule decides, and what is remembered of it."""
        layout, past = self.layout, state.history
        evidence = dataclasses.replace(
            evidence,
            past=past,
            credit=credit.estimate(past.credit, lookup.groups(state.explore)),
            one_step=self.strategy.one_step,
        )
        verdict = decide(self.rule, evidence, state.rule_state, now.rule)
        since = jnp.asarray(optax.safe_increment(past.since))
        since = jnp.where(verdict.explored, since, past.since)
        info = RoundInfo(
            evidence=verdict.evidence,
            objective=verdict.objective,
            objectives=self.rule.objectives,
            decision=verdict.decision,
            overruled=verdict.overruled,
            explored=verdict.explored,
            paused=layout.tile(layout.repeat(explored.paused)),
            length=self.strategy.length(state.explore),
            examples=examples(evidence),
            since=jnp.where(verdict.decision.significant, 0, since),
            hyperparams=ctx.call.hyperparams,
            key=now.rule,
        )
        state = state._replace(
            ev3_round=jnp.asarray(optax.safe_increment(state.ev3_round)),
            rule_state=verdict.rule_state,
            history=buffer.append(past, info),
        )
        if explored.paused:
            # That they were not valid says nothing about those who were paused.
            state = self._forgotten(state, info.paused)
        return state, info

    def _forgotten(self, state: EV3State, flags: jax.Array) -> EV3State:
        """The state without what the rule knows of some candidates, ``[C]`` bool."""
        if self.rule.forget is None:
            return state
        flags = flags[: self.layout.proposals]
        return state._replace(rule_state=self.rule.forget(state.rule_state, flags))
