"""The searches of the quality suite, against what a recorded task says they did."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")
pytest.importorskip("optuna")
import optuna

from benchmarks.data import Parts
from benchmarks.quality import searches
from benchmarks.quality.tasks import Task

BUDGET = 8 * 40
MARKS = np.geomspace(1 / 64, 1, 15)
TARGET = np.float32([3.0, -2.0])
NAMES = [
    "random search",
    "TPE",
    "hyperband",
    "BOHB",
    "population-based training",
    "PB2",
    "soup",
]


def parts(seed):
    noise = np.random.default_rng(seed).normal(size=[60, 2])
    return Parts(*np.split(np.float32(TARGET + noise), [40, 50]))


def loss(params, batch):
    return jnp.square(params - batch.mean(0)).sum()


def score(params, part):
    return -jnp.square(params - part).sum(-1)


def test_error(params, part):
    return jnp.abs(params - TARGET).sum() + 0 * part.sum()


test_error.__test__ = False


def init(key):
    return jax.random.normal(key, [2])


QUADRATIC = Task(parts, init, loss, score, test_error, "error", 40, 4, "quadratic")


@pytest.fixture
def recorded():
    """The task, and what one seed does: None for a gradient, assessed parameters."""
    events = []

    def recorded_loss(params, batch):
        jax.debug.callback(lambda: events.append(None))
        return loss(params, batch)

    def recorded_score(params, part):
        jax.debug.callback(lambda params: events.append(np.array(params)), params)
        return score(params, part)

    return QUADRATIC._replace(loss=recorded_loss, score=recorded_score), events


def run(name, task, seed, budget=BUDGET, marks=MARKS):
    results = searches.SEARCHES[name](task, budget, [seed], marks)
    jax.effects_barrier()
    return results["test"][0], results["held_out"][0]


def by_hand(events, seed, budget=BUDGET, marks=MARKS):
    """The results of the incumbents, the first of which is where all begin."""
    held_out = parts(seed).held_out
    spent, rows = 0, []
    for event in events:
        if event is None:
            spent += 1
            continue
        mean = -np.square(event - held_out).sum(-1).mean()
        rows.append((spent, mean, abs(event - TARGET).sum()))
    found = []
    for mark in marks:
        usable = [r for r in rows if r[0] <= mark * budget and np.isfinite(r[1])]
        found.append(max(usable, key=lambda row: row[1]))  # The first of equal ones.
    return np.array([row[2] for row in found]), np.array([row[1] for row in found])


def test_all_searches_are_tested():
    assert list(searches.SEARCHES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_spent_and_incumbents_are_the_best_so_far(name, recorded):
    task, events = recorded
    results = run(name, task, 2)
    assert sum(event is None for event in events) == BUDGET
    np.testing.assert_allclose(results, by_hand(events, 2), rtol=1e-5)
    assert results[1][-1] > results[1][0] + 1  # Something has been learned.
    assert (np.diff(results[1]) >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_searches_of_a_seed_repeat_themselves(name):
    first, again = (
        searches.SEARCHES[name](QUADRATIC, BUDGET, seeds, MARKS)
        for seeds in (range(3), [1, 2, 3])
    )
    for kind in ("test", "held_out"):
        assert first[kind].shape == (3, len(MARKS))
        np.testing.assert_array_equal(first[kind][1:], again[kind][:2])
        assert (first[kind][0] != first[kind][1]).all()


def broken(rate):
    return optax.sgd(math.nan * rate)


@pytest.mark.parametrize("name", ["random search", "hyperband", "BOHB"])
def test_what_is_not_finite_never_wins(name, recorded, monkeypatch):
    task, events = recorded
    kinds = {"broken": broken, "adam": optax.adam}
    monkeypatch.setattr(searches, "SPACE", searches.SPACE._replace(kinds=kinds))
    results = run(name, task, 0)
    bad = [not np.isfinite(event).all() for event in events if event is not None]
    assert any(bad) and not all(bad)
    assert np.isfinite(results).all()
    np.testing.assert_allclose(results, by_hand(events, 0), rtol=1e-5)


def test_without_anything_finite_the_initial_parameters_stay(monkeypatch):
    monkeypatch.setattr(
        searches, "SPACE", searches.SPACE._replace(kinds={"broken": broken})
    )
    test, held_out = run("random search", QUADRATIC._replace(name="broken"), 0)
    params = np.array(init(jax.random.key(0)))
    np.testing.assert_allclose(test, abs(params - TARGET).sum(), rtol=1e-5)
    expected = -np.square(params - parts(0).held_out).sum(-1).mean()
    np.testing.assert_allclose(held_out, expected, rtol=1e-5)


def test_what_the_loss_returns_beside_its_value_is_merged():
    """Parameters count the gradients that they have had; fewer is called better."""

    def start(key):
        return {"w": init(key), "count": jnp.zeros([])}

    def counted(params, batch):
        return loss(params["w"], batch), jnp.ones([])

    task = Task(
        parts,
        start,
        counted,
        lambda params, part: score(params["w"], part),
        lambda params, part: params["count"],
        "count",
        40,
        4,
        merge=lambda params, one: params | {"count": params["count"] + one},
    )
    test, _ = run("random search", task, 0, marks=[1 / 16, 1 / 8, 1.0])
    np.testing.assert_array_equal(test, [0, BUDGET // 8, BUDGET // 8])


def test_budgets_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="multiple of 8 expected, got 20"):
        run("soup", QUADRATIC, 0, budget=20)


# Trials.


@pytest.fixture
def studies(monkeypatch):
    made, create = [], optuna.create_study

    def create_study(**kwargs):
        made.append(create(**kwargs))
        return made[-1]

    monkeypatch.setattr(optuna, "create_study", create_study)
    return made


@pytest.mark.parametrize("name", ["random search", "TPE"])
def test_eight_whole_trials(name, studies, recorded):
    task, events = recorded
    run(name, task, 1)
    (study,) = studies
    groups = itertools.groupby(event is None for event in events)
    runs = [len(list(group)) for trained, group in groups if trained]
    assert runs == [BUDGET // 8] * 8 and len(study.trials) == 8
    rates = [trial.params["rate"] for trial in study.trials]
    assert len(set(rates)) == 8 and 1e-4 <= min(rates) and max(rates) <= 0.1
    assert study.best_value == pytest.approx(by_hand(events, 1)[1][-1], rel=1e-5)


def test_trials_of_hyperband_are_stopped(studies):
    for name in ("hyperband", "BOHB"):
        run(name, QUADRATIC, 7, budget=27 * 8)
    for study in studies:
        taken = [3 * t.last_step for t in study.trials[:-1]]  # Of 27 steps, 9 times.
        assert max(taken) == 27 and min(taken) < 27
        # The last trial has what was left.
        assert 0 < 27 * 8 - sum(taken) <= 27
        states = {trial.state.name for trial in study.trials[:-1]}
        assert states == {"COMPLETE", "PRUNED"}
    samplers = [type(study.sampler).__name__ for study in studies]
    assert samplers == ["RandomSampler", "TPESampler"]


# Populations.


def test_the_worst_become_copies_of_the_best():
    """Rates are not moved, so that copies do what their sources do from then on."""
    calls = []

    def explore(rates, scores, moved, past, rng):
        calls.append((rates, scores, moved, past))
        return rates

    compiled = searches.programs(QUADRATIC, BUDGET)
    search = searches.Search(QUADRATIC, BUDGET, 0, compiled)
    searches.population(search, explore)
    rates, scores, moved, past = calls[0]
    np.testing.assert_array_equal(past[:, 0], 0)
    np.testing.assert_allclose(past[:, 1], search.incumbents[0][1])
    # Far from the optimum the largest rates are the best.
    np.testing.assert_array_equal(np.argsort(past[:, 3]), range(8))
    assert list(moved) == [0, 1]
    start = np.geomspace(3e-4, 3e-2, 8)
    np.testing.assert_allclose(rates, [*start[6:], *start[2:]])
    np.testing.assert_allclose(scores, (past[:, 1] + past[:, 3])[[6, 7, *range(2, 8)]])
    after = calls[1][3][8:]
    np.testing.assert_array_equal(after[:, 0], 1)
    np.testing.assert_array_equal(after[:, 1], scores)
    np.testing.assert_array_equal(after[:2, 3], after[6:, 3])
    assert len(set(after[2:, 3])) == 6


def test_rates_are_perturbed():
    rates = np.geomspace(1e-3, 1, 8)
    rng = np.random.default_rng(0)
    drawn = [
        searches.perturb(rates, None, np.array([1, 5]), None, rng) / rates
        for _ in range(20)
    ]
    drawn = np.array(drawn)
    np.testing.assert_array_equal(np.delete(drawn, [1, 5], 1), 1)
    np.testing.assert_allclose(np.unique(drawn[:, [1, 5]].round(9)), [0.8, 1.25])


def history(rng, intervals=12):
    """Changes are largest for the rate 0.01, and shrink with time."""
    number = np.repeat(np.arange(intervals), 8)
    rates = np.exp(rng.uniform(np.log(1e-4), np.log(1e-1), len(number)))
    changes = np.exp(-np.square(np.log10(rates) + 2)) / (1 + number / 5)
    return np.stack([number, rng.normal(size=len(number)), rates, changes], 1)


def test_the_bandit_finds_the_rate_that_improves_most():
    rng = np.random.default_rng(0)
    rates = np.full(8, 0.05)
    found = searches.bandit(
        rates, rng.normal(size=8), np.array([2, 7]), history(rng), rng
    )
    assert (np.delete(found, [2, 7]) == 0.05).all() and (rates == 0.05).all()
    for rate in found[[2, 7]]:
        assert 0.003 < rate < 0.03


def test_the_bandit_by_hand():
    """Kernel, likelihood, posterior and bound as they are written in the paper."""
    rng = np.random.default_rng(1)
    past = history(rng, 4)
    past[3, 3] = math.nan
    scores, moved = rng.normal(size=8), np.array([2, 7])
    rates = np.exp(rng.uniform(np.log(1e-4), np.log(1e-1), 8))
    found = searches.bandit(rates, scores, moved, past, rng)

    least, most = past[:, 1].min(), past[:, 1].max()

    def point(number, before, rate):
        return number, (before - least) / (most - least), np.log10(rate / 1e-4) / 3

    def kernel(a, b, memory, length):
        forgets = 1 - np.exp(-2 / memory)
        gaps = abs(a[:, None, 0] - b[None, :, 0])
        squares = np.square(a[:, None, 1:] - b[None, :, 1:]).sum(-1)
        return np.exp(-squares / 2 / length**2) * (1 - forgets) ** (gaps / 2)

    x = np.array([point(*row[:3]) for row in past])
    y = np.where(np.isnan(past[:, 3]), np.nanmin(past[:, 3]), past[:, 3])
    y = np.clip((y - y.mean()) / y.std(), -2, 2)
    options = {}
    for choice in itertools.product((2, 8, 32), (0.1, 0.3, 1.0), (0.01, 0.1, 1.0)):
        k = kernel(x, x, *choice[:2]) + choice[2] * np.eye(32)
        fit = y @ np.linalg.solve(k, y)
        options[choice] = -(fit + np.linalg.slogdet(k)[1]) / 2
    memory, length, noise = max(options, key=options.get)

    def posterior(x, y, at):
        k = kernel(x, x, memory, length) + noise * np.eye(len(x))
        cross = kernel(at, x, memory, length)
        mean = cross @ np.linalg.solve(k, y)
        return mean, np.sqrt(1 - (cross * np.linalg.solve(k, cross.T).T).sum(1))

    under_way = [point(4, scores[i], rates[i]) for i in range(8) if i not in moved]
    for i in moved:
        at = np.array([point(4, scores[i], r) for r in np.geomspace(1e-4, 0.1, 100)])
        known = np.array([*x, *under_way])
        bound = (
            posterior(x, y, at)[0]
            + np.sqrt(0.2 + np.log(0.4 * 32))
            * (posterior(known, np.zeros(len(known)), at)[1])
        )
        assert found[i] == pytest.approx(np.geomspace(1e-4, 0.1, 100)[bound.argmax()])
        under_way.append(at[bound.argmax()])


def test_the_bandit_draws_where_it_knows_nothing():
    rng = np.random.default_rng(0)
    rates, moved = np.full(8, 0.02), np.array([0, 3])
    scores = np.where(np.arange(8) == 3, -math.inf, 0.0)
    nothing = np.tile([0.0, 1.0, 0.02, math.nan], [8, 1])
    for past, drawn in ((nothing, [0, 3]), (history(rng), [3])):
        found = [searches.bandit(rates, scores, moved, past, rng) for _ in range(9)]
        found = np.array(found)
        assert 1e-4 <= found.min() and found.max() <= 0.1
        for i in drawn:
            assert len(set(found[:, i])) == 9
        np.testing.assert_array_equal(np.delete(found, moved, 1), 0.02)


# The soup.


def test_the_soup_is_an_average_of_ends(recorded):
    """Ends on either side of the optimum: greedy, the best first, all of it by hand."""
    task, events = recorded
    results = run("soup", task, 4, budget=8 * 150)
    assessed = [event for event in events if event is not None]
    _, *ends = assessed[:9]
    held_out = parts(4).held_out
    value = lambda params: -np.square(params - held_out).sum(-1).mean()
    kept = []
    for params in sorted(ends, key=value, reverse=True):
        mixed = np.mean([*kept, params], 0)
        if not kept or value(mixed) >= value(np.mean(kept, 0)):
            kept.append(params)
    made = np.mean(kept, 0)
    assert len(kept) > 1
    np.testing.assert_allclose(results[0][-1], abs(made - TARGET).sum(), rtol=1e-4)
    np.testing.assert_allclose(results[1][-1], value(made), rtol=1e-4)
    best = max(ends[:5], key=value)  # Until then the sixth hasn't ended.
    np.testing.assert_allclose(results[1][-2], value(best), rtol=1e-4)
