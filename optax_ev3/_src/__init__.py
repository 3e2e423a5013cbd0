"""Implementation of optax_ev3: one stage, one module."""
