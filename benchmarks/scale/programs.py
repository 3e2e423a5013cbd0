"""The training steps that are compared: of plain Adam, and of EV3."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optax_ev3
from benchmarks.scale import model
from optax_ev3 import explore

ADAM, OURS = "adam", "ev3"


class Case(NamedTuple):
    """EV3 in one setting.

    Attributes:
      strategy: "one step", "branches", "relay", or "portfolio", which brings its
        explorers along.
      explorers: How many.
      kind: "alike" (Adams whose learning rates differ), "unlike" (other optimizers).
    """

    strategy: str
    explorers: int
    kind: str


class Problem(NamedTuple):
    """A model, and what its parameters go through before they are used."""

    shape: model.Shape
    whole: Callable[[Any], Any] = lambda tree: tree

    def score_fn(self, params, tokens):
        return model.log_likelihood(self.shape, params, tokens, self.whole)

    def loss_fn(self, params, batch):
        return -self.score_fn(params, batch).mean()


def inner_optimizers(case: Case) -> dict[str, optax.GradientTransformation]:
    if case.kind == "alike":
        rates = np.geomspace(1e-2, 1e-4, case.explorers)
        return {f"adam_{rate:.2g}": optax.adam(float(rate)) for rate in rates}
    kinds = {
        "adam": optax.adam(1e-3),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "rmsprop": optax.rmsprop(1e-3),
        "lion": optax.lion(1e-4),
        "adabelief": optax.adabelief(1e-3),
        "adagrad": optax.adagrad(1e-2),
        "nadam": optax.nadam(1e-3),
        "yogi": optax.yogi(1e-3),
    }
    return {name: kinds[name] for name in list(kinds)[: case.explorers]}


def transformation(problem: Problem, case: Case):
    """EV3 as a transformation."""

    def assess_fn(params, held_out):
        return problem.score_fn(params, held_out)

    def loss_fn(params, batch):
        return problem.loss_fn(params, batch)

    if case.strategy == "portfolio":
        return optax_ev3.portfolio(assess_fn, loss_fn)
    inner = inner_optimizers(case)
    if case.strategy == "branches":
        strategy = explore.branches()
        return optax_ev3.ev3(inner, assess_fn, loss_fn=loss_fn, explore=strategy)
    chosen = {"one step": explore.one_step(), "relay": explore.relay()}
    return optax_ev3.ev3(inner, assess_fn, explore=chosen[case.strategy])


def step_fn(problem: Problem, tx: optax.GradientTransformation):
    """A training step, the same loop for every optimizer."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, batch, held_out):
        grads = jax.grad(problem.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch, held_out=held_out)
        return optax.apply_updates(params, updates), state

    return step
