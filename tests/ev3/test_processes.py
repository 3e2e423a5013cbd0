"""A program of several processes does what one process does on as many devices."""

import jax
import numpy as np
import pytest
from helpers.processes import results
from helpers.programs import begin, restore, saved

# Orbax and its dependencies warn of their own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:orbax"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def assert_same(one, other, exact):
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        if exact or leaf.dtype.kind != "f":
            np.testing.assert_array_equal(other[name], leaf, err_msg=name)
        else:
            np.testing.assert_allclose(
                other[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name
            )


def test_two_processes_train_like_one(tmp_path):
    first, second, alone = results("train", tmp_path, 2, 1)
    assert_same(first, second, exact=True)
    assert_same(alone, first, exact=False)
    for case in ("one_step", "relay", "branches", "spread", "host"):
        rounds = first[f"{case}[1].history.rounds"]
        adopted = first[f"{case}[1].history.adopted"][:rounds]
        assert len(set(adopted.tolist())) > 1, case  # There was something to decide.
    assert np.isfinite(first["host[1].history.mean"]).all()


def test_two_processes_save_and_restore(tmp_path):
    first, second = results("checkpoint", tmp_path, 2)
    assert_same(first, second, exact=True)
    middle, end, restored = (
        {k.removeprefix(part): v for k, v in first.items() if k.startswith(part)}
        for part in ("middle", "end", "restored")
    )
    assert_same(end, restored, exact=True)
    assert any((middle[name] != leaf).any() for name, leaf in end.items())
    # And one process reads it, on devices of its own.
    read = restore(tmp_path, begin("relay", jax.devices()[:2])[1])
    assert_same(middle, saved(read), exact=True)


def test_data_that_processes_cannot_share(tmp_path):
    for told in results("mistakes", tmp_path, 2):
        assert "data['x'][0], float32[32, 6], is spread" in str(told["spread"])
        assert 'held_out(metric_fn, "held", ...)' in str(told["spread"])
        assert "those [1] have other data" in str(told["sizes"])
        assert "numbers of examples are [30, 31]" in str(told["sizes"])
        assert "numbers of examples are [32, 32]" in str(told["values"])
        assert "assess_fn closes over an array, float32[32, 6]" in str(told["closing"])
        assert not str(told["same"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_metric_on_the_host_that_fails_ends_all_processes(count, tmp_path):
    for told in results("fails", tmp_path, count, timeout=45):
        assert "OSError: no file in process 0" in str(told["raised"])
