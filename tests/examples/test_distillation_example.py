"""The experiment of distillation: whole, resumed, on a full disk, with bad input."""

import importlib
import json
import re
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, says
from helpers.cifar import write_archive
from helpers.examples import EXAMPLES
from helpers.examples import run as run_example

pytest.importorskip("sklearn")
# Of Orbax, which other tests relax, too.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TINY = {
    "sizes": [1, 2],
    "filters": 2,
    "losses": [{"temperature": 2.0}],
    "rates": [0.01],
    "batch": 8,
    "assessed": 40,
    "length": 3,
    "rounds": 1,
    "most": 2,
    "passes": 2,
    "teacher_filters": 2,
    "teacher_steps": 6,
}


@pytest.fixture(scope="module")
def experiment():
    """The module, whose siblings it imports by their names."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("_distillation")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def checkpoint(experiment):
    return experiment._checkpoint


def run(*args, cwd, **others):
    """A tiny setting, run as the other examples are."""
    override = json.dumps(TINY | others)
    return run_example("distillation.py", f"--override={override}", *args, cwd=cwd)


@pytest.mark.slow
def test_passes_and_fixed_students_on_digits(tmp_path):
    done = run("--seeds=1", "--method=multi pass", "--method=fixed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("grew from 1,") == 2  # Once in each of two passes.
    folder = tmp_path / "distillation"
    (one,) = json.loads((folder / "results.json").read_text())
    stages = one["single pass"]
    assert [stage["layers"] for stage in stages] == [8, 14]
    # One explorer, rounds of 3 steps, one or two of them at each size.
    assert all(stage["gradients"] in (3, 6, 9, 12) for stage in stages)
    second = one["multi pass"]
    assert all(x["gradients"] == 2 * x["calls"] for x in second)
    for kind in ("fixed", "fixed, falling rate"):
        marks = [found["steps"] for found in one[kind]]
        assert marks == [stage["gradients"] for stage in stages]
    whole = {found["steps"] for found in one["fixed, whole pass"]}
    assert whole == {stages[-1]["gradients"]}
    assert one["final of multi pass"]["layers"] in (8, 14)
    for row in ("teacher", "ResNet-8", "ResNet-14", "final student of multi pass"):
        assert re.search(rf"^{row}", done.stdout, re.M)
    lines = (folder / "seed_0" / "pass_2" / "metrics.jsonl").read_text().splitlines()
    calls = [json.loads(line)["calls"] for line in lines]
    assert calls == list(range(3, 3 * len(calls) + 1, 3))
    image = pytest.importorskip("matplotlib.image")
    for name in ("accuracy.png", "course.png"):
        assert image.imread(folder / name).std() > 0.01

    other = run("--seeds=1", cwd=tmp_path, batch=9)
    assert other.returncode and "(batch differ)" in other.stderr


def test_accuracies_of_seeds_that_got_to_different_sizes(experiment):
    from _distillation_report import accuracies, spread

    def stages(*values):
        return [{"test/visible/accuracy": x} for x in values]

    results = [{"single pass": stages(0.5, 0.75)}, {"single pass": stages(0.75)}]
    small, large = accuracies(results, "single pass")
    assert small.tolist() == [0.5, 0.75] and large.tolist() == [0.75]
    # Of two values half their difference.
    assert (spread(small), spread(large)) == ("0.6250 ± 0.1250", "0.7500 ± 0.0000")


def arguments(experiment, **others):
    """Setting, data and teachers of a tiny pass."""
    setting = experiment.configured("digits", json.dumps(TINY | others))
    data = experiment.load(setting, "", 0)
    logits = np.random.default_rng(0).normal(size=[len(data.rows), 10])
    teacher = experiment.distillation.stored(logits.astype(np.float32))
    return setting, data, {experiment.TEACHER: teacher}, 0


@pytest.mark.slow
def test_many_steps_in_a_call_are_the_same_steps(experiment):
    """As on GPUs; a round ends within."""
    setting, data, teachers, seed = arguments(experiment, length=2)
    model = experiment.student(setting, 1)

    def trained(calls, steps):
        tx = experiment.transformation(setting, model, teachers, True, seed)
        variables = experiment.init(model, seed, data)
        grown = variables, tx.init(variables)
        fixed = variables, experiment.cosine_adamw(0.01, 9.0).init(variables)
        grown, fixed = (jax.tree.map(jnp.copy, one) for one in (grown, fixed))
        for call in range(calls):
            about = data, teachers, seed, call * steps, steps
            grown = experiment.growing_steps(setting, model, True, *grown, *about)
            teacher = teachers[experiment.TEACHER]
            about = data, teacher, 0.01, 9.0, seed, call * steps, steps
            fixed = experiment.fixed_steps(
                setting, model, experiment.Loss(), *fixed, *about
            )
        return grown, fixed

    assert_close(trained(1, 3), trained(3, 1), 1e-4, 1e-5)


class Stop(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_pass_goes_on_bit_for_bit(experiment, checkpoint, tmp_path):
    args = arguments(experiment)

    def folder(name):
        return checkpoint.Folder(tmp_path / name, seconds=0.0)

    whole = experiment.Pass(*args, folder("whole"))
    whole.run()
    interrupted, runs = folder("parts"), 0
    while True:
        one, calls = experiment.Pass(*args, interrupted), []

        def stop(_, calls=calls, folder=interrupted):
            calls.append(None)
            if len(calls) == 3:  # Of the next round nothing is saved.
                folder.log(lost=True)
                raise Stop

        runs += 1
        try:
            one.run(stop)
            break
        except Stop:
            interrupted = folder("parts")
    assert runs > 1
    assert one.course == whole.course
    assert_identical((one.variables, one.state), (whole.variables, whole.state))
    parts, all_at_once = folder("parts"), folder("whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == lines
    assert parts.resume() == all_at_once.resume()
    trees = {"variables": whole.variables, "state": whole.state}
    for kept in (parts, all_at_once):
        assert_identical(kept.restore(**trees), trees)
    students = [
        experiment.final_student(*args[:2], one) for one in (parts, all_at_once)
    ]
    assert students[0][0] == students[1][0]
    assert_identical(students[0][1], students[1][1])

    # Nothing is lost at the growth.
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["layers"] for line in lines} == {8, 14}
    model, variables = experiment.final_student(*args[:2], folder("whole"))
    assert model.blocks in ((1, 1, 1), (2, 2, 2))
    stage = whole.course.stages[whole.course.final]
    found = experiment.figures(model, variables, args[1], "test")
    assert found["nll"] == stage["test/visible/nll"]


def test_a_full_disk_leaves_the_last_checkpoint(checkpoint, tmp_path):
    folder = checkpoint.Folder(tmp_path, seconds=0.0)
    folder.log(round=1)
    folder.save({"round": 1}, variables={"w": np.ones(3)})
    folder.log(round=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        noise = np.random.default_rng(0).normal(size=[100_000])
        with pytest.raises(Exception, match="too large"):
            folder.save({"round": 2}, variables={"w": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = checkpoint.Folder(tmp_path)
    assert again.resume() == {"round": 1}
    np.testing.assert_array_equal(
        again.restore(variables={"w": np.zeros(3)})["variables"]["w"], 1
    )
    assert (tmp_path / "metrics.jsonl").read_text() == '{"round": 1}\n'


def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path):
    folder = checkpoint.Folder(tmp_path)
    folder.save({"round": 1}, now=True, variables={"w": np.ones(300)})
    for path in (tmp_path / "checkpoint").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"checkpoint can't be read"):
        checkpoint.Folder(tmp_path).restore(variables={"w": np.zeros(300)})


def test_no_decide_adopts_the_best_explorer(experiment):
    rule = experiment.always_on()
    scores = np.random.default_rng(0).normal(size=[5, 40])
    scores[4] += 9  # Stable is far better, and the second explorer is not valid.
    scores[1] += 3
    valid = np.array([True, False, True, True, True])
    best = max((0, 2), key=lambda i: scores[i].mean())

    def decide():
        gather = experiment.evidence.gather
        seen = gather({"score": jnp.asarray(scores)}, jnp.asarray(valid), ~valid)
        return rule.decide(seen, (), jax.random.key(0))[0]

    assert (decide().adopted, decide().significant) == (best, False)
    scores[best] += 20
    assert (decide().adopted, decide().significant) == (best, True)
    valid[:3] = False
    assert decide().adopted == 3


@pytest.mark.slow
def test_cifar_from_a_generated_archive(tmp_path):
    write_archive(tmp_path, "cifar100", count=300)
    np.save(tmp_path / "logits.npy", np.random.default_rng(0).normal(size=[300, 100]))
    args = ["--setting=cifar100", f"--data={tmp_path}", "--nochecksums", "--seeds=1"]
    args += ["--method=single pass"]
    small = {"sizes": [1], "held_out": 100, "teacher_size": 1}
    done = run(*args, "--teacher_logits=logits.npy", cwd=tmp_path, **small)
    assert done.returncode == 0, done.stderr
    assert "teacher:" not in done.stdout
    assert re.search(r"^ResNet-8 +\d", done.stdout, re.M)
    missing = run(*args, "--data=elsewhere", "--folder=new", cwd=tmp_path, **small)
    assert missing.returncode
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz" in missing.stderr
    assert not (tmp_path / "new").exists()


def test_teachers_of_augmented_images_are_asked_live(experiment):
    setting, data, *_ = arguments(experiment)
    model = experiment.student(setting, 1)
    variables = experiment.init(model, 1, data)
    images, _ = data.train
    asked = {
        augment: experiment.teacher_from(
            setting._replace(augment=augment), model, variables, data
        )
        for augment in (True, False)
    }
    np.testing.assert_allclose(
        asked[True](images=data.pixels(images[:5])),
        asked[False](index=jnp.arange(5)),
        rtol=1e-4,
        atol=1e-5,
    )


BAD_LOGITS = {"another length": (50, 10), "other classes": (60, 100)}


@pytest.mark.parametrize("shape", BAD_LOGITS.values(), ids=BAD_LOGITS.keys())
def test_logits_that_do_not_fit(experiment, shape):
    setting, data, *_ = arguments(experiment)
    setting = setting._replace(data="cifar10")
    data = data._replace(
        train=(np.zeros([50, 4, 4, 3]), np.zeros(50)),
        held_out=(np.zeros([10, 4, 4, 3]), np.zeros(10)),
    )
    with says(ValueError, "[60, 10]", str(list(shape))):
        experiment.teacher_from_logits(setting, np.zeros(shape), data)


BAD_SETTINGS = {
    "unknown": ({"colour": 1}, "got colour"),
    "falling": ({"sizes": [2, 1]}, "must rise"),
    "no size": ({"sizes": []}, "must rise"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings(experiment, case):
    others, message = case
    with says(ValueError, message):
        experiment.configured("digits", json.dumps(others))
