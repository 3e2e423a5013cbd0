"""Models that grow, in Flax Linen and in Flax NNX."""

try:
    import flax  # noqa: F401 # pyright: ignore[reportUnusedImport]
except ImportError as _error:
    raise ImportError(
        'optax_ev3.models needs Flax: pip install "optax_ev3[flax]"'
    ) from _error
