"""How long the package takes to import."""

import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks.overhead.timing import ratio_row

CODE = "import time, {}; print(time.process_time())"


def measure_imports(settings: Any) -> list[dict[str, Any]]:
    """CPU time of new processes, their start included, in turn; all is compiled."""
    names = ["optax", "optax_ev3"]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"PYTHONPYCACHEPREFIX": folder, "JAX_PLATFORMS": "cpu"}
        env.pop("PYTHONDONTWRITEBYTECODE", None)

        def seconds(name):
            command = [sys.executable, "-c", CODE.format(name)]
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, check=True
            )
            return float(done.stdout)

        for name in names:
            seconds(name)
        found = np.array(
            [[seconds(name) for name in names] for _ in range(settings.repeats)]
        ).T
    return [
        {"program": f"import {name}", **ratio_row(row, found[0])}
        for name, row in zip(names, found, strict=True)
    ]
