"""The searches that EV3 is compared with, all of whose tuning is on the clock.

A search has a budget of gradients, of one batch each, and everything that it tries
comes out of it. Its assessments on the held-out part cost nothing, however many it
makes: this favours the searches. All of them start from the same parameters of a seed,
and step ``number`` of every trial gets the same batch.

At each mark, a fraction of the budget, the results are those of the incumbent: of all
parameters that the search has assessed on the whole held-out part up to then, the
initial ones included, those with the best score, and of equal ones the first.
Parameters whose score is not finite are never the incumbent.
"""

import functools
import itertools
import math
import queue
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern
from threadpoolctl import threadpool_limits

from benchmarks.quality.methods import COUNT, EIGHT, GRID, KINDS, with_cosine
from benchmarks.quality.training import applied, value_and_grad
from benchmarks.training import batch_of


class Space(NamedTuple):
    """Optimizers by name, and the bounds of learning rates, drawn log-uniformly."""

    kinds: dict[str, Callable[..., Any]]
    rates: tuple[float, float]


# Chosen before anything was measured, and the same for all searches.
SPACE = Space(KINDS, (1e-4, 1e-1))
COSINE = with_cosine(optax.adamw)
STARTUP = 4  # Random trials of TPE before it models anything.
BRACKET_STARTUP = 3  # Of BOHB, in each bracket: hyperparameters, and one.
LONGEST = 8  # Trials of hyperband take up to this part of the budget.
REPORTS = 9  # Of such a trial: three squared, for rungs that divide by three.
INTERVALS = 20  # Of a population.
MOVED = 2  # Members of a population that are replaced after an interval.


class Programs(NamedTuple):
    """What is compiled for a task, once for each device."""

    init: Callable[..., Any]  # From a seed to the initial parameters.
    held_out: Callable[..., jax.Array]  # Of parameters and parts of the data.
    test: Callable[..., jax.Array]  # The same.
    begin: dict[Any, Callable[..., Any]]  # By optimizer, from parameters to its state.
    advance: dict[Any, Callable[..., Any]]  # By optimizer; trains.


