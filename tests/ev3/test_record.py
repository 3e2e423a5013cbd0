"""The record of past rounds against a simulation in NumPy, and where it is found."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from helpers import assert_identical, lenient
from scipy import stats

from optax_ev3 import (
    adapt,
    credit,
    ev3,
    explore,
    history,
    stable_params,
    stalled,
    summary,
)
from optax_ev3._src.history import schedule

# Names whose alphabetical order, that of transformed dictionaries, is another.
RATES = {"fast": 0.5, "even": 0.25, "dull": 0.125}
NAMES = [*RATES, "current", "stable"]
START = 3.0
LENGTHS = [1, 4, 6, 9]  # Of the history; there are 6 recorded rounds.

# By recorded round: index of the adopted candidate, and whether it becomes stable.
SCRIPT = [(0, True), (1, False), (2, False), (4, False), (0, True), (3, False)]
# By call of update: below it there is no score. Above all of them, a round is skipped.
FLOORS = [-9.0, 2.1, 99.0, 2.1, -9.0, 99.0, -9.0, -9.0]
BATCHES = np.random.default_rng(0).normal(size=[len(FLOORS), 5]).astype(np.float32)


def score(w, batch, floor):
    return jnp.where(w < floor, jnp.nan, -jnp.square(w - batch))


def follow_script():
    """A rule that does what SCRIPT says."""
    adopted, significant = map(jnp.array, zip(*SCRIPT, strict=True))

    def decide(evidence, memory, key):
        del evidence, key
        return adapt.Decision(adopted[memory], significant[memory]), memory + 1

    return adapt.Rule(lambda explorers: jnp.int32(0), decide)


def transformation(length):
    inner = {name: optax.sgd(rate) for name, rate in RATES.items()}
    return ev3(inner, score, adapt=follow_script(), history_length=length)


@functools.cache
def states(length, start=START):
    """The state before the first call of update, and after each."""
    tx = transformation(length)
    w = jnp.float32(start)
    found = [tx.init(w)]
    update = jax.jit(tx.update)
    for batch, floor in zip(BATCHES, FLOORS, strict=True):
        updates, state = update(jnp.ones([]), found[-1], w, batch=batch, floor=floor)
        w = optax.apply_updates(w, updates)
        found.append(state)
    return found


@functools.cache
def simulated(start=START):
    """By call of update: what there is to know after it, lists of recorded rounds."""
    w = stable = start
    past = {"adopted": [], "significant": [], "mean": [], "stderr": []}
    found = [past | {"stable": stable}]
    for batch, floor in zip(BATCHES.astype(np.float64), FLOORS, strict=True):
        candidates = [*(w - rate for rate in RATES.values()), w, stable]
        if max(candidates[: len(RATES)]) >= floor:
            adopted, significant = SCRIPT[len(past["adopted"])]
            scores = [
                -((c - batch) ** 2) if c >= floor else batch * np.nan
                for c in candidates
            ]
            w = candidates[adopted]
            stable = w if significant else stable
            row = {
                "adopted": adopted,
                "significant": significant,
                "mean": [s.mean() for s in scores],
                "stderr": [s.std(ddof=1) / len(s) ** 0.5 for s in scores],
            }
            past = {name: [*past[name], row[name]] for name in past}
        found.append(past | {"stable": stable})
    return found


def test_simulation_has_what_matters():
    last = simulated()[-1]
    assert len(last["adopted"]) == len(SCRIPT) == len(FLOORS) - 2
    assert 0 < np.isnan(last["mean"]).sum() < np.size(last["mean"])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("calls", [1, 4, len(FLOORS)])
def test_history_has_the_last_rounds_oldest_first(length, calls):
    past, expected = history(states(length)[calls]), simulated()[calls]
    rounds = len(expected["adopted"])
    assert past["round"].tolist() == list(range(max(0, rounds - length), rounds))
    assert past["candidates"].tolist() == NAMES
    assert past["adopted"].tolist() == expected["adopted"][-length:]
    assert past["significant"].tolist() == expected["significant"][-length:]
    assert past["significant"].dtype == bool
    for name in ("mean", "stderr"):
        np.testing.assert_allclose(past[name], expected[name][-length:], rtol=1e-5)
    assert {type(values) for values in past.values()} == {np.ndarray}


def test_history_before_the_first_round():
    past = history(states(3)[0])
    assert past["candidates"].tolist() == NAMES
    assert {name: past[name].shape for name in past if name != "candidates"} == {
        "round": (0,),
        "explorer": (len(NAMES),),
        "adopted": (0,),
        "significant": (0,),
        "length": (0,),
        "paused": (0, len(NAMES)),
        "examples": (0,),
        "mean": (0, len(NAMES)),
        "stderr": (0, len(NAMES)),
        "lower": (0, len(NAMES)),
        "upper": (0, len(NAMES)),
        "z": (0, len(NAMES)),
        "objectives": (0,),
        "priorities": (0, 0),
    }


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bounds_of_the_history(confidence):
    state = states(9)[len(FLOORS)]
    past, wide = history(state, confidence), stats.norm.ppf((1 + confidence) / 2)
    for name, sign in {"lower": -1, "upper": 1}.items():
        expected = past["mean"] + sign * wide * past["stderr"]
        np.testing.assert_allclose(past[name], expected, rtol=1e-5)


def test_evidence_of_the_history_is_the_paired_t_test():
    """Against the parameters at the round's start, in standard normal units."""
    tx = ev3(
        {"fast": optax.sgd(0.5), "back": optax.sgd(-0.5)}, lambda w, x: -((w - x) ** 2)
    )
    x = np.random.default_rng(1).normal(size=20).astype(np.float32)
    _, state = jax.jit(tx.update)(jnp.float32(0.1), tx.init(jnp.float32(0)), 0.0, x=x)
    (z,) = history(state)["z"]
    scores = -((np.array([-0.05, 0.05, 0, 0])[:, None] - x) ** 2)
    for found, own in zip(z[:2], scores, strict=False):
        p = stats.ttest_rel(own, scores[2], alternative="greater").pvalue
        assert found == pytest.approx(stats.norm.isf(p), abs=0.05)
    assert (z[2:] == 0).all()


