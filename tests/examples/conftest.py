"""Examples run within the tests' process, which spares them an import of JAX."""

import runpy

import jax
import pytest
from helpers.examples import EXAMPLES


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Runs an example's `main` with these flags; returns what it prints."""
    flags = pytest.importorskip("absl.flags").FLAGS

    def run(name, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)
        before = set(flags)
        try:
            main = runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]
            flags([name, *args])
            with jax.numpy_rank_promotion("allow"):
                assert not main(None)
        finally:
            # Other examples have flags of the same names.
            for flag in set(flags) - before:
                delattr(flags, flag)
        return capsys.readouterr().out

    return run
