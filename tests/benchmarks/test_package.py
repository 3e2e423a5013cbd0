"""What all suites have in common: results, statistics, tables, the command line."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

pytest.importorskip("statsmodels")
from benchmarks import report, run
from benchmarks.results import OtherSettings, Results, claim, tidy


def test_tidy_results_have_a_row_for_each_number():
    values = np.arange(6.0).reshape(2, 3)
    rows = tidy({"a": values, "b": -values}, seed=[7, 8], mark=[0.5, 0.7, 1.0])
    assert list(rows.columns) == ["seed", "mark", "metric", "value"]
    assert len(rows) == 12
    found = rows[(rows.metric == "b") & (rows.seed == 8) & (rows.mark == 0.7)]
    assert found.value.item() == -4
    assert tidy({"alone": 3}).value.item() == 3


def test_cells_are_added_whole_and_read_back(tmp_path, monkeypatch):
    results = Results(tmp_path / "new")
    odd = ["a / b", "50%", 'say "a, b"', "nan", "NA", "1", "ä: [1]", "EV3, no race"]
    numbers = [0.1, -1234.56, 1e-30, np.inf, 3, 1 / 3, 1e5, np.nan]
    for name, number in zip(odd, numbers, strict=True):
        assert (name, name) not in results
        results.add(name, name, tidy({"test": [number, 2]}, seed=[0, 1]))
    results.add("a / b", "with more", tidy({"test": [1.5]}, rate=[0.25]))
    for found in (results, Results(tmp_path / "new")):
        frame = found.frame
        assert list(frame) == ["task", "method", "seed", "rate", "metric", "value"]
        assert list(frame.method)[::2] == [*odd, "with more"]
        assert all((name, name) in found for name in odd)
        given = [float(f"{x:.6g}") for x in numbers]
        np.testing.assert_array_equal(frame.value[:16:2], given)
        np.testing.assert_array_equal(frame.seed, [0, 1] * 8 + [np.nan])
        assert frame.rate.iloc[-1] == 0.25
    before = results.path.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            results.add("wine", "late", tidy({"test": [1.0]}, seed=[0]))
    assert results.path.read_bytes() == before
    # What was written before stays as it was, digit for digit.
    results.add("wine", "late", tidy({"test": [1.0]}, seed=[0]))
    assert results.path.read_bytes().startswith(before)


def test_a_folder_is_for_one_setting(tmp_path):
    claim(tmp_path, {"seeds": 3, "sizes": (1, 2)})
    claim(tmp_path, {"seeds": 3, "sizes": (1, 2)})
    with pytest.raises(OtherSettings, match="another value of sizes: choose another"):
        claim(tmp_path, {"seeds": 3, "sizes": (1, 3)})


def test_holm():
    # By hand: 0.01 * 3, then 0.02 * 2, then 0.5.
    assert report.holm([0.5, -0.01, 0.02]) == pytest.approx([0.5, -0.03, 0.04])
    assert report.holm([0.04, -0.039]) == pytest.approx([0.078, -0.078])


def test_statistics():
    ours, theirs = np.array([1.0, 2.0, 4.0, 3.0]), np.array([2.0, 2.5, 4.0, 3.2])
    error = np.sqrt(ours.var(ddof=1) / 4)
    assert report.spread(ours, 3) == f"2.500 ± {error:.3f}"
    assert report.spread(ours, 1, scale=100) == f"250.0 ± {100 * error:.1f}"
    gap = ours - theirs
    t = gap.mean() / np.sqrt(gap.var(ddof=1) / 4)
    expected = 2 * stats.t.sf(abs(t), 3)
    assert report.paired(ours, theirs) == pytest.approx(-expected)
    assert report.paired(theirs, ours) == pytest.approx(expected)
    assert report.paired(ours, ours) == 1
    # Of proportional values a ratio is known without error.
    assert report.ratio(1.5 * ours, ours) == "1.500 ± 0.000"


def test_tables_of_means_and_errors(capsys):
    values = np.arange(12.0).reshape(2, 2, 3)
    rows = tidy(
        {"loss": values, "other": values}, kind=["b", "a"], n=[1, 2], seed="xyz"
    )
    table = report.spreads(rows, ["kind", "n"], {"loss": 2}, {"loss": 10.0})
    assert list(table.index) == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]
    assert list(table) == ["loss"]
    assert table.loss["a", 2] == "100.00 ± 5.77"
    report.show(table, "Title")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Title"
    assert lines[-1].split() == ["a", "2", "100.00", "±", "5.77"]


ROOT = pathlib.Path(run.__file__).parents[1]


def test_the_command_line_lists_suites_and_says_what_is_wrong():
    def command(*args):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *args],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    done = command("--help")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in run.SUITES)
    unknown = command("nonsense")
    assert unknown.returncode == 2 and "quality" in unknown.stdout


def test_every_suite_has_its_options(capsys):
    for name in run.SUITES:
        with pytest.raises(SystemExit) as done:
            run.main([name, "--help"])
        assert done.value.code == 0
        out = capsys.readouterr().out
        assert "--task" in out and "--only" in out
    with pytest.raises(SystemExit) as done:
        run.main(["quality", "--task=nonsense"])
    assert done.value.code == 2 and "nonsense" in capsys.readouterr().err


def test_results_of_other_settings_are_refused(tmp_path, capsys):
    claim(tmp_path, {"seeds": 1})
    with pytest.raises(SystemExit) as done:
        run.main(["quality", "--show", f"--folder={tmp_path}"])
    assert done.value.code == 2
    assert "another value of few, first_seed" in capsys.readouterr().err


@pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="a source distribution has no stored results"
)
def test_stored_results_are_of_suites():
    for folder in run.FOLDER.iterdir():
        name = folder.name.removesuffix("_quick")
        assert name in run.SUITES, folder
        frame = Results(folder).frame
        assert pd.api.types.is_float_dtype(frame.value) and len(frame)
