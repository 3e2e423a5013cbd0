"""The suite of ablations: what it compares, and that it runs."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")
pytest.importorskip("optuna")
import optax

from benchmarks import ablation, run
from benchmarks.quality import clock, methods, tasks
from benchmarks.results import Results


def test_ratios_are_to_the_reference():
    rows = [("x", "EV3", 2.0), ("x", "EV3", 4.0), ("x", "a", 6.0), ("x", "a", 3.0)]
    frame = pd.DataFrame(rows, columns=["task", "method", "value"]).assign(
        metric="test"
    )
    assert dict(ablation.ratios(frame, "test").loc["x"]) == {"EV3": 1, "a": 1.5}


@pytest.mark.slow
def test_the_suite(tmp_path, capsys, monkeypatch):
    inner = {"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1)}
    found = {"EV3": ablation.ev3(inner), "shared": ablation.ev3(inner, own=False)}
    monkeypatch.setattr(ablation, "METHODS", found)
    args = ["ablation", "--quick", "--task=wine", f"--folder={tmp_path}"]
    assert run.main(args) == 0
    assert "over that of EV3" in capsys.readouterr().out
    kept = Results(tmp_path).frame
    test = kept[kept.metric == "test"]
    assert len(test) == 4 and np.isfinite(test.value).all()
    # Assessments count: no more is done at equal work than at equal gradients.
    assert (kept[kept.metric == "work"].value > 1).all()


def test_stored_results_are_of_all_that_can_be_measured():
    kept = Results(run.FOLDER / "ablation").frame
    assert set(kept.task) == set(tasks.TASKS)
    for _, one in kept.groupby("task"):
        assert set(one.method) == set(ablation.METHODS)


@pytest.mark.slow
def test_time_for_a_unit_of_work(monkeypatch):
    inner = {"adam": optax.adam(1e-2), "sgd": optax.sgd(0.1)}
    monkeypatch.setattr(clock, "CALLS", 30)
    for name, own in ((methods.PORTFOLIO, True), (methods.RELAY, False)):
        monkeypatch.setitem(methods.EV3S, name, methods.portfolio(inner, own=own))
    found = clock.seconds(tasks.made("wine"), clock.Settings(2, 0.01))
    assert set(found) == {"AdamW + cosine", *methods.MAIN}
    assert all((times > 0).all() and len(times) == 2 for times in found.values())


def test_time_over_that_of_the_baseline(monkeypatch):
    adamw = np.array([2.0, 4.0, 1.0])
    ratios = {"EV3 portfolio": np.array([1.5, 3.0, 2.0]), "EV3 relay": np.ones(3)}
    found = {name: adamw * ratio for name, ratio in ratios.items()}
    monkeypatch.setattr(
        clock, "seconds", lambda task: {"AdamW + cosine": adamw, **found}
    )
    rows = clock.cell(None).set_index("metric").value
    assert rows["EV3 portfolio: ratio"] == 2.0 and rows["EV3 relay: ratio"] == 1.0
    assert rows["EV3 portfolio: ratio_25"] == 1.75
    assert rows["EV3 portfolio: ratio_75"] == 2.5
