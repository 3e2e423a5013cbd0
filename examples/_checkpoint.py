"""What a long run keeps on disk: a checkpoint, and its metrics as JSON lines."""

import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization


class Folder:
    """The folder of one run, which is made if it does not exist.

    A checkpoint replaces the last one only when it is whole on disk, so that neither
    an interruption nor a full disk takes that away. Lines that were logged after it
    are dropped when the run resumes.

    Args:
      path: Where it is.
      seconds: How often at most `save` really saves.
    """

    def __init__(self, path: str | os.PathLike, seconds: float = 60.0):
        self.path = pathlib.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.seconds = seconds
        self._metrics = self.path / "metrics.jsonl"
        self._lines = 0
        self._saved = time.monotonic()

    def resume(self) -> tuple[dict, dict] | None:
        """What is known of the last checkpoint, and its trees as state dicts."""
        found = self.read("checkpoint.msgpack")
        self._lines = found[0].pop("lines") if found else 0
        kept = []
        if self._metrics.exists():
            kept = self._metrics.read_text().splitlines()[: self._lines]
        write(self._metrics, "".join(line + "\n" for line in kept).encode())
        return found

    def save(self, about: dict, *, now: bool = False, **trees: Any) -> None:
        """Saves trees with numbers and strings about them, if it is time."""
        if now or time.monotonic() - self._saved >= self.seconds:
            self.write("checkpoint.msgpack", about | {"lines": self._lines}, **trees)
            self._saved = time.monotonic()

    def log(self, **line: Any) -> None:
        """Appends a line to the metrics."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._lines += 1

    def write(self, name: str, about: dict, **trees: Any) -> None:
        """Writes a file of trees."""
        # Lists would come back as dicts: what is no array goes as JSON.
        packed = {"about": json.dumps(about)} | {
            key: serialization.to_state_dict(jax.device_get(tree))
            for key, tree in trees.items()
        }
        write(self.path / name, serialization.msgpack_serialize(packed))

    def read(self, name: str) -> tuple[dict, dict] | None:
        """What `write` was given, trees as state dicts; None if there is no file."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            trees = serialization.msgpack_restore(path.read_bytes())
            return json.loads(trees.pop("about")), trees
        except Exception as error:  # A damaged file can raise anything.
            raise ValueError(
                f"{path} can't be read ({error!r}): remove it to begin anew."
            ) from error


def restore(target: Any, tree: Any) -> Any:
    """A tree like ``target`` from its state dict."""
    return jax.tree.map(jnp.asarray, serialization.from_state_dict(target, tree))


def write(path: pathlib.Path, content: bytes) -> None:
    """Writes a whole file or none.

    Raises:
      OSError: It can't be written; what was there before is there still.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{error.strerror}; what was saved there before is kept, and the same "
            f"command goes on from it",
            str(path),
        ) from error
