"""Statistics of arrays: means, z values, levels, resamples. No policy.

Dimensions: ``C`` candidates, ``N`` examples, ``B`` resamples.
"""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special
from jax.scipy.stats import norm

Number = jax.Array | float

# What one exact comparison counts for, as a z value: beyond any critical value in use,
# and finite, so that sums and products of it are too.
CERTAIN = 30.0

# The z values of n coins that all fall alike, p = 2^-n, up to certainty. A table, since
# in float32 the normal quantile of such a p is lost.
_MAX_Z = np.asarray(
    [0.0, *(min(-NormalDist().inv_cdf(0.5**n), CERTAIN) for n in range(1, 661))],
    np.float32,
)

# So many examples prove as much as an exact comparison does.
MANY = len(_MAX_Z)


def paired_difference(one: jax.Array, other: jax.Array) -> jax.Array:
    """One minus the other, zero where that is within 8 units of rounding."""
    difference = one - other
    largest = jnp.maximum(jnp.abs(one), jnp.abs(other))
    rounding = 8 * jnp.finfo(one.dtype).eps * largest
    return jnp.where(jnp.abs(difference) > rounding, difference, 0)


def mask_and_count(
    values: jax.Array, example_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Which of the N examples count, ``[1, N]`` of 1 or 0, and how many, ``[]``."""
    n = values.shape[-1]
    if example_mask is None:
        return jnp.ones([1, n], values.dtype), jnp.asarray(n, values.dtype)
    mask = example_mask.astype(values.dtype)
    return mask[None], example_mask.sum().astype(values.dtype)


def mean_and_stderr(
    values: jax.Array, example_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Over the examples of ``[C, N]``: ``[C]``, ``[C]``, and their number ``[]``.

    Zero and zero where no example counts. Values that do not count are zero.
    """
    mask, n = mask_and_count(values, example_mask)
    mean = values.sum(axis=1) / jnp.maximum(n, 1)
    centred = (values - mean[:, None]) * mask
    # Scaled to at most one before they are squared: huge scores do not overflow.
    scale = jnp.abs(centred).max(axis=1)
    scale = jnp.where(scale > 0, scale, 1)
    squares = jnp.square(centred / scale[:, None]).sum(axis=1)
    variance = squares / jnp.maximum(n - 1, 1)
    return mean, scale * jnp.sqrt(variance / jnp.maximum(n, 1)), n


def deviation(values: jax.Array) -> jax.Array:
    """Standard deviation (ddof 1) along the second axis, zero for one value."""
    _, stderr, n = mean_and_stderr(values)
    return stderr * jnp.sqrt(n)


# Z values.


def z_value(alpha: Number) -> jax.Array:
    """The z value that noise exceeds with probability ``alpha``.

    ``norm.isf`` computes it from 1 - alpha, which float32 rounds for small levels.
    """
    return -special.ndtri(jnp.asarray(alpha, jnp.float32))


def max_z(n: Number) -> jax.Array:
    """The most that n examples can prove: the z value of n coins that fall alike."""
    return jnp.asarray(_MAX_Z)[jnp.clip(jnp.asarray(n, jnp.int32), 0, MANY - 1)]


def t_to_z(mean: jax.Array, stderr: jax.Array, n: Number) -> jax.Array:
    """The z value of a mean of n examples with its standard error; zero if n is 1.

    Wallace's transformation, see :func:`optax_ev3.evidence.compare`.
    """
    freedom = jnp.maximum(n - 1, 1)
    # A larger t is beyond max_z; a standard error of at least this fraction of the mean
    # keeps t finite where all differences are equal.
    floor = jnp.abs(mean) * 1e-6
    t = mean / jnp.where(mean == 0, 1, jnp.maximum(stderr, floor))
    z = jnp.sqrt(freedom * jnp.log1p(t * t / freedom))
    z = z * ((8 * freedom + 1) / (8 * freedom + 3))
    return jnp.where(n < 2, 0, jnp.sign(mean) * jnp.minimum(z, max_z(n)))


# Many rounds.


def spend(alpha: Number, number: Number) -> jax.Array:
    r"""The level of test number t = 1, 2, ...: :math:`6 a / (\pi^2 t^2)`, in sum a.

    Examples:
      >>> from optax_ev3 import evidence
      >>> print([f"{evidence.spend(0.05, t):.4f}" for t in (1, 2, 3)])
      ['0.0304', '0.0076', '0.0034']
    """
    return 6 * alpha / (math.pi * jnp.asarray(number, jnp.float32)) ** 2


def mixture_log_e(total: Number, variance: Number, rho: Number) -> jax.Array:
    r"""Evidence at any time that a sum has a positive mean: a one-sided normal mixture.

    :math:`\ln e = \frac12 \ln \frac{4 \rho}{V + \rho} + \frac{S^2}{2 (V + \rho)} + \ln
    \Phi\left(\frac{S}{\sqrt{V + \rho}}\right)`, for the sum S of terms with variance V
    in all. Where the mean is not positive, it ever exceeds ln(1 / a) with probability a
    at most, however often one looks.

    References:
      Howard et al., `Time-uniform, nonparametric, nonasymptotic confidence sequences
      <https://arxiv.org/abs/1810.08240>`_, 2021, equation 3.6.
    """
    v = variance + rho
    start = 0.5 * jnp.log(4 * rho / v)
    return start + total**2 / (2 * v) + norm.logcdf(total / jnp.sqrt(v))


def best_rho(variance: float, alpha: float = 0.05) -> float:
    """The mixture's scale that is about the best where V is ``variance``."""
    log = 2 * math.log(1 / alpha)
    return variance / (log + math.log1p(log))


# Resamples.


def bootstrap_counts(key: jax.Array, samples: int, n: int) -> jax.Array:
    """Bootstrap counts ``[B, N]`` float32, Poisson distributed with mean 1.

    ``jax.random.poisson`` knows keys of one implementation only.
    """
    uniform = jax.random.uniform(key, [samples, n])
    counts, mass, total = jnp.zeros([samples, n]), math.exp(-1), math.exp(-1)
    for k in range(1, 11):  # More than 10 has probability 1e-8.
        counts += (uniform >= total).astype(counts.dtype)
        mass /= k
        total += mass
    return counts