@functools.cache
def programs(task, budget):
    """All trials of a cosine schedule are as long."""
    makes = {make: make for make in SPACE.kinds.values()}
    makes[COSINE] = functools.partial(COSINE, steps=budget // COUNT)
    return Programs(
        jax.jit(lambda seed: task.init(jax.random.key(seed))),
        jax.jit(lambda params, parts: task.held_out(params, parts.held_out)),
        jax.jit(lambda params, parts: task.test(params, parts.test)),
        {key: jax.jit(make(0.0).init) for key, make in makes.items()},
        {key: jax.jit(advance(task, make)) for key, make in makes.items()},
    )


def advance(task, make):
    """A function that trains; neither rates nor lengths make it compile again."""

    def run(params, state, rate, data, seed, start, stop):
        tx = make(rate)

        def step(number, carry):
            params, state = carry
            batch = batch_of(data, seed, number, task.batch)
            _, grads, aux = value_and_grad(task, params, batch)
            updates, state = tx.update(grads, state, params)
            return applied(task, params, updates, aux), state

        return jax.lax.fori_loop(start, stop, step, (params, state))

    return run


class Trial(NamedTuple):
    """An optimizer with its learning rate, and where it has come to."""

    make: Callable[..., Any]
    rate: float
    params: Any
    state: Any
    step: int = 0


class Search:
    """What a search of one seed has spent, and its incumbents.

    Args:
      task: What is trained.
      budget: Gradients in all.
      seed: Of the parts of the data, the initial parameters, batches and draws.
      compiled: `Programs` of the task.
    """

    def __init__(self, task, budget, seed, compiled):
        self.budget, self.seed, self.compiled = budget, seed, compiled
        # Tasks of the same seed draw apart: else luck with a draw would count for all.
        self.name = f"{task.name}, {seed}"
        self.draws = zlib.crc32(self.name.encode())
        self.parts = jax.tree.map(jnp.asarray, task.parts(seed))
        self.params = compiled.init(seed)
        self.spent = 0
        start = (f(self.params, self.parts) for f in (compiled.held_out, compiled.test))
        # Of each incumbent: gradients spent when it was assessed, held-out score, test.
        self.incumbents = [(0, *map(float, start))]
        score = self.incumbents[0][1]
        self.best = score if math.isfinite(score) else -math.inf

    def start(self, make, rate):
        return Trial(make, rate, self.params, self.compiled.begin[make](self.params))

    def train(self, trial, stop):
        """Trains up to a step, or for as long as there are gradients left."""
        stop = min(stop, trial.step + self.budget - self.spent)
        inputs = trial.params, trial.state, np.float32(trial.rate), self.parts.train
        run = self.compiled.advance[trial.make]
        params, state = run(*inputs, self.seed, trial.step, stop)
        self.spent += stop - trial.step
        return trial._replace(params=params, state=state, step=stop)

    def assess(self, params):
        """The held-out score, minus infinity for what is not finite."""
        score = float(self.compiled.held_out(params, self.parts))
        if not math.isfinite(score):
            return -math.inf
        if score > self.best:
            self.best = score
            test = float(self.compiled.test(params, self.parts))
            self.incumbents.append((self.spent, score, test))
        return score

    def results(self, marks):
        """Those of the incumbent at each mark."""
        spent, held_out, test = np.array(self.incumbents).T
        # Marks are rounded, gradients are whole.
        limits = np.asarray(marks) * self.budget * (1 + 1e-9)
        last = np.searchsorted(spent, limits, side="right") - 1
        return {"test": test[last], "held_out": held_out[last]}


def searched(procedure, task, budget, seeds, marks):
    """Runs a search for each seed, one at a time on each device.

    Args:
      procedure: Of a `Search`, whose budget it spends.
      task: What is trained.
      budget: Gradients in all, a multiple of eight.
      seeds: Which.
      marks: Increasing fractions of the budget.

    Returns:
      "test" and "held_out", each ``[seeds, marks]``.
    """
    if budget % COUNT:
        raise ValueError(f"budget: a multiple of {COUNT} expected, got {budget}.")
    compiled = programs(task, budget)
    devices = jax.local_devices()[: len(seeds)]
    idle = queue.SimpleQueue()
    for device in devices:
        idle.put(device)
    # What a context of JAX sets, it sets for its thread alone.
    promotion = jax.config.jax_numpy_rank_promotion

    def of(seed):
        device = idle.get()
        try:
            with jax.default_device(device), jax.numpy_rank_promotion(promotion):
                search = Search(task, budget, int(seed), compiled)
                procedure(search)
                return search.results(marks)
        finally:
            idle.put(device)

    # Products of small matrices are slow where each of these threads starts more.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(len(devices)) as pool:
        results = list(pool.map(of, seeds))
    return jax.tree.map(lambda *x: np.stack(x), *results)


# Trials one after the other, suggested and stopped by Optuna.


def suggest(search, trial):
    kind = trial.suggest_categorical("kind", list(SPACE.kinds))
    rate = trial.suggest_float("rate", *SPACE.rates, log=True)
    return search.start(SPACE.kinds[kind], rate)


def suggest_cosine(search, trial):
    """AdamW with a cosine decay to zero over the trial, of which the rate is tuned."""
    return search.start(COSINE, trial.suggest_float("rate", *SPACE.rates, log=True))


def trials(search, sampler, pruner, length, reports, suggest=suggest):
    """Runs trials until the budget is spent, the last one for as long as it lasts.

    Args:
      search: `Search`.
      sampler: Optuna's.
      pruner: Optuna's, which looks at each report.
      length: Steps of a trial that is not stopped.
      reports: How many a whole trial makes, the last at its end.
      suggest: From the search and Optuna's trial to the start of a `Trial`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Brackets of hyperband are drawn by the study's name, which is random by default.
    study = optuna.create_study(
        direction="maximize", sampler=sampler, pruner=pruner, study_name=search.name
    )
    while search.spent < search.budget:
        asked = study.ask()
        trial, score = suggest(search, asked), -math.inf
        for number in range(1, reports + 1):
            stop = length * number // reports
            trial = search.train(trial, stop)
            score = search.assess(trial.params)
            if trial.step < stop:
                return
            # Optuna's pruners stop what reports NaN.
            asked.report(score if math.isfinite(score) else math.nan, number)
            if asked.should_prune():
                study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(asked, score)


def random_search(search):
    """Eight trials."""
    sampler = optuna.samplers.RandomSampler(seed=search.draws)
    trials(search, sampler, optuna.pruners.NopPruner(), search.budget // COUNT, 1)


def tpe(search):
    """Eight trials of AdamW with a cosine decay, whose rates TPE suggests."""
    sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=search.draws)
    pruner, length = optuna.pruners.NopPruner(), search.budget // COUNT
    trials(search, sampler, pruner, length, 1, suggest_cosine)


def hyperband(search, sampler=None):
    """Hyperband (Li et al., 2018), in Optuna's asynchronous form."""
    sampler = sampler or optuna.samplers.RandomSampler(seed=search.draws)
    length = search.budget // LONGEST
    reports = min(REPORTS, length)
    pruner = optuna.pruners.HyperbandPruner(max_resource=reports, reduction_factor=3)
    trials(search, sampler, pruner, length, reports)


def bohb(search):
    """Hyperband with TPE, as in BOHB (Falkner et al., 2018), with Optuna's defaults.

    From release 5 on they model kind and rate jointly, as in the paper. Unlike there,
    each bracket learns from its own trials alone.
    """
    tpe_sampler = functools.partial(optuna.samplers.TPESampler, seed=search.draws)
    hyperband(search, tpe_sampler(n_startup_trials=BRACKET_STARTUP))


# Populations.


def population(search, explore):
    """Eight of Adam, of which the worst two become copies of the best two.

    Args:
      search: `Search`.
      explore: The new learning rates: of the members' rates and scores ``[members]``
        after copying, which members are copies, what the past intervals have brought
        as rows of interval, score before, rate and change of the score, and a
        generator of NumPy.
    """
    length = search.budget // COUNT
    interval = max(length // INTERVALS, 1)
    rng = np.random.default_rng(search.draws)
    rates = np.geomspace(GRID[0], GRID[-1], COUNT)
    members = [search.start(optax.adam, rate) for rate in rates]
    before = np.full(COUNT, search.incumbents[0][1])
    past = []
    for number, start in enumerate(range(0, length, interval)):
        stop = min(start + interval, length)
        members = [search.train(member, stop) for member in members]
        scores = np.array([search.assess(member.params) for member in members])
        with np.errstate(invalid="ignore"):
            change = scores - before
        past += zip([number] * COUNT, before, rates, change, strict=True)
        order = np.argsort(scores, kind="stable")
        source = np.arange(COUNT)
        source[order[:MOVED]] = order[-MOVED:]
        before, rates = scores[source], rates[source]
        rates = explore(rates, before, order[:MOVED], np.array(past), rng)
        members = [
            members[i]._replace(rate=rate)
            for i, rate in zip(source, rates, strict=True)
        ]


def perturb(rates, scores, moved, past, rng):
    """Multiplies by 0.8 or by 1.25."""
    del scores, past
    factors = np.ones(len(rates))
    factors[moved] = rng.choice([0.8, 1.25], len(moved))
    return rates * factors


# Of PB2: learning rates to choose from, and what its kernel may be.
CHOICES = np.geomspace(*SPACE.rates, 100)
LENGTHS = (0.1, 0.3, 1.0)  # Of scores and of logarithms of rates, both in [0, 1].
MEMORIES = (2.0, 8.0, 32.0)  # In intervals.
NOISES = (0.01, 0.1, 1.0)  # Variances, where that of the changes is 1.


def bandit(rates, scores, moved, past, rng):
    """The rates that a Gaussian process of the changes of the score holds promising.

    Rates at random for a copy without a finite score, or while there are no changes.
    """
    rates = rates.copy()
    past = past[np.isfinite(past[:, 1])]
    finite = np.isfinite(past[:, 3])
    low, high = np.log(SPACE.rates)
    if not finite.any():
        rates[moved] = np.exp(rng.uniform(low, high, len(moved)))
        return rates
    least, most = past[:, 1].min(), past[:, 1].max()

    def inputs(number, scores, rates):
        scores = (np.asarray(scores) - least) / ((most - least) or 1)
        rates = (np.log(rates) - low) / (high - low)
        return np.stack(np.broadcast_arrays(number, scores, rates), 1)

    x = inputs(*past[:, :3].T)
    # What diverged has changed as badly as the worst of the others.
    y = np.where(finite, past[:, 3], past[finite, 3].min())
    y = np.clip((y - y.mean()) / (y.std() or 1), -2, 2)
    fitted = max(surrogates(x, y), key=lambda one: one.log_marginal_likelihood_value_)
    width = math.sqrt(0.2 + max(0, math.log(0.4 * len(y))))
    number = past[-1, 0] + 1
    going = np.isfinite(scores)
    going[moved] = False
    x = np.concatenate([x, inputs(number, scores[going], rates[going])])
    for i in moved:
        if not math.isfinite(scores[i]):
            rates[i] = math.exp(rng.uniform(low, high))
            continue
        choices = inputs(number, scores[i], CHOICES)
        # Those that are under way have no change yet, on which deviations don't depend.
        under_way = process(fitted.kernel, fitted.alpha).fit(x, np.zeros(len(x)))
        _, deviation = under_way.predict(choices, return_std=True)
        best = np.argmax(fitted.predict(choices) + width * deviation)
        rates[i] = CHOICES[best]
        x = np.concatenate([x, choices[[best]]])
    return rates


def process(kernel, noise):
    return GaussianProcessRegressor(kernel, alpha=noise, optimizer=None)


def surrogates(x, y):
    """The processes that there are to choose from; infinite lengths ignore a column."""
    inf = math.inf
    for memory, length, noise in itertools.product(MEMORIES, LENGTHS, NOISES):
        past = Matern([memory, inf, inf], nu=0.5)  # exp(-time / memory).
        kernel = past * RBF([inf, length, length])
        yield process(kernel, noise).fit(x, y)


def pbt(search):
    """Population-based training (Jaderberg et al., 2017)."""
    population(search, perturb)


def pb2(search):
    """Population-based bandits (Parker-Holder et al., NeurIPS 2020).

    Copies get the rate of the largest upper confidence bound of the change of the score
    in the next interval, under a Gaussian process of all changes so far whose kernel
    forgets with time; members under way narrow its deviations, as in the paper. As in
    the authors' code the score before an interval is an input, and the constants of the
    bound are 0.2 and 0.4. Simpler than there: the kernel is the most likely one of a
    grid, the bound is maximized over a grid of rates, and initial rates are those of
    population-based training.
    """
    population(search, bandit)


# The soup.


def soup(search):
    """Greedy soup (Wortsman et al., 2022) of the ends of the eight."""
    length = search.budget // COUNT
    ends = []
    for kind, rate in EIGHT.values():
        params = search.train(search.start(KINDS[kind], rate), length).params
        ends.append((search.assess(params), params))
    ends.sort(key=lambda end: -end[0])  # Stable: of equal ones the first.
    kept, best = [], -math.inf
    for _, params in ends:
        score = search.assess(mean([*kept, params]))
        if score >= best:
            kept, best = [*kept, params], score


def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


SEARCHES = {
    name: functools.partial(searched, procedure)
    for name, procedure in {
        "random search": random_search,
        "TPE": tpe,
        "hyperband": hyperband,
        "BOHB": bohb,
        "population-based training": pbt,
        "PB2": pb2,
        "soup": soup,
    }.items()
}
