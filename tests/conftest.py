"""Devices and strictness of all tests, set before anything imports JAX; their order."""

import gc
import os

# Most programs here run a few times: optimizing them takes longer than it saves. XLA's
# older way of fusing compiles in half the time, and one part instead of many in five
# sixths. What the caller sets comes last and wins; `make test-oldest` tests programs as
# users have them.
_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

# Foreign code that relies on it runs under helpers.lenient().
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes many objects that live on. Looking through them less often saves time;
# rarely would keep programs in memory that nobody needs any more.
gc.set_threshold(10_000, 10, 10)

# Those that run whole programs, for up to a minute each. They come first: the last
# ones to start should be short, so that no process waits for another at the end.
_FIRST = ("benchmarks", "examples")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name not in _FIRST)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # What is there now stays: it is not looked through again.
