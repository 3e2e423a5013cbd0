"""CIFAR-10 and CIFAR-100 from the official archives, and their usual augmentation.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). Nothing is
downloaded and nothing is unpacked to disk.
"""

import codecs
import gzip
import hashlib
import io
import os
import pathlib
import pickle
import tarfile
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import train_test_split

ADDRESS = "https://www.cs.toronto.edu/~kriz/"
PADDING = 4

Part = tuple[np.ndarray, np.ndarray]


class Cifar(NamedTuple):
    """Images ``[n, 32, 32, 3]`` uint8 and labels ``[n]`` int32, three times."""

    train: Part  # For gradients.
    held_out: Part  # For EV3's assessments: split off the official training part.
    test: Part  # The official one, for nothing but the final figures.
    classes: int
    rows: np.ndarray  # [n], where the training examples are in the official part.


class _Format(NamedTuple):
    archive: str
    md5: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: int


_FORMATS = {
    "cifar10": _Format(
        archive="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
        test="cifar-10-batches-py/test_batch",
        labels=b"labels",
        classes=10,
    ),
    "cifar100": _Format(
        archive="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        train=("cifar-100-python/train",),
        test="cifar-100-python/test",
        labels=b"fine_labels",
        classes=100,
    ),
}


def load(
    folder: str | os.PathLike,
    name: str,
    *,
    held_out: int = 5000,
    checksums: bool = True,
) -> Cifar:
    """Reads an official archive for Python, with a fixed stratified split.

    Args:
      folder: where the archive is, under its official name.
      name: "cifar10", or "cifar100" with its 100 fine labels.
      held_out: how many of the 50,000 training examples are held out.
      checksums: whether only the official archive is accepted. Without it, the
        contents are still checked.

    Raises:
      FileNotFoundError: there is no archive.
      ValueError: the archive is damaged or has other contents than the official one.
    """
    if name not in _FORMATS:
        raise ValueError(f"name must be one of {sorted(_FORMATS)}, got {name!r}.")
    form = _FORMATS[name]
    path = pathlib.Path(folder) / form.archive
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Download {ADDRESS}{form.archive} and put it "
            "there as it is."
        )
    packed = path.read_bytes()
    if checksums:
        _check(path, packed, form)
    pickles = _unpack(path, packed)
    parts = [_read(path, member, pickles, form) for member in form.train]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    train, assessed = _split(labels, held_out, form.classes)
    return Cifar(
        train=(images[train], labels[train]),
        held_out=(images[assessed], labels[assessed]),
        test=_read(path, form.test, pickles, form),
        classes=form.classes,
        rows=train,
    )


def _check(path: pathlib.Path, packed: bytes, form: _Format) -> None:
    found = hashlib.md5(packed, usedforsecurity=False).hexdigest()
    if found != form.md5:
        raise ValueError(
            f"{path} is not the official archive: expected MD5 {form.md5}, found "
            f"{found} in {len(packed):,} bytes. Download {ADDRESS}{form.archive} again."
        )


def _unpack(path: pathlib.Path, packed: bytes) -> dict[str, bytes]:
    """The contents of all files in a gzipped tar archive, by their names."""
    try:
        unzipped = io.BytesIO(gzip.decompress(packed))
        with tarfile.open(fileobj=unzipped, mode="r:") as tar:
            return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise ValueError(
            f"{path} with {len(packed):,} bytes is not a complete gzipped tar archive "
            f"({error}). Download it again."
        ) from error


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # The module's name in the official files, and in those of NumPy 2.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    # Python 3 writes bytes so for readers in Python 2.
    ("_codecs", "encode"): codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    """Admits arrays and nothing else: a pickle can call whatever it can name."""

    def find_class(self, module, name):
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return _ADMITTED[module, name]


def _read(
    path: pathlib.Path, member: str, pickles: dict[str, bytes], form: _Format
) -> Part:
    """Images and labels of one member."""
    if member not in pickles:
        raise ValueError(f"{path} has no member {member}.")
    where = f"{path}, member {member}:"
    try:
        batch = _Unpickler(io.BytesIO(pickles[member]), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[form.labels])
    except Exception as error:  # A damaged pickle can raise anything.
        raise ValueError(
            f"{where} expected a pickled dict with b'data' and {form.labels!r}, but "
            f"reading it raised {error!r}."
        ) from error
    if images.dtype != np.uint8 or images.shape[1:] != (3072,):
        raise ValueError(
            f"{where} b'data' must be uint8 [n, 3072], got {images.dtype} "
            f"{list(images.shape)}."
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{where} {form.labels!r} must be {len(images)} integers, as many as there "
            f"are images, got {labels.dtype} {list(labels.shape)}."
        )
    outside = labels[(labels < 0) | (labels >= form.classes)]
    if outside.size:
        raise ValueError(
            f"{where} {form.labels!r} must be in [0, {form.classes}), got {outside[0]}."
        )
    channels_first = images.reshape(len(images), 3, 32, 32)
    images = np.ascontiguousarray(channels_first.transpose(0, 2, 3, 1))
    return images, labels.astype(np.int32)


def _split(labels: np.ndarray, held_out: int, classes: int):
    """Indices for gradients and for assessments, each with the classes' shares."""
    if not classes <= held_out <= len(labels) - classes:
        raise ValueError(
            f"held_out must be in [{classes}, {len(labels) - classes}], for an example "
            f"of each class on both sides, got {held_out}."
        )
    return train_test_split(
        np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=0
    )


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel in [0, 1], float32, from bytes."""
    count = images[..., 0].size
    # Sums of integers are exact, and need no copy of all images in floating point.
    total = np.einsum("nhwc->c", images, dtype=np.int64)
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64)
    mean = total / count
    std = np.sqrt(squares / count - mean**2)
    return np.float32(mean / 255), np.float32(std / 255)


def normalize(images, mean, std) -> jax.Array:
    """Bytes as float32, given the `statistics` of the training part."""
    mean, std = (jnp.reshape(x, (1, 1, 1, -1)) for x in (mean, std))
    return (jnp.asarray(images, jnp.float32) / 255 - mean) / std


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Random crops of padded images, half of them flipped, for use under ``jit``.

    He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2. The
    padding is zeros, which is the mean colour in what `normalize` returns: so augment
    after it.
    """

    def one(key, image):
        crop_key, flip_key = jax.random.split(key)
        border = (PADDING, PADDING)
        padded = jnp.pad(image, [border, border, (0, 0)])
        top, left = jax.random.randint(crop_key, [2], 0, 2 * PADDING + 1)
        crop = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        return jnp.where(jax.random.bernoulli(flip_key), crop[:, ::-1], crop)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)
