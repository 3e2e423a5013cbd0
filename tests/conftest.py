"""Devices and strictness of all tests, set before anything imports JAX."""

import os

_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_EIGHT_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

# Foreign code that relies on it runs under helpers.lenient().
jax.config.update("jax_numpy_rank_promotion", "raise")
