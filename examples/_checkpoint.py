"""What a long run keeps on disk: Orbax's checkpoints, and metrics as JSON lines."""

import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


class Folder:
    """The folder of one run, which is made if it does not exist.

    Orbax replaces the last checkpoint only when the next one is whole on disk. Lines
    that were logged after it are dropped when the run resumes.

    Args:
      path: Where it is.
      seconds: How often at most `save` really saves.
    """

    def __init__(self, path: str | os.PathLike, seconds: float = 60.0):
        self.path = pathlib.Path(path).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.path / "checkpoint", options=options)
        self._metrics = self.path / "metrics.jsonl"
        self._seconds, self._saved, self._lines = seconds, time.monotonic(), 0

    def resume(self) -> dict | None:
        """What `save` was told about its trees; None if there is no checkpoint."""
        about = self._restore(about=ocp.args.JsonRestore())
        about = about and about["about"]
        self._lines = about.pop("lines") if about else 0
        if self._metrics.exists():
            kept = self._metrics.read_text().splitlines(keepends=True)[: self._lines]
            write(self._metrics, "".join(kept).encode())
        return about

    def restore(self, **targets: Any) -> dict[str, Any]:
        """The trees of the last checkpoint, like those given by their names.

        For one device: arrays that are spread over several would be gathered.
        """
        args = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        found = self._restore(**args)
        # Orbax ties arrays to a device: for such ones jit would compile once more.
        return {name: jax.tree.map(_untied, found[name]) for name in targets}

    def _restore(self, **args):
        step = self._manager.latest_step()
        try:
            composite = ocp.args.Composite(**args)
            return None if step is None else self._manager.restore(step, args=composite)
        except Exception as error:  # A damaged file can raise anything.
            raise ValueError(
                f"{self._manager.directory} can't be read ({error!r}): remove it to "
                f"begin anew."
            ) from error

    def save(self, about: dict, *, now: bool = False, **trees: Any) -> None:
        """Saves trees with numbers and strings about them, if it is time."""
        if now or time.monotonic() - self._saved >= self._seconds:
            args = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
            about = ocp.args.JsonSave(about | {"lines": self._lines})
            step = self._manager.latest_step()
            step = 0 if step is None else step + 1
            self._manager.save(step, args=ocp.args.Composite(about=about, **args))
            self._saved = time.monotonic()

    def log(self, **line: Any) -> None:
        """Appends a line to the metrics."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._lines += 1


def _untied(leaf: Any) -> jax.Array:
    return jnp.asarray(np.asarray(leaf))


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a whole file or none."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
