"""What an import brings, and what it says where a package is missing."""

import subprocess
import sys

# What takes long to import, or comes with an extra alone.
HEAVY = {
    "absl.app",
    "flax",
    "jax._src.pallas",
    "jax.extend",
    "matplotlib",
    "orbax",
    "pandas",
    "scipy",
    "sklearn",
    "tqdm",
}


def printed(code):
    """What a program prints, in a process of its own."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_package_brings_nothing_heavy():
    code = """
import sys
import optax
before = set(sys.modules)
import optax_ev3
print(*set(sys.modules) - before)
"""
    brought = set(printed(code).split())
    assert "optax_ev3._src.composer" in brought
    assert HEAVY & brought == set()


def test_a_missing_package_is_named_with_its_extra():
    modules = {
        "plot": ("matplotlib", "plot"),
        "flax": ("flax", "flax"),
        "models": ("flax", "flax"),
        "models.linen": ("flax", "flax"),
        "models.nnx": ("flax", "flax"),
    }
    code = f"""
import importlib, sys
import optax_ev3
for module, (package, _) in {modules}.items():
    sys.modules[package] = None  # As if it were not installed.
    try:
        importlib.import_module("optax_ev3." + module)
    except ImportError as error:
        print(error)
"""
    said = printed(code).splitlines()
    for (module, (_, extra)), line in zip(modules.items(), said, strict=True):
        assert line.startswith(f"optax_ev3.{module.split('.')[0]} needs ")
        assert f'pip install "optax_ev3[{extra}]"' in line
