"""Explore: how explorers are tried."""

from optax_ev3._src.racing import Racing

__all__ = ["Racing"]
