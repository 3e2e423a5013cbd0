"""From tidy results to what the report says: ranks, ratios, failures, time to target.

Tables of figures have a row for each task and seed and a column for each method; lower
is better. Intervals are of the bootstrap over tasks and, within each, over seeds, which
draws the same for all methods. (rliable, which has it, does not go with pandas 3.)
"""

import numpy as np
import pandas as pd
import scikit_posthocs
from scipy import stats

from benchmarks.quality.accountings import CLOCK, HINDSIGHT, UNTUNED

REPETITIONS = 2000
TUNED = ", tuned"  # What is added to the name of a rival that was tuned on the clock.
FAILED = (1.5, 2.0, 10.0)  # Times worse than the best method.
NEVER = 2.0  # Parts of the budget: what a target that was not reached counts.


def courses(results: pd.DataFrame) -> pd.DataFrame:
    """Test figures over the work that a method did, all its trials counted.

    Returns:
      A row for each task, seed and mark, a column for each method.
    """
    kept = results[(results.metric == "test") & results.mark.notna()]
    kept = kept[kept.accounting.isin([CLOCK, UNTUNED])]
    both = set(kept.method[kept.accounting == UNTUNED])
    is_tuned = (kept.accounting == CLOCK) & kept.method.isin(both)
    names = kept.method.where(~is_tuned, kept.method + TUNED)
    return _wide(kept.assign(method=names), ["task", "seed", "mark"])


def ends(results: pd.DataFrame, accounting: str) -> pd.DataFrame:
    """Test figures of one accounting at the end, and EV3's."""
    if accounting == CLOCK:
        return courses(results).xs(1.0, level="mark")
    kept = results[(results.metric == "test") & (results.mark == 1.0)]
    is_ours = kept.method.str.startswith("EV3")
    kept = kept[is_ours | (kept.accounting == accounting)]
    return _wide(kept, ["task", "seed"])


def best_single(results: pd.DataFrame) -> pd.Series:
    """The best explorer or average by its mean test figure on each task."""
    kept = results[results.accounting == HINDSIGHT]
    if kept.empty:
        return pd.Series(
            index=pd.MultiIndex.from_arrays([[], []], names=["task", "seed"])
        )
    wide = _wide(
        kept.assign(method=kept.variant + " " + kept.weights), ["task", "seed"]
    )
    best = {task: one.mean().idxmin() for task, one in wide.groupby("task")}
    found = [wide.loc[[task], name] for task, name in best.items()]
    return pd.concat(found).rename("best single in hindsight")


def _wide(kept, rows):
    """A column for each method; what is not finite is infinite."""
    value = kept.value.where(np.isfinite(kept.value), np.inf)
    return kept.assign(value=value).set_index([*rows, "method"]).value.unstack("method")


def complete(figures: pd.DataFrame) -> pd.DataFrame:
    """Without the methods that some task lacks."""
    tasks = figures.groupby("task").count().gt(0)
    return figures[tasks.columns[tasks.all()]]


# Statistics of a table of figures: a number for each method.


def ranks(figures: pd.DataFrame) -> pd.DataFrame:
    """Of the methods, seed by seed; 1 is the best."""
    return figures.rank(axis=1)


def mean_ranks(figures: pd.DataFrame) -> pd.Series:
    """The mean over seeds and tasks, the best method first."""
    means = ranks(figures).groupby("task").mean().mean()
    return means.sort_values(kind="stable")


def different(figures: pd.DataFrame, ours: str) -> int:
    """How many methods differ from this one by Nemenyi's test over tasks, at 5%."""
    blocks = ranks(figures).groupby("task").mean().reset_index(drop=True)
    p_values = scikit_posthocs.posthoc_nemenyi_friedman(blocks)[ours]
    return int((p_values.drop(ours) < 0.05).sum())


def over_best(figures: pd.DataFrame) -> pd.DataFrame:
    """Figures over the mean figure of the best method on the task."""
    best = figures.groupby("task").mean().min(axis=1)
    return figures.div(best, axis=0, level="task")


def typical_ratios(figures: pd.DataFrame) -> pd.Series:
    """Geometric mean over tasks of mean figures, over those of the best method."""
    means = over_best(figures).groupby("task").mean()
    return pd.Series(stats.gmean(means), means.columns)


def failures(figures: pd.DataFrame) -> pd.DataFrame:
    """The share of runs that end so many times worse than the best method's mean."""
    ratios = over_best(figures)
    return pd.DataFrame({f"{x:g}": (ratios >= x).mean() for x in FAILED})


def bootstrap(values: pd.DataFrame, statistic, seed: int = 0) -> pd.DataFrame:
    """A statistic of values whose tasks, and their seeds, are drawn with replacement.

    Args:
      values: A row for each task and seed.
      statistic: Of an array ``[tasks, seeds, methods]``, a number for each method.
      seed: Of the draws.

    Returns:
      A row for each repetition, a column for each method.
    """
    rng = np.random.default_rng(seed)
    array = np.stack([one.to_numpy() for _, one in values.groupby("task")])
    tasks, seeds, _ = array.shape
    repetitions = []
    for _ in range(REPETITIONS):
        task = rng.integers(tasks, size=[tasks, 1])
        repetitions.append(
            statistic(array[task, rng.integers(seeds, size=[tasks, seeds])])
        )
    return pd.DataFrame(repetitions, columns=values.columns)


def means(array: np.ndarray) -> np.ndarray:
    """Over tasks and seeds."""
    return array.mean((0, 1))


def interval(repetitions: pd.DataFrame) -> pd.DataFrame:
    """Of 95%, by percentiles: the columns "low" and "high", a row for each method."""
    found = repetitions.quantile([0.025, 0.975]).T
    return found.set_axis(["low", "high"], axis=1)


def rank_intervals(figures: pd.DataFrame) -> pd.DataFrame:
    """Of the mean ranks, for each method: see :func:`interval`."""
    return interval(bootstrap(ranks(figures), means))


# Time to target.


def times(course: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The work after which a method has the final figure of the reference.

    Returns:
      Parts of the budget, a row for each task and seed, a column for each method;
      infinite where the figure is not reached.
    """
    targets = course[reference].xs(1.0, level="mark")
    reached = course.le(course.index.droplevel("mark").map(targets), axis=0)
    marks = course.index.get_level_values("mark").to_numpy()
    work = reached.mul(marks, axis=0).where(reached, np.inf)
    return work.groupby(["task", "seed"]).min()


def times_over(found: pd.DataFrame, reference: str) -> pd.Series:
    """Geometric mean over tasks of times over those of the reference.

    Within a task the geometric mean over seeds; a target that was not reached counts
    as reached after :data:`NEVER` budgets.
    """
    logs = np.log(found.replace(np.inf, NEVER)).groupby("task").mean()
    return np.exp(logs.sub(logs[reference], axis=0).mean())


# Pairs.


def behind(ours: pd.Series, theirs: pd.Series) -> list[str]:
    """Tasks on which the mean is behind by more than a standard error, paired."""
    gaps = (ours - theirs).dropna().groupby("task")
    return [task for task, gap in gaps if gap.mean() > stats.sem(gap)]
