"""The examples' reader of CIFAR, on generated archives in the official format."""

import gzip
import importlib.util
import os
import pickle
import tarfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_identical, says
from helpers.cifar import (
    ARCHIVES,
    CLASSES,
    LABELS,
    MEMBERS,
    generate,
    python2,
    write_archive,
)
from helpers.examples import EXAMPLES

_PATH = EXAMPLES / "_cifar.py"
_SPEC = importlib.util.spec_from_file_location("_cifar", _PATH)
_cifar = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_cifar)

NAMES = ["cifar10", "cifar100"]
BAD = "cifar-10-batches-py/data_batch_2"


def load(folder, name="cifar10", held_out=None):
    held_out = held_out or CLASSES[name]
    return _cifar.load(folder, name, held_out=held_out, checksums=False)


# Reading.


def multiset(images, labels):
    """Pairs of images and labels, regardless of their order."""
    return sorted(
        (int(label), image.tobytes())
        for image, label in zip(images, labels, strict=True)
    )


def as_written(batches, name, members):
    """The images and labels of some members, channels last, by a slow loop."""
    images, labels = [], []
    for member in members:
        for row in batches[member][b"data"]:
            planes = [row[i : i + 1024].reshape(32, 32) for i in (0, 1024, 2048)]
            images.append(np.stack(planes, axis=-1))
        labels += batches[member][LABELS[name]]
    return np.stack(images), np.array(labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", ["python2", 2, 4])
def test_what_is_written_is_read(name, protocol, tmp_path):
    dump = python2
    if protocol != "python2":
        dump = lambda batch: pickle.dumps(batch, protocol)
    write_archive(tmp_path, name, dump=dump, count=200)
    data = load(tmp_path, name)
    batches = generate(name, count=200)
    *training, test = MEMBERS[name]

    assert data.classes == CLASSES[name]
    for images, labels in data[:3]:
        assert images.dtype == np.uint8 and images.shape == (len(labels), 32, 32, 3)
        assert labels.dtype == np.int32
    images, labels = as_written(batches, name, [test])
    np.testing.assert_array_equal(data.test[0], images)
    np.testing.assert_array_equal(data.test[1], labels)
    # No training image is lost, none comes twice.
    both = map(np.concatenate, zip(data.train, data.held_out, strict=True))
    assert multiset(*both) == multiset(*as_written(batches, name, training))


def test_images_are_the_right_way_up(tmp_path):
    image = np.zeros([3, 32, 32], np.uint8)
    image[0, 0, 31] = 200  # Red in the upper right corner.
    image[1, 31, 0] = 150  # Green in the lower left corner.
    image[2, 3, 7] = 100

    def change(batches):
        batches["test_batch"][b"data"][4] = image.reshape(-1)

    write_archive(tmp_path, "cifar10", change=change)
    found = load(tmp_path).test[0][4]
    expected = np.zeros([32, 32, 3], np.uint8)
    expected[0, 31] = [200, 0, 0]
    expected[31, 0] = [0, 150, 0]
    expected[3, 7] = [0, 0, 100]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_split_is_stratified(name, tmp_path):
    write_archive(tmp_path, name, count=500)
    classes, total = CLASSES[name], 500 * len(MEMBERS[name][1:])
    data = load(tmp_path, name, held_out=2 * classes)
    assert (np.bincount(data.held_out[1], minlength=classes) == 2).all()
    rest = total // classes - 2
    assert (np.bincount(data.train[1], minlength=classes) == rest).all()
    assert_identical(load(tmp_path, name, held_out=2 * classes), data)


def test_a_class_is_told_by_its_mean(tmp_path):
    write_archive(tmp_path, "cifar10")
    data = load(tmp_path)
    images, labels = data.train
    means = np.stack([images[labels == c].mean(0) for c in range(10)])
    distance = np.square(data.test[0][:, None] - means).sum((2, 3, 4))
    assert (distance.argmin(1) == data.test[1]).mean() > 0.9


# Errors.


def test_unknown_name(tmp_path):
    with says(ValueError, "'cifar10', 'cifar100'", "'mnist'"):
        _cifar.load(tmp_path, "mnist")


@pytest.mark.parametrize("name", NAMES)
def test_missing_archive(name, tmp_path):
    address = f"https://www.cs.toronto.edu/~kriz/{ARCHIVES[name]}"
    with says(FileNotFoundError, str(tmp_path / ARCHIVES[name]), address):
        _cifar.load(tmp_path, name)


@pytest.mark.parametrize("name", NAMES)
def test_checksums_refuse_another_archive(name, tmp_path):
    path = write_archive(tmp_path, name)
    md5 = {
        "cifar10": "c58f30108f718f92721af3b95e74349a",
        "cifar100": "eb9058c3a382ffc7106e4002c42a8d85",
    }
    size = f"{path.stat().st_size:,} bytes"
    again = f"Download https://www.cs.toronto.edu/~kriz/{path.name} again"
    with says(ValueError, str(path), md5[name], size, again):
        _cifar.load(tmp_path, name)


@pytest.mark.parametrize("held_out", [1, 9, 491, 5000])
def test_impossible_split(held_out, tmp_path):
    write_archive(tmp_path, "cifar10")
    with says(ValueError, "[10, 490]", str(held_out)):
        load(tmp_path, held_out=held_out)


def corrupt(packed):
    middle = len(packed) // 2
    return packed[:middle] + bytes([packed[middle] ^ 1]) + packed[middle + 1 :]


def cut_tar(packed):
    content = gzip.decompress(packed)
    return gzip.compress(content[: len(content) // 2], compresslevel=1)


@pytest.mark.parametrize(
    "damage, cause",
    {
        "cut gzip": (lambda packed: packed[: len(packed) // 2], EOFError),
        "cut tar": (cut_tar, tarfile.ReadError),
        "wrong bit": (corrupt, (zlib.error, gzip.BadGzipFile)),
        "page": (lambda packed: b"<html>Not found</html>", gzip.BadGzipFile),
        "empty": (lambda packed: b"", (EOFError, tarfile.ReadError)),
        "no tar": (lambda packed: gzip.compress(b"text"), tarfile.ReadError),
    }.values(),
)
def test_damaged_archive(damage, cause, tmp_path):
    path = write_archive(tmp_path, "cifar10")
    path.write_bytes(damage(path.read_bytes()))
    size = f"{path.stat().st_size:,} bytes"
    with says(ValueError, str(path), size, "Download it again") as caught:
        load(tmp_path)
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize("member", ["data_batch_2", "test_batch"])
def test_missing_member(member, tmp_path):
    path = write_archive(tmp_path, "cifar10", change=lambda all_: all_.pop(member))
    with says(ValueError, str(path), f"no member cifar-10-batches-py/{member}"):
        load(tmp_path)


def entry(key, value):
    def change(batches):
        batches["data_batch_2"][key] = value

    return change


def content(value):
    def change(batches):
        batches["data_batch_2"] = value

    return change


def cut_pickle(batches):
    batches["data_batch_2"] = python2(batches["data_batch_2"])[:-1000]


@pytest.mark.parametrize(
    "change, cause",
    {
        "cut": (cut_pickle, (pickle.UnpicklingError, EOFError)),
        "empty": (content(b""), EOFError),
        "text": (content(b"no pickle"), pickle.UnpicklingError),
        "list": (content([1, 2]), TypeError),
        "no data": (content({b"labels": [0]}), KeyError),
        "no labels": (content({b"data": np.zeros([1, 3072], np.uint8)}), KeyError),
        "ragged": (entry(b"labels", [[1], [2, 3]]), ValueError),
    }.values(),
)
def test_other_content(change, cause, tmp_path):
    path = write_archive(tmp_path, "cifar10", change=change)
    with says(ValueError, str(path), BAD, "b'data'", "b'labels'") as caught:
        load(tmp_path)
    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize(
    "change, said",
    {
        "width": (entry(b"data", np.zeros([100, 3000], np.uint8)), "uint8 [100, 3000]"),
        "axes": (entry(b"data", np.zeros([100, 3072, 1], np.uint8)), "[100, 3072, 1]"),
        "dtype": (entry(b"data", np.zeros([100, 3072], np.int8)), "int8 [100, 3072]"),
        "fewer labels": (entry(b"labels", [0] * 99), "int64 [99]"),
        "more axes": (entry(b"labels", [[0]] * 100), "int64 [100, 1]"),
        "floats": (entry(b"labels", [0.5] * 100), "float64 [100]"),
        "text": (entry(b"labels", b"frog"), "|S4 []"),
        "negative": (entry(b"labels", [0] * 99 + [-1]), "[0, 10), got -1"),
        "too large": (entry(b"labels", [0] * 99 + [10]), "[0, 10), got 10"),
    }.values(),
)
def test_unexpected_arrays(change, said, tmp_path):
    path = write_archive(tmp_path, "cifar10", change=change)
    with says(ValueError, str(path), BAD, said):
        load(tmp_path)


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "function, args",
    [
        (os.system, ["echo > {}"]),
        (eval, ["open({!r}, 'w')"]),
        (getattr, [np.ndarray, "tofile"]),
    ],
)
def test_pickles_run_no_code(function, args, protocol, tmp_path):
    trace = tmp_path / "trace"
    args = [x.format(trace) if isinstance(x, str) else x for x in args]
    pickled = pickle.dumps({b"data": Call(function, *args), b"labels": []}, protocol)
    write_archive(tmp_path, "cifar10", change=content(pickled))
    refused = f"{function.__name__} is not admitted"
    with says(ValueError, BAD, refused) as caught:
        load(tmp_path)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not trace.exists()


# Normalization and augmentation.


def some_images(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, [count, 32, 32, 3], dtype=np.uint8)


def test_statistics_and_normalization():
    # Channels that differ.
    images = some_images(50) // np.array([1, 2, 5], np.uint8)
    mean, std = _cifar.statistics(images)
    assert mean.dtype == std.dtype == np.float32
    assert_close(mean, np.float32((images / 255).mean((0, 1, 2))))
    assert_close(std, np.float32((images / 255).std((0, 1, 2))))

    other = some_images(3, seed=1)
    found = jax.jit(_cifar.normalize)(other, mean, std)
    assert found.dtype == jnp.float32
    assert_close(np.asarray(found), (other / 255 - mean) / std, rtol=1e-4, atol=1e-5)


def windows(image):
    """All 81 crops of a padded image, and their mirror images, by their bytes."""
    padded = np.zeros([40, 40, 3], image.dtype)
    padded[4:36, 4:36] = image
    found = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 32, left : left + 32]
            found[crop.tobytes()] = top, left, False
            found[crop[:, ::-1].tobytes()] = top, left, True
    return found


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_augmentation_crops_and_flips(wrap):
    images = jax.random.normal(jax.random.key(0), [4, 32, 32, 3])
    found = wrap(_cifar.augment)(jax.random.key(1), images)
    assert found.dtype == images.dtype and found.shape == images.shape
    for image, augmented in zip(np.asarray(images), np.asarray(found), strict=True):
        assert augmented.tobytes() in windows(image)


def test_augmentation_draws_for_each_image_and_key():
    image = jax.random.normal(jax.random.key(0), [32, 32, 3])
    possible = windows(np.asarray(image))
    assert len(possible) == 162
    images = jnp.broadcast_to(image, [600, 32, 32, 3])
    augment = jax.jit(_cifar.augment)

    def drawn(seed):
        found = np.asarray(augment(jax.random.key(seed), images))
        return np.array([possible[each.tobytes()] for each in found])

    first = drawn(1)
    np.testing.assert_array_equal(drawn(1), first)
    assert (drawn(2) != first).any(1).mean() > 0.9
    # Five standard deviations of a frequency, for rows, columns and flips.
    for column, count in zip(first.T, [9, 9, 2], strict=True):
        shares = np.bincount(column, minlength=count) / 600
        error = np.sqrt((1 - 1 / count) / count / 600)
        assert (np.abs(shares - 1 / count) < 5 * error).all()
    # Neither says anything about another.
    assert (np.abs(np.corrcoef(first.T) - np.eye(3)) < 5 / np.sqrt(600)).all()
