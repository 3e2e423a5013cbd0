"""The package of benchmarks, from its folder, beside the installed optax_ev3."""

import importlib.util
import pathlib
import sys

import jax
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"

if "benchmarks" not in sys.modules:
    # With the root on the path, the source tree would hide the installed package.
    spec = importlib.util.spec_from_file_location("benchmarks", FOLDER / "__init__.py")
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


@pytest.fixture(autouse=True)
def benchmarks_may_broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield
