"""Scikit-learn's digits, split by a seed, shared by the examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
    """Images ``[n, 64]`` float32 in [0, 1] and labels ``[n]`` int32, three times."""

    train: tuple[jax.Array, jax.Array]  # 1,047 examples, for gradients
    held_out: tuple[jax.Array, jax.Array]  # 300, for EV3's assessments
    test: tuple[jax.Array, jax.Array]  # 450, for nothing but the final results


def load(seed: int = 0) -> Digits:
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        x, y, test_size=450, stratify=y, random_state=seed
    )
    x, x_held_out, y, y_held_out = train_test_split(
        x, y, test_size=300, stratify=y, random_state=seed
    )

    def arrays(x, y):
        return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y, jnp.int32)

    return Digits(arrays(x, y), arrays(x_held_out, y_held_out), arrays(x_test, y_test))


def sample(key: jax.Array, data: tuple[jax.Array, jax.Array], size: int = 128):
    """A batch of independent draws from ``data``, for use under ``jit``."""
    x, y = data
    index = jax.random.randint(key, [size], 0, len(y))
    return x[index], y[index]
