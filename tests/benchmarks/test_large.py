"""The tasks of real size of the quality suite, on a few of their examples."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("pandas")
pytest.importorskip("sklearn")
pytest.importorskip("statsmodels")
pytest.importorskip("mnist1d")
from benchmarks import data
from benchmarks.quality import large, shapes

NAMES = ["characters", "shapes", "MNIST-1D", "flights"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    few = {"CHARACTERS": 30_000, "IMAGES": 200, "SIGNALS": 200, "FLIGHTS": 2000}
    few |= {"HELD_OUT": 30, "TEST": 50, "AT_ONCE": 16, "WINDOWS": 30}
    for name, count in few.items():
        monkeypatch.setattr(large, name, count)


def test_all_tasks_are_tested():
    assert list(large.LARGE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tasks_can_be_learned(name):
    task = large.LARGE[name]("cpu")
    one, other = (jax.tree.map(jnp.asarray, task.parts(seed)) for seed in (0, 1))
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)
    pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    assert all((a != b).any() for a, b in pairs)
    params = task.init(jax.random.key(0))
    batch = jax.tree.map(lambda x: x[:32], one.train)

    def loss(params):
        found = task.loss(params, batch)
        return found[0] if task.merge else found

    # A short step against the gradient lowers the loss on the same examples.
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    size = optax.tree.norm(grads)
    assert size > 0
    lower = jax.tree.map(lambda p, g: p - 1e-3 / size * g, params, grads)
    assert jax.jit(loss)(lower) < value
    scores = jax.jit(task.score)(params, one.held_out)
    assert scores.shape == (30,)
    # Each example has its own score, whichever others there are.
    some = jax.tree.map(lambda x: x[7:10], one.held_out)
    np.testing.assert_allclose(task.score(params, some), scores[7:10], 1e-4)
    found = jax.jit(task.test)(params, one.held_out)
    expected = -scores.mean()
    if name == "flights":
        expected = 94 * np.sqrt(expected)  # Minutes, of some 94 as standard deviation.
    np.testing.assert_allclose(found, expected, 3e-2 if name == "flights" else 1e-4)


@pytest.mark.parametrize(
    ("name", "cpu", "gpu"),
    # What each has, counted by hand: tables, then layers.
    [
        (
            "characters",
            (128 + 64 + 1) * 192 + 2 * (12 * 192**2 + 11 * 192),
            (128 + 256 + 1) * 512 + 4 * (12 * 512**2 + 11 * 512),
        ),
        ("MNIST-1D", 3 * (128 + 2) * 128 + 1290, 3 * (256 + 2) * 256 + 2570),
    ],
)
def test_sizes(name, cpu, gpu):
    for size, count in (("cpu", cpu), ("gpu", gpu)):
        params = jax.eval_shape(large.LARGE[name](size).init, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gets_the_same_task_but_larger(name):
    def count(task):
        params = jax.eval_shape(task.init, jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(params))

    cpu, gpu = (large.LARGE[name](size) for size in ("cpu", "gpu"))
    assert count(gpu) > 3 * count(cpu) and gpu.steps > cpu.steps
    assert gpu.figure == cpu.figure
    with pytest.raises(ValueError, match=r"'cpu', 'gpu'.*'tpu'"):
        large.LARGE[name]("tpu")


# BatchNorm.


@pytest.fixture
def net():
    """The task, parameters whose statistics are not the first ones, and its parts."""
    task = large.images("cpu")
    params = task.init(jax.random.key(0))
    noise = optax.tree.random_like(jax.random.key(1), params["statistics"])
    moved = jax.tree.map(lambda x, n: x + 0.1 * abs(n), params["statistics"], noise)
    return task, params | {"statistics": moved}, task.parts(0)


def test_running_statistics_move_towards_those_of_the_batch(net):
    task, params, parts = net
    x, _ = batch = jax.tree.map(lambda x: x[:32], parts.train)
    _, aux = jax.jit(task.loss)(params, batch)
    merged = task.merge(params, aux)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    chosen = params["weights"]["stem"]["w"].reshape(3, 3, 3, -1)
    convolved = jax.lax.conv_general_dilated(
        np.float32(x) / 128 - 1,
        chosen,
        (2, 2),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    flat = np.float64(convolved).reshape(-1, convolved.shape[-1])
    old = params["statistics"]["stem"]
    for before, after, now in zip(
        old, merged["statistics"]["stem"], (flat.mean(0), flat.var(0)), strict=True
    ):
        np.testing.assert_allclose(after, 0.9 * before + 0.1 * now, 1e-4, 1e-5)
    assert all(
        (a != b).all()
        for a, b in zip(
            jax.tree.leaves(merged["statistics"]),
            jax.tree.leaves(params["statistics"]),
            strict=True,
        )
    )
    pairs = zip(*(jax.tree.leaves(x["weights"]) for x in (merged, params)), strict=True)
    assert all((a == b).all() for a, b in pairs)


def test_running_statistics_are_used_by_scores_and_not_by_the_loss(net):
    task, params, parts = net
    batch = jax.tree.map(lambda x: x[:32], parts.train)
    grads, _ = jax.jit(jax.grad(task.loss, has_aux=True))(params, batch)
    for part, expected in (("weights", True), ("statistics", False)):
        assert all(g.any() == expected for g in jax.tree.leaves(grads[part]))
    other = params | {"statistics": jax.tree.map(jnp.ones_like, params["statistics"])}
    assert task.loss(params, batch)[0] == task.loss(other, batch)[0]
    one, two = (task.score(x, batch) for x in (params, other))
    assert (abs(one - two) > 1e-3).all()


# Models.


def test_characters_are_predicted_from_those_before_them():
    init, outputs = large.decoder(8, 16, 2, 2)
    params = init(jax.random.key(0))
    one = np.arange(60, 68)[None]
    other = np.where(np.arange(8) == 5, 100, one)
    differ = (outputs(params, one) != outputs(params, other)).any((0, 2))
    np.testing.assert_array_equal(differ, np.arange(8) >= 5)


def test_gru_reads_a_signal_step_by_step():
    init, outputs = large.gru(5, 3)
    params = init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=[2, 7])
    (w, b), u, (head, bias) = (
        jax.tree.map(np.float64, params[name]) for name in ("input", "state", "head")
    )
    wr, wz, wn = np.split(w[0], 3)
    ur, uz, un = np.split(u, 3, 1)
    br, bz, bn = np.split(b, 3)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for row, found in zip(x, outputs(params, jnp.float32(x)), strict=True):
        h = np.zeros(5)
        for value in row:
            r = sigmoid(value * wr + br + h @ ur)
            z = sigmoid(value * wz + bz + h @ uz)
            new = np.tanh(value * wn + bn + r * (h @ un))
            h = z * h + (1 - z) * new
        np.testing.assert_allclose(found, h @ head + bias, 1e-4, 1e-5)


def test_embeddings_are_multiplied_in_pairs():
    task = large.air_times("cpu")
    params = task.init(jax.random.key(0))
    codes, numbers, y = part = jax.tree.map(lambda x: x[:3], task.parts(0).train)
    rows = np.float64(params["table"])[codes]
    pairs = sum(rows[:, i] * rows[:, j] for i, j in itertools.combinations(range(7), 2))
    x = np.concatenate([rows.reshape(3, -1), pairs, numbers], 1)
    *hidden, (w, b) = params["layers"]
    for matrix, shift in hidden:
        x = np.maximum(x @ np.float64(matrix) + shift, 0)
    expected = -(((x @ np.float64(w) + b)[:, 0] - y) ** 2)
    np.testing.assert_allclose(task.score(params, part), expected, 1e-4)


# Data.


def test_shapes_are_drawn_alike_each_time():
    (x, y), (again, labels), (other, _) = (
        shapes.drawn(200, [seed, 0]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(x, again)
    np.testing.assert_array_equal(y, labels)
    assert (x != other).any((1, 2, 3)).all()
    assert x.shape == (200, 32, 32, 3) and x.dtype == np.uint8
    assert set(y) == set(range(10))
    whole = shapes.shapes(1100)
    np.testing.assert_array_equal(whole[0][1000:], shapes.drawn(100, [1000, 0])[0])


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("disc", np.pi * 0.85**2),
        ("ring", np.pi * (0.97**2 - 0.53**2)),
        ("triangle", 27**0.5 / 4),
        ("square", 2),
        ("bar", 4 * 0.35),
        ("cross", 2 * 4 * 0.95 * 0.28 - 4 * 0.28**2),
        ("star", np.pi * (0.65**2 + 0.35**2 / 2)),
        ("arrow", 0.75 * 0.9 + 0.5 * 0.9),
    ],
)
def test_areas_of_shapes(kind, area):
    v, u = np.mgrid[-1.5:1.5:600j, -1.5:1.5:600j]
    found = (shapes.inside(kind, u, v) > 0).mean() * 9
    assert found == pytest.approx(area, rel=0.01)


def test_text_is_plain_and_there_once():
    windows = data.prose(500, 65)
    assert windows.dtype == np.uint8 and windows.max() < large.LETTERS
    text = windows.tobytes().decode("ascii")
    lines = text.split("\n")
    assert len(set(lines)) == len(lines) > 50
    assert " the " in text and ">>>" not in text
    with pytest.raises(ValueError, match="characters"):
        data.prose(10**7, 65)


def test_signals_leave_the_global_generators_alone():
    random.seed(5), np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5), np.random.seed(5)
    x, y = data.mnist1d.__wrapped__(100)
    assert (random.random(), np.random.random()) == expected
    assert x.shape == (100, 40) and x.dtype == np.float32
    np.testing.assert_array_equal(np.bincount(y), [10] * 10)
    np.testing.assert_array_equal(data.mnist1d.__wrapped__(100)[0], x)


def test_categories_of_flights_have_numbers_of_their_own():
    codes, numbers, minutes, total = data.flights(2000)
    counts = [len(set(column)) for column in codes.T]
    assert counts[2] == 3 and counts[6] == 7  # Airports; days of the week.
    assert len(set(codes.ravel())) == sum(counts) == total
    np.testing.assert_allclose(numbers.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(numbers.std(0), 1, atol=1e-4)
    # The distance, its logarithm here, tells most of the time.
    assert np.corrcoef(numbers[:, -1], minutes)[0, 1] > 0.9