def test_confidence_of_the_history_is_checked():
    with pytest.raises(ValueError, match=r"confidence.*1.5"):
        history(states(3)[1], 1.5)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("calls", range(1, len(FLOORS) + 1))
def test_summary_of_the_last_round_and_shares_of_all(length, calls):
    figures, past = summary(states(length)[calls]), simulated()[calls]
    rounds, adopted = len(past["adopted"]), past["adopted"][-1]
    shares = np.bincount(past["adopted"], minlength=len(NAMES)) / rounds
    means = np.array(past["mean"])
    valid = np.isfinite(means)
    # The last one that is known, also where the history is shorter.
    last = [
        ([0.0, *column[ok]])[-1] for column, ok in zip(means.T, valid.T, strict=True)
    ]
    expected = {
        "ev3/calls": calls,
        "ev3/round": calls,
        "ev3/skipped": calls - rounds,
        "ev3/overruled": 0,
        **{f"ev3/skipped_steps/{n}": 0 for n in RATES},
        "ev3/significant": past["significant"][-1],
        "ev3/examples": BATCHES.shape[1],
        "ev3/adopted_score": past["mean"][-1][adopted],
        "ev3/adopted_stderr": past["stderr"][-1][adopted],
        **{f"ev3/adopted/{n}": i == adopted for i, n in enumerate(NAMES)},
        **{f"ev3/score/{n}": last[i] for i, n in enumerate(NAMES)},
        **{f"ev3/valid/{n}": valid[-1, i] for i, n in enumerate(NAMES)},
        **{f"ev3/share/{n}": shares[i] for i, n in enumerate(NAMES)},
    }
    assert figures.keys() == expected.keys()
    assert {jnp.shape(figure) for figure in figures.values()} == {()}
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-5, err_msg=name)


def test_summary_before_the_first_round():
    figures = summary(states(3)[0])
    counts = [f"ev3/{name}" for name in ("calls", "round", "skipped", "significant")]
    kinds = ("share", "score", "valid", "adopted")
    counts += [f"ev3/{kind}/{name}" for kind in kinds for name in NAMES]
    counts += [
        f"ev3/{name}"
        for name in ("adopted_score", "adopted_stderr", "examples", "overruled")
    ]
    assert {name: float(figures[name]) for name in counts} == dict.fromkeys(counts, 0)
    counts += [f"ev3/skipped_steps/{name}" for name in RATES]
    assert figures.keys() == set(counts)


@pytest.mark.parametrize("calls", range(len(FLOORS) + 1))
def test_stable_params_are_those_last_adopted_with_significance(calls):
    stable = stable_params(states(1)[calls])
    np.testing.assert_allclose(stable, simulated()[calls]["stable"], rtol=1e-6)


@pytest.mark.parametrize("read", [summary, stable_params])
@pytest.mark.parametrize("calls", [0, 1, len(FLOORS)])
def test_jit_reads_the_same(read, calls):
    state = states(3)[calls]
    assert_identical(jax.jit(read)(state), read(state))


def test_runs_of_a_batch_are_read_one_by_one():
    starts = [START, 1.0]
    batched = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(states(3, start)[1] for start in starts)
    )
    figures = jax.vmap(summary)(batched)
    means = []
    for run, start in enumerate(starts):
        past = history(jax.tree.map(lambda leaf, run=run: leaf[run], batched))
        means.append(past["mean"][0])
        np.testing.assert_allclose(means[run], simulated(start)[1]["mean"][0], 1e-5)
        np.testing.assert_allclose(figures["ev3/adopted_score"][run], means[run][0])
    assert (means[0] != means[1]).all()


