"""Generated archives of CIFAR, in the official format."""

import io
import pathlib
import pickle
import struct
import tarfile

import numpy as np

ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
MEMBERS = {
    "cifar10": [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
    "cifar100": ["train", "test"],
}
METAS = {"cifar10": "batches.meta", "cifar100": "meta"}
LABELS = {"cifar10": b"labels", "cifar100": b"fine_labels"}
CLASSES = {"cifar10": 10, "cifar100": 100}


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did: one type of text and bytes, and 0 or 1 for flags."""

    def save_text(self, text):
        text = text if isinstance(text, bytes) else text.encode()
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    def save_flag(self, flag):
        self.save_long(int(flag))

    dispatch = pickle._Pickler.dispatch | {
        bytes: save_text,
        str: save_text,
        bool: save_flag,
    }


def python2(batch):
    """A pickle like the official ones, which NumPy 1 wrote."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(batch)
    return file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def generate(name, count, seed=0):
    """Batches of ``count`` noisy images by member, a pattern for each class."""
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(0, 255, [CLASSES[name], 3, 4, 4]).repeat(8, 2).repeat(8, 3)
    batches = {}
    for member in MEMBERS[name]:
        labels = rng.permutation(np.arange(count) % CLASSES[name])
        images = patterns[labels] + rng.normal(0, 30, [count, 3, 32, 32])
        batches[member] = {
            b"data": images.clip(0, 255).astype(np.uint8).reshape(count, 3072),
            LABELS[name]: labels.tolist(),
            b"filenames": [b"image.png"] * count,
        }
        if name == "cifar100":
            batches[member][b"coarse_labels"] = (labels // 5).tolist()
    return batches


def write_archive(folder, name, count=100, seed=0, change=None, dump=python2):
    """Writes ``count`` images a member under the official name.

    Args:
      folder: where the archive goes.
      name: "cifar10" or "cifar100".
      count: images in each member; a multiple of the classes makes them equal.
      seed: of the patterns, the labels and the noise.
      change: called with the batches by member, to change them in place. What it
        makes bytes is written as it is.
      dump: makes a pickle of a batch.
    """
    batches = generate(name, count, seed)
    if change:
        change(batches)
    # Not in the order in which they are read.
    batches = {METAS[name]: {b"label_names": []}, **dict(sorted(batches.items()))}
    path = pathlib.Path(folder) / ARCHIVES[name]
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        directory = tarfile.TarInfo(FOLDERS[name])
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for member, batch in batches.items():
            content = batch if isinstance(batch, bytes) else dump(batch)
            info = tarfile.TarInfo(f"{FOLDERS[name]}/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
