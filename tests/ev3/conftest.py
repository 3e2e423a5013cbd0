"""Fixtures of the tests of the whole transformation."""

import pytest

from optax_ev3._src.base import control


@pytest.fixture
def for_all_platforms(monkeypatch):
    """Programs for accelerators, too, though there is none."""
    monkeypatch.setattr(control, "_has_cpus_alone", lambda: False)
