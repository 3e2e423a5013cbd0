"""Scikit-learn's digits, split by a seed, shared by the examples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Parts(NamedTuple):
    """Trees of arrays whose first axis is of examples, three times."""

    train: Any  # For gradients.
    held_out: Any  # For EV3's assessments.
    test: Any  # For nothing but the final results.


def load(seed: int = 0) -> Parts:
    """Images ``[n, 64]`` float32 in [0, 1] and labels ``[n]`` int32.

    There are 1,047 examples for training, 300 held-out ones, and 450 to test on.
    """
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        x, y, test_size=450, stratify=y, random_state=seed
    )
    x, x_held_out, y, y_held_out = train_test_split(
        x, y, test_size=300, stratify=y, random_state=seed
    )

    def arrays(x, y):
        return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)

    return Parts(arrays(x, y), arrays(x_held_out, y_held_out), arrays(x_test, y_test))


def sample(key: jax.Array, data: Any, size: int = 128) -> Any:
    """A batch of independent draws from ``data``, for use under ``jit``."""
    index = jax.random.randint(key, [size], 0, len(jax.tree.leaves(data)[0]))
    return jax.tree.map(lambda x: x[index], data)
