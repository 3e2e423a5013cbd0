"""Fixtures of the tests of explorers."""

import pytest
from helpers import assert_close, assert_identical, trajectories
from helpers.trajectories import loss, score

import optax_ev3
from optax_ev3._src.explore import alike


@pytest.fixture
def apart(monkeypatch):
    """No explorers are stacked by themselves: an oracle for those that are."""
    monkeypatch.setattr(alike, "_LEAST", 1000)


@pytest.fixture
def assert_same_as_apart(request):
    """Explorers in a stack of this name train and decide as those apart do."""

    def check(inner, settings, stack, leaders):
        def run():
            tx = optax_ev3.ev3(inner, score, loss_fn=loss, **settings)
            return trajectories.run(tx, 60)[-1]

        params, state = run()
        assert stack in state.explore.explorers
        request.getfixturevalue("apart")
        expected, other = run()
        assert set(other.explore.explorers) == set(inner)
        assert_close(params, expected, 1e-4, 1e-5)
        found, adopted = (optax_ev3.history(x)["adopted"] for x in (state, other))
        assert len(set(found)) >= leaders
        assert_identical(found, adopted)

    return check
