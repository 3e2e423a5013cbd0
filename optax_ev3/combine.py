"""Combined candidates: averages of parameters, at no gradient cost."""

from optax_ev3._src.combine import (
    exponential_average,
    greedy_soup,
    trajectory_average,
)

__all__ = ["exponential_average", "greedy_soup", "trajectory_average"]
