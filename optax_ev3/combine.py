"""Combined candidates: averages of parameters, at no gradient cost."""

from optax_ev3._src.explore.averages import branch_average, trajectory_average

__all__ = ["branch_average", "trajectory_average"]
