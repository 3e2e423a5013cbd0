"""The command line of all suites, and what it does with each of them."""

import argparse
import importlib
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.results import OtherSettings, Results, claim

FOLDER = pathlib.Path(__file__).parent / "results"

# Modules of this package, which are also the names of folders of results.
SUITES = {
    "one_line": "EV3 of two optimizers, in one line, against each of them alone",
    "quality": "EV3 against searches and other methods, on eleven small tasks",
    "large": "the same on tasks of real size, whose runs take minutes",
    "ablation": "what the parts of EV3's preset are worth",
    "rules": "what the rules are worth, and how often they take noise for proof",
    "trajectories": "what trajectories of several steps are worth",
    "evidence": "what bounds promise, keep and can see, by simulation",
    "assessment": "drift, held-out sets used again and again, chunks, F1",
    "objectives": "rules for several objectives: a constraint, and a priority",
    "evolve": "learning rates that start 100 times too small or too large",
    "batchnorm": "with which statistics candidates are scored",
    "distillation": "growth of students: what is kept, what is won, what it costs",
    "overhead": "what EV3 costs beyond the sum of its parts",
    "scale": "what EV3 costs as models and the number of explorers grow, over Adam",
}


class Cell(NamedTuple):
    """A method on a task: what is measured at once, or not at all.

    Attributes:
      task: On what.
      method: Its name.
      measure: Makes a row of each number, with the columns "metric" and "value".
      needed: Whether others need it, so that no selection leaves it out.
    """

    task: str
    method: str
    measure: Callable[[], pd.DataFrame]
    needed: bool = False


class Suite(NamedTuple):
    """A benchmark: a module has one as SUITE.

    Attributes:
      tasks: Their names.
      settings: A named tuple, whose fields are options of the command line.
      quick: Other values of the settings, for a test in minutes.
      cells: From settings, the tasks that are wanted, and `Results`, in which the
        earlier cells are when the later ones are asked for.
      report: Of a frame of results, settings and a folder: prints tables, and draws.
      spread: Whether seeds are dealt out to the cores, as devices.
    """

    tasks: Sequence[str]
    settings: Any
    quick: dict[str, Any]
    cells: Callable[[Any, Sequence[str], Results], Iterable[Cell]]
    report: Callable[[pd.DataFrame, Any, pathlib.Path], None]
    spread: bool = False


def main(argv: Sequence[str]) -> int:
    """Runs the suite that is named first; returns the exit status."""
    name, *options = argv or ["--help"]
    if name == "all":
        return _all(options)
    if name not in SUITES:
        print("python -m benchmarks SUITE [--help], or all\n")
        for suite, about in SUITES.items():
            print(f"  {suite:14}{about}")
        return 0 if name in ("-h", "--help") else 2
    module = importlib.import_module(f"benchmarks.{name}")
    parser = _parser(name, module)
    try:
        run(name, module.SUITE, parser.parse_args(options))
    except OtherSettings as error:
        parser.error(str(error))
    return 0


def _all(options: Sequence[str]) -> int:
    """Each in a process of its own, until one fails."""
    for name in SUITES:
        print(f"\n{name}: {SUITES[name]}", flush=True)
        command = [sys.executable, "-m", "benchmarks", name, *options]
        if status := subprocess.run(command).returncode:
            return status
    return 0


def _parser(name: str, module: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    suite = module.SUITE
    add = parser.add_argument
    add("--task", action="append", choices=suite.tasks, help="one of them; all")
    add("--only", default="", metavar="REGEX", help="methods that match; all")
    add("--quick", action="store_true", help="a small version, for a test")
    add("--show", action="store_true", help="report what there is, measure nothing")
    add("--anew", action="store_true", help="forget what was measured before")
    add("--folder", type=pathlib.Path, help=f"of results; {FOLDER.name}/{name}")
    for field, default in suite.settings._asdict().items():
        option, about = f"--{field.replace('_', '-')}", f"{default}"
        if isinstance(default, bool):
            add(option, action=argparse.BooleanOptionalAction, help=about)
        elif isinstance(default, tuple):
            add(option, nargs="+", type=type(default[0]), help=about)
        else:
            add(option, type=type(default), help=about)
    return parser


def run(name: str, suite: Suite, args: argparse.Namespace) -> None:
    """Measures the cells that are not there yet, and reports all that are."""
    settings = suite.settings._replace(**(suite.quick if args.quick else {}))
    given = {k: getattr(args, k) for k in settings._fields}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    settings = settings._replace(**{k: v for k, v in given.items() if v is not None})
    folder = args.folder or FOLDER / (f"{name}_quick" if args.quick else name)
    if args.anew:
        for file in ("results.csv", "settings.json"):
            (folder / file).unlink(missing_ok=True)
    claim(folder, settings._asdict())
    results = Results(folder)
    if not args.show:
        if suite.spread:
            _use_all_cores()
        for cell in suite.cells(settings, args.task or suite.tasks, results):
            if cell.needed or re.search(args.only, cell.method):
                _measure(cell, results, suite.spread)
    suite.report(results.frame, settings, folder)


def _use_all_cores() -> None:
    import jax

    # Tests have made as many devices as they want.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count())


def _measure(cell: Cell, results: Results, is_spread: bool) -> None:
    if (cell.task, cell.method) in results:
        return
    if is_spread:
        import jax

        # A cell compiles programs of its own, for each device: those of hundreds of
        # cells take more memory maps than a process may have.
        jax.clear_caches()
    begun = time.perf_counter()
    rows = cell.measure()
    seconds = time.perf_counter() - begun
    cost = pd.DataFrame({"metric": ["seconds"], "value": [round(seconds, 1)]})
    results.add(cell.task, cell.method, pd.concat([rows, cost]))
    print(f"{cell.task}, {cell.method}: {seconds:.0f} s", file=sys.stderr, flush=True)
