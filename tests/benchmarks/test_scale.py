"""What the suite `scale` counts, against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

pytest.importorskip("pandas")
import pandas as pd

from benchmarks import run, scale
from benchmarks.results import Results
from benchmarks.scale import collectives, measures, model, tables


def shard_map(fn, **kwargs):
    if hasattr(jax, "shard_map"):
        return jax.shard_map(fn, check_vma=False, **kwargs)
    from jax.experimental import shard_map

    return shard_map.shard_map(fn, check_rep=False, **kwargs)


@pytest.mark.skipif(
    getattr(jax.profiler, "ProfileData", None) is None,
    reason="this release cannot read profiles",
)
def test_bytes_that_devices_exchange():
    """Of 24 floats on 4 devices, in loops and conditionals."""

    def body(x, flag):
        # Five sums of 6 floats each, 120 bytes; a sum of two arrays, 36 bytes.
        x, _ = lax.scan(lambda c, _: (lax.psum(jnp.tanh(c), "d"), None), x, length=5)
        halves = lax.psum((x.astype(jnp.float16), jnp.exp(x)), "d")
        # 4 x 6 floats, 96 bytes, or 24.
        y = lax.cond(
            flag,
            lambda x: lax.all_gather(jnp.sin(x), "d").sum(0),
            lambda x: lax.psum(jnp.cos(x), "d"),
            x,
        )
        # Three times 24 bytes with the flag, or four.
        pairs = [(i, (i + 1) % 4) for i in range(4)]
        z, _ = lax.while_loop(
            lambda c: c[1] < 4,
            lambda c: (lax.ppermute(2 * c[0], "d", pairs), c[1] + 1),
            (x, jnp.asarray(flag, jnp.int32)),
        )
        return lax.all_gather(x, "d").sum(0) + y + z + sum(halves)  # 96 bytes

    split = PartitionSpec("d")
    fn = shard_map(
        body,
        mesh=Mesh(np.array(jax.devices()[:4]), "d"),
        in_specs=(split, PartitionSpec()),
        out_specs=split,
    )
    compiled = jax.jit(fn).lower(jnp.ones(24), True).compile()

    def moved(flag):
        call = functools.partial(compiled, jnp.ones(24), flag)
        return collectives.moved(compiled.as_text(), call, 4)

    always = 120 + 36 + 96
    assert moved(True) == always + 96 + 3 * 24
    assert moved(False) == always + 24 + 4 * 24


def test_asynchronous_collectives_count_once():
    text = """
ENTRY %main (x: bf16[8]) -> bf16[32] {
  %x = bf16[8]{0} parameter(0)
  %start = (bf16[8]{0}, bf16[32]{0}) all-gather-start(%x), dimensions={0}
  %done = bf16[32]{0} all-gather-done(%start)
  %pair.1 = (s32[], pred[16]{0}) all-reduce(%i, %p), to_apply=%add
  ROOT %result = f8e4m3fn[2,3]{1,0} all-to-all(%done)
}
"""
    sizes = {"done": 64, "pair.1": 4 + 16, "result": 6}
    assert collectives.result_sizes(text) == sizes


def test_equations_count_wherever_they_are_used():
    @jax.jit
    def inner(x):
        return jnp.sin(jnp.cos(x))

    def fn(x):
        x = inner(x) + inner(x)  # 2 * (1 + 2) and 1
        x = lax.cond(x > 0, lambda x: x * 2, lambda x: x, x)  # > and cond, and 1
        return lax.fori_loop(0, 3, lambda _, x: inner(x), x)  # a scan and i + 1, and 3

    traced = jax.jit(fn).trace(1.0)
    # The index becomes a number of cond.
    converted = str(traced.jaxpr).count("convert_element_type")
    assert measures.equations(traced.jaxpr) - converted == 7 + 3 + 2 + 3


def test_layers_are_the_same_scanned_and_one_by_one():
    shape = model.Shape(3, True, 8, 2, 16, 5)
    params = model.init(shape, jax.random.key(0))
    params = jax.tree.map(lambda w: 10 * w + 0.1, params)
    tokens = jax.random.randint(jax.random.key(1), [4, 6], 0, 16)
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(3)]
    score = functools.partial(model.log_likelihood, whole=lambda tree: tree)
    unrolled = score(
        shape._replace(scanned=False), {**params, "layers": layers}, tokens
    )
    np.testing.assert_allclose(score(shape, params, tokens), unrolled, rtol=1e-5)
    assert len(jax.tree.leaves(layers)) == 3 * 12 and unrolled.std() > 1e-3


def test_a_process_over_the_limit_says_so():
    settings = scale.Settings()._replace(**{**scale.QUICK, "limit": 0.05})
    cells = list(scale.cells(settings, ["programs"], None))
    found = cells[0].measure()
    assert found.metric.iloc[-1] == "over_seconds" and found.value.iloc[-1] == 0.05
    # Adam's own step was cut off.
    assert "ev3" not in set(found.program)


def case(method, program, repeat=0.0, strategy="relay", **metrics):
    labels = dict(zip(tables.MODEL, (12, "scanned"), strict=True))
    labels |= dict(zip(tables.CASE, (strategy, 2, "alike"), strict=True))
    return [
        {
            "task": "programs",
            "method": method,
            "program": program,
            "repeat": repeat,
            "machine": "here",
            "metric": metric,
            "value": value,
            **labels,
        }
        for metric, value in metrics.items()
    ]


def test_tables_have_ratios_within_a_repeat_and_limits():
    # The machine slows down tenfold.
    rows = [
        *case("relay", "adam", 0, state_leaves=33, compile_seconds=1.0),
        *case("relay", "ev3", 0, state_leaves=66, compile_seconds=3.0),
        *case("relay", "adam", 1, state_leaves=33, compile_seconds=10.0),
        *case("relay", "ev3", 1, state_leaves=66, compile_seconds=30.0),
        *case(
            "branches", "adam", strategy="branches", state_leaves=33, trace_seconds=3
        ),
        *case("branches", "ev3", strategy="branches", state_leaves=99),
        *case("branches", None, strategy="branches", over_seconds=300),
    ]
    lines = list(tables.lines(tables.TABLES[0], pd.DataFrame(rows)))
    cells = [[text.strip() for text in line.split("|")[2:-1]] for line in lines[2:]]
    titles = [text.strip() for text in lines[0].split("|")[2:-1]]
    columns = [titles.index(name) for name in ("optimizer", "state leaves", "compile")]
    assert [[row[column] for column in columns] for row in cells] == [
        ["Adam", "33", "5.5 s"],
        ["relay, 2 alike", "66 (2)", "16.5 s (3)"],
        ["branches, 2 alike", "99 (3)", ""],
    ]
    assert cells[2][titles.index("trace")] == "over 300 s (over 100)"
    cells = list(tables.lines(tables.TABLES[1], pd.DataFrame(rows)))[-1].split("|")
    assert cells[3].strip() == "not done in 300 s"


@pytest.mark.skipif(
    not (run.FOLDER / "scale").exists(),
    reason="a source distribution has no stored results",
)
def test_the_stored_tables_are_made_of_stored_results(capsys, tmp_path):
    scale.report(Results(run.FOLDER / "scale").frame, scale.Settings(), tmp_path)
    stored = (run.FOLDER / "scale" / "tables.md").read_text()
    assert (tmp_path / "tables.md").read_text() == stored
    assert stored in capsys.readouterr().out
