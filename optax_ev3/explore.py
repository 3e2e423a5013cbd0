"""Explore: how explorers are tried."""

from optax_ev3._src.explore.racing import Racing

__all__ = ["Racing"]
