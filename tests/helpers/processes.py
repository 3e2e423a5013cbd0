"""Programs of several processes, each with devices of its own.

``python -m helpers.processes TASK FOLDER PORT COUNT INDEX`` is one of COUNT processes.
It does what :mod:`helpers.programs` calls TASK, and leaves ``FOLDER/COUNT-INDEX.npz``.
"""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parents[1]
DEVICES = 4  # In all processes of a program together.
UNAVAILABLE = 77  # The exit status where processes cannot be connected.


def launch(task, folder, count):
    """Starts a program of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].split()
    flags = [flag for flag in flags if "device_count" not in flag]
    flags += [f"--xla_force_host_platform_device_count={DEVICES // count}"]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
        "XLA_FLAGS": " ".join(flags),
        # Devices wait for those of other processes, each in a thread of XLA's.
        "NPROC": "16",
        "PJRT_NPROC": "16",
    }
    command = [sys.executable, "-W", "ignore", "-m", "helpers.processes", task]
    return [
        subprocess.Popen(
            [*command, folder, str(port), str(count), str(index)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def results(task, folder, *counts, timeout=240):
    """What each process ends with, of programs of so many processes."""
    names = [f"{count}-{index}.npz" for count in counts for index in range(count)]
    running = [one for count in counts for one in launch(task, folder, count)]
    try:
        for process in running:
            out, _ = process.communicate(timeout=timeout)
            if process.returncode == UNAVAILABLE:
                pytest.skip(out.strip().splitlines()[-1])
            assert process.returncode == 0, out[-5000:]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    found = [dict(np.load(folder / name)) for name in names]
    assert found[0] and all(one.keys() == found[0].keys() for one in found)
    return found


def connect(port, count, index):
    """Makes this process one of ``count``, if there are several."""
    if count == 1:
        return
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # On CPUs, two steps that run at a time may wait for each other for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    except Exception as error:
        print(f"processes cannot be connected: {error!r}")
        sys.exit(UNAVAILABLE)


def main(task, folder, port, count, index):
    connect(int(port), int(count), int(index))
    from helpers import programs  # It starts JAX.

    folder = pathlib.Path(folder)
    np.savez(folder / f"{count}-{index}.npz", **getattr(programs, task)(folder))
    if task == "fails":
        os._exit(0)  # JAX would raise the error once more.


if __name__ == "__main__":
    main(*sys.argv[1:])
