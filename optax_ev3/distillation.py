"""Losses of knowledge distillation, and the teachers that they learn from."""

from optax_ev3._src.applications.distillation import (
    archived,
    loss,
    soft_target_loss,
    stored,
)

__all__ = ["archived", "loss", "soft_target_loss", "stored"]
