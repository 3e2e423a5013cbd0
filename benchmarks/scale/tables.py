"""Tables of the suite, in Markdown."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.scale.programs import ADAM, OURS

MODEL = ["layers", "loop"]
CASE = ["strategy", "explorers", "kind"]


class Table(NamedTuple):
    """A group of columns.

    Attributes:
      title: Of the table.
      about: What is measured, in words; settings may be named in it.
      task: Whose results they are.
      columns: Their titles, by metric, in the order in which they are measured.
    """

    title: str
    about: str
    task: str
    columns: dict[str, str]


TABLES = (
    Table(
        "Size of the program, and seconds until it runs",
        "The jitted training step. Equations are those of its jaxpr, with those of "
        "inner ones wherever they are used. Adam is measured in the same process just "
        "before, with JAX's caches cleared between the two; "
        "medians over at most {compilations} repeats. Each of trace, lower and compile "
        "is given up after {limit:g} s. Width {width}, sequences of {sequence}.",
        "programs",
        {
            "state_leaves": "state leaves",
            "trace_seconds": "trace",
            "equations": "equations",
            "lower_seconds": "lower",
            "compile_seconds": "compile",
            "all_seconds": "trace to compile",
        },
    ),
    Table(
        "Memory of a training step, in copies of the parameters",
        "By the compiler's own analysis of the same programs. State: arguments without "
        "parameters and batches. Temporaries hold gradients, candidates and "
        "activations ({batch} sequences of {sequence}). At the peak: parameters, state "
        "and temporaries.",
        "programs",
        {
            "state_copies": "state",
            "temporary_copies": "temporaries",
            "all_copies": "at the peak",
        },
    ),
    Table(
        "Time of a call until it returns",
        "On a model of the same leaves with few numbers in each (width 2): what Python "
        "and the runtime take to start the program, with its buffers. Called through "
        "`jit`; medians of {calls} calls, in turns with Adam, over {repeats} repeats. "
        "Finished: until the results are there.",
        "dispatch",
        {"returned_seconds": "returned", "finished_seconds": "finished"},
    ),
    Table(
        "Bytes that devices exchange in a call, in copies of the parameters",
        "Results of all collectives on one of {devices} virtual devices: their sizes "
        "from the compiled program, how often they take place from profiles of the "
        "first {profiled} calls. Every parameter is spread over the devices along its "
        "last axis, and gathered where it is used; each device has one sequence. Most "
        "calls: the median. At the most: the call that moves most; with branches, a "
        "relay or the portfolio it ends a round or a turn, and assesses.",
        "collectives",
        {"moved_copies": "most calls", "most_copies": "at the most"},
    ),
    Table(
        "Training GPT-2's smallest size",
        "Layers, width, heads and vocabulary: {trained}; {trained_batch} sequences of "
        "{trained_sequence}; layers compute in bfloat16, parameters are {parameters}. "
        "Every optimizer has a process of its own, and trains by rounds of 25 calls, "
        "timed whole, with the assessments in them, on as much data as a batch. First: "
        "the first round. Then: the median of the last half of the rounds. Peak: the "
        "most memory that the device had in use. Analysed: arguments and temporaries, "
        "by the compiler.",
        "training",
        {
            "compile_seconds": "compile",
            "analysed_gib": "analysed",
            "first_tokens": "first, tokens a second",
            "tokens": "then, tokens a second",
            "peak_gib": "peak",
        },
    ),
)


def markdown(results: pd.DataFrame, settings: Any) -> str:
    """All tables of which there are results."""
    parts = []
    for table in TABLES:
        rows = results[(results.task == table.task) & (results.metric != "seconds")]
        if len(rows):
            parts += [f"## {table.title}", table.about.format(**settings._asdict())]
            parts.append(f"Measured on {'; '.join(rows.machine.dropna().unique())}.")
            parts.append("In brackets: over Adam on the same model.")
            parts.append("\n".join(lines(table, with_parts(rows))))
    return "\n\n".join(parts) + "\n"


def with_parts(rows: pd.DataFrame) -> pd.DataFrame:
    """With the extremes of what differs from call to call as metrics of their own."""
    speeds = rows[rows.metric == "tokens_per_second"]
    last = speeds.groupby("method").repeat.transform("max")
    moved = rows[rows.metric == "moved_copies"]
    most = moved.groupby(["method", "program"]).value.transform("max")
    parts = [
        speeds[speeds.repeat == 0].assign(metric="first_tokens"),
        speeds[speeds.repeat >= last / 2].assign(metric="tokens"),
        moved[moved.value == most].assign(metric="most_copies"),
    ]
    return pd.concat([rows, *(part for part in parts if len(part))])


def lines(table: Table, rows: pd.DataFrame) -> Iterator[str]:
    head = ["model", "optimizer", *table.columns.values()]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for (layers, loop), found in rows.groupby(MODEL, sort=False):
        model = f"{layers:g} layers, {loop}"
        reference = found[found.program == ADAM].groupby("metric").value.median()
        if table.task != "training":  # There it has a process, and a row, of its own.
            cells = [shown(metric, reference.get(metric)) for metric in table.columns]
            yield f"| {model} | {' | '.join(['Adam', *cells])} |"
        for (strategy, count, kind), cell in found.groupby(CASE, sort=False):
            name = f"{strategy}, {count:g} {kind}"
            cells = case_cells(table, cell, reference)
            yield f"| {model} | {' | '.join([name, *cells])} |"


def case_cells(table: Table, cell: pd.DataFrame, reference: pd.Series) -> list[str]:
    """Values and ratios; why the first of those that are missing is."""
    cut = cell[cell.metric.isin(["over_seconds", "out_of_memory"])]
    cuts = list(zip(cut.metric, cut.value, strict=True))
    program = ADAM if "adamw" in set(cell.strategy) else OURS
    texts = []
    for metric in table.columns:
        rows = cell[cell.metric == metric]
        values = rows[rows.program == program].value
        if len(values):
            ratio = (
                over_adam(rows, reference.get(metric, float("nan")))
                if program == OURS
                else ""
            )
            texts.append(shown(metric, values.median()) + ratio)
        else:
            texts.append(reason(*cuts.pop(), table, rows) if cuts else "")
    return texts


def reason(why: str, value: float, table: Table, rows: pd.DataFrame) -> str:
    """Why there is no number: where seconds are the number, what it is more than."""
    if why == "out_of_memory":
        return "out of memory"
    if table.columns.get("lower_seconds"):
        ratio = value / rows[rows.program == ADAM].value.median()
        return f"over {value:g} s" + (f" (over {ratio:.3g})" if ratio > 0 else "")
    return f"not done in {value:g} s"


def over_adam(rows: pd.DataFrame, reference: float) -> str:
    """Within a repeat where Adam has the same ones, else over its median."""
    adam, ours = (
        rows[rows.program == name].set_index("repeat").value for name in (ADAM, OURS)
    )
    if adam.index.equals(ours.index):
        ratio = (ours / adam).median()
    else:
        ratio = ours.median() / (adam.median() if len(adam) else reference)
    return f" ({ratio:.3g})"


def shown(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric.endswith("_seconds"):
        unit, scale = ("s", 1) if value >= 0.1 else ("ms", 1e3)
        return f"{scale * value:.3g} {unit}"
    if metric.endswith("_gib"):
        return f"{value:.3g} GiB"
    if metric.endswith("_copies"):
        return f"{value:.2f}"
    return f"{value:,.0f}"
