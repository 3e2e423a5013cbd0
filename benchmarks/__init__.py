"""Benchmarks of optax_ev3, one suite a subject: `python -m benchmarks` lists them."""

import pathlib
import sys

# Examples are scripts whose parts import each other by name; benchmarks use them, too.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
