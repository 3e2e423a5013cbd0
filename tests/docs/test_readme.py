"""What README and docs show runs, and does what they say."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import optax_ev3

ROOT = pathlib.Path(__file__).parents[2]


def shown_in(file):
    """The first Python example of a page, compiled."""
    path = ROOT / file
    code = re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL).group(1)
    return compile(code, str(path), "exec")


def test_first_example():
    names = {}
    exec(shown_in("README.md"), names)
    reached = float(names["score"](names["params"], names["held_out"]).mean())
    assert reached > -0.2  # -0.69 knows nothing.


@pytest.mark.slow
def test_the_recommended_setting():
    names = {}
    exec(shown_in("docs/settings.md"), names)
    reached = float(names["score"](names["params"], names["held_out"]).mean())
    assert reached > -0.1
    # Explorers that did not win have rested.
    mean = optax_ev3.history(names["state"])["mean"]
    assert np.isnan(mean).any() and not np.isnan(mean).all(axis=0).any()


def test_a_metric_of_ones_own():
    names = {"jnp": jnp, "model": lambda w, x: w * x}
    exec(shown_in("docs/assessment.md"), names)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 15)).astype(np.float32)
    counts = rng.poisson(1, 15)
    counts[0] += 1 - counts.sum() % 2  # An odd number of examples has one median.
    figure = names["assess_fn"](2.0, x, y)
    assert isinstance(figure, optax_ev3.metrics.AggregateMetric)
    for weights in (np.ones(15, int), counts):
        found = figure.metric_fn(figure.outputs, jnp.float32(weights))
        expected = -np.median(np.repeat(np.abs(2 * x - y), weights))
        assert float(found) == pytest.approx(expected, rel=1e-6)