# Loops of one call, whose states hold that of ev3.


def _chain(tx, w, **extras):
    tx = optax.chain(optax.clip(1.0), optax.named_chain(("ev3", tx)))
    return tx.update(jnp.ones([]), tx.init(w), w, **extras)[1]


def _train_state(tx, w, **extras):
    state = train_state.TrainState.create(apply_fn=None, params={"w": w}, tx=tx)
    _, opt_state = tx.update({"w": jnp.ones([])}, state.opt_state, {"w": w}, **extras)
    return state.replace(opt_state=opt_state)


def _nnx_optimizer(tx, w, **extras):
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(w)

    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads, **extras)
    return optimizer.opt_state


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("loop", [_chain, _train_state, _nnx_optimizer])
def test_found_inside_of_other_states(loop, jitted):
    def assess_fn(params, batch, floor):
        return score(jax.tree.leaves(params)[0], batch, floor)

    tx = ev3({"sgd": optax.sgd(0.5)}, assess_fn, adapt=follow_script())
    with lenient():
        state = loop(tx, jnp.float32(START), batch=BATCHES[0], floor=-9.0)
    wrap = jax.jit if jitted else lambda read: read
    figures = wrap(summary)(state)
    stable = jax.tree.leaves(wrap(stable_params)(state))
    means = [-((w - BATCHES[0]) ** 2).mean() for w in (START - 0.5, START, START)]
    shown = [figures[f"ev3/score/{name}"] for name in ("sgd", "current", "stable")]
    np.testing.assert_allclose(shown, means, rtol=1e-5)
    np.testing.assert_allclose(history(state)["mean"], [means], rtol=1e-5)
    np.testing.assert_allclose(stable, [START - 0.5], rtol=1e-6)


def test_winners_of_a_group_are_its_ends_and_averages():
    members = ["adam/0", "adam/1", "sgd", "adamw/0"]
    averages = [f"{k}/{x}" for k in ("branch_average", "average") for x in members]
    names = [*members, *averages, "current"]
    owners = schedule.winners(names, range(len(names)), "adam")
    assert owners.tolist() == [0, 1, -1, -1] * 3 + [-1]


@jax.tree_util.register_pytree_node_class
class Touchy:
    """A node of somebody's tree that answers no question."""

    def __init__(self, child):
        object.__setattr__(self, "child", child)

    def __getattr__(self, name):
        raise RuntimeError(f"asked for {name}")

    def tree_flatten(self):
        return (self.child,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


class Namesake(NamedTuple):
    history: object


@pytest.mark.parametrize("read", [summary, stable_params, history, credit, stalled])
def test_found_by_its_type(read):
    """Other nodes are asked for nothing, and may have a history of their own."""
    state = states(9)[4]
    read_it = functools.partial(read, rounds=8) if read is stalled else read
    expected = read_it(state)
    tree = {
        "a": Touchy(jnp.ones([])),
        "b": Touchy([state]),
        "c": Namesake(state.history),
    }
    found = read_it(tree)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="found 0 in dict"):
        read_it({"c": Namesake(state.history)})


@pytest.mark.parametrize("length", [1, 3])
def test_an_inner_optimizer_with_a_state_that_answers_no_question(length):
    inner = optax.GradientTransformation(
        lambda params: Touchy(jnp.zeros([])),
        lambda updates, state, params=None: (updates, Touchy(state.child + 1)),
    )
    tx = ev3([inner, optax.sgd(0.1)], lambda w: -(w**2), explore=explore.rounds(length))
    w = jnp.float32(2)
    state = tx.init(w)
    for _ in range(3):
        _, state = tx.update(2 * w, state, w)
    assert summary(state)["ev3/calls"] == 3
    assert history(state)["round"].tolist() == list(range(3 // length))


def test_summary_of_a_paused_explorer_has_its_last_score():
    inner = {"good": optax.sgd(0.1), "bad": optax.sgd(-0.1)}
    tx = ev3(
        inner,
        lambda w: -(w**2),
        explore=explore.branches(1, racing=explore.Racing(1, 4)),
    )
    w, shown = jnp.float32(1), []
    state = tx.init(w)
    update = jax.jit(tx.update)
    for _ in range(7):
        updates, state = update(w, state, w)
        w = optax.apply_updates(w, updates)
        figures = summary(state)
        shown.append([float(figures[f"ev3/{k}/bad"]) for k in ("valid", "score")])
    # It takes part again once no round of its own is remembered.
    valid, scores = np.transpose(shown)
    assert valid.tolist() == [1, 1, 0, 0, 0, 0, 1]
    # The gradient is the caller's, at 0.9 in the second round.
    first, second, again = -(1.1**2), -(1.19**2), -((1.1 * 0.9**6) ** 2)
    np.testing.assert_allclose(scores, [first, *[second] * 5, again], rtol=1e-5)
