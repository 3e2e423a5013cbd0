"""The mission's own line: EV3 of Adam 0.001 and SGD 0.1, against each of them alone.

The eleven tasks of the quality suite. Everybody takes as many gradients, two for each
of the task's steps, and gets the same parts of the data, initial parameters and
batches. Of EV3 two sets of parameters are evaluated at the end, those of
`optax_ev3.best_params` and those of the loop. The better optimizer alone is chosen in
hindsight, by its mean test figure. A run that ends worse than its initial parameters
counts as these.

one step: `ev3(inner, assess_fn)`.
relay: `ev3(inner, assess_fn, explore=explore.relay())`.
relay, three harmful more: SGD uphill, SGD 1000, and one whose updates are NaN.
constant score: a relay whose `assess_fn` cannot tell anything.

Tuned on seeds 100 to 109 (`--first-seed 100`); reported are seeds 0 to 9.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

import optax_ev3
from benchmarks.data import stacked
from benchmarks.quality.methods import HARMFUL, assessed
from benchmarks.quality.tasks import TASKS
from benchmarks.report import show
from benchmarks.results import tidy
from benchmarks.run import Cell, Suite
from benchmarks.training import TWO, batch_of, over_seeds
from optax_ev3 import explore


class Settings(NamedTuple):
    """How much is measured; steps are twice each task's own where they are 0."""

    seeds: int = 10
    first_seed: int = 0
    steps: int = 0


ALONE = {f"{name} alone": tx for name, tx in TWO.items()}
EVALUATED = ("best", "loop")
WITH_HARMFUL = "relay, three harmful more"


def _ev3(inner: Any, **kwargs: Any) -> Callable[..., Any]:
    def make(task: Any, held_out: Any, seed: Any) -> Any:
        return optax_ev3.ev3(inner, assessed(task, held_out), key=seed, **kwargs)

    return make


def _constant(task: Any, held_out: Any, seed: Any) -> Any:
    del task, held_out
    nothing = lambda params: jnp.zeros([32])
    return optax_ev3.ev3(TWO, nothing, explore=explore.relay(), key=seed)


METHODS = {
    "one step": _ev3(TWO),
    "relay": _ev3(TWO, explore=explore.relay()),
    WITH_HARMFUL: _ev3({**TWO, **HARMFUL}, explore=explore.relay()),
    "constant score": _constant,
}


def trained(
    task: Any, make: Callable[..., Any] | None, tx: Any, seeds: Any, steps: int
):
    """Test figures `[seeds, 2]`, and whether all visible parameters were finite."""

    def one(seed, parts, _):
        made = tx if make is None else make(task, parts.held_out, seed)
        made = optax.with_extra_args_support(made)
        params = task.init(jax.random.key(seed))

        def step(carry, number):
            params, state, ok = carry
            batch = batch_of(parts.train, seed, number, task.batch)
            grads = jax.grad(task.loss)(params, batch)
            updates, state = made.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            leaves = jax.tree.leaves(params)
            ok &= jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
            return (params, state, ok), None

        start = params, made.init(params), jnp.asarray(True)
        (end, state, ok), _ = jax.lax.scan(step, start, jnp.arange(steps))
        best = end if make is None else optax_ev3.best_params(state)
        found = jnp.stack([task.test(x, parts.test) for x in (best, end)])
        first = task.test(params, parts.test)
        return {"test": jnp.where(found < first, found, first), "finite": ok}

    return over_seeds(one, seeds, stacked(task.parts, seeds))()


def cells(settings, tasks, results):
    del results
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    for name in tasks:
        task = functools.cache(TASKS[name])
        for method in (*ALONE, *METHODS):

            def measure(task=task, method=method):
                steps = settings.steps or 2 * task().steps
                make, tx = METHODS.get(method), ALONE.get(method)
                found = trained(task(), make, tx, seeds, steps)
                axes = {"seed": seeds, "weights": EVALUATED}
                finite = {"finite": found["finite"].astype(int)}
                rows = tidy({"test": found["test"]}, **axes)
                return pd.concat([rows, tidy(finite, seed=seeds)])

            # The others are compared with the two alone.
            yield Cell(name, method, measure, needed=method in ALONE)


def report(results, settings, folder):
    del settings, folder
    test = results[results.metric == "test"]
    means = test.groupby(["task", "method", "weights"], sort=False).value.mean()
    means = means.unstack(["method", "weights"])
    alone = means.xs("loop", axis=1, level="weights")[list(ALONE)]
    better = alone.min(axis=1)
    methods = [name for name in METHODS if name in means.columns]
    pairs = [(name, kind) for name in methods for kind in EVALUATED]
    ratios = means[pairs].div(better, axis=0)
    for kind in EVALUATED:
        of_kind = ratios.xs(kind, axis=1, level="weights").rename_axis("task")
        show(of_kind, f"Test figure over that of the better one alone: {kind}_params")
        show(
            pd.DataFrame([_summary(of_kind[name]) for name in of_kind], of_kind.columns)
        )
    if WITH_HARMFUL in methods and "relay" in methods:
        harm = means[WITH_HARMFUL, "best"] / means["relay", "best"]
        show(harm.rename("ratio").to_frame(), "Three harmful ones more, over without")
    finite = results[results.metric == "finite"].groupby("method", sort=False).value
    show(finite.min().to_frame("all finite").astype(int), "Visible parameters", 0)


def _summary(ratios: pd.Series) -> dict[str, float]:
    return {
        "geometric mean": float(np.exp(np.log(ratios).mean())),
        "worst": float(ratios.max()),
        "below 1": int((ratios < 1).sum()),
    }


SUITE = Suite(
    tuple(TASKS),
    Settings(),
    {"seeds": 2, "steps": 30},
    cells,
    report,
    spread=True,
)
