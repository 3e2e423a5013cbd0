"""Fixtures of the tests of explorers."""

import pytest

from optax_ev3._src.explore import alike


@pytest.fixture
def apart(monkeypatch):
    """No explorers are stacked by themselves: an oracle for those that are."""
    monkeypatch.setattr(alike, "_LEAST", 1000)
