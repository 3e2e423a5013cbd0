"""Strategies: how explorers are tried, for the ``explore`` argument of ``ev3``."""

from optax_ev3._src.explore.averages import branch_average, trajectory_average
from optax_ev3._src.explore.branches import branches, rounds
from optax_ev3._src.explore.halving import SuccessiveHalving
from optax_ev3._src.explore.one_step import one_step
from optax_ev3._src.explore.racing import Racing
from optax_ev3._src.explore.relay import relay
from optax_ev3._src.explore.restarts import Restart, never, worse_than
from optax_ev3._src.explore.strategy import Strategy

__all__ = [
    "Racing",
    "Restart",
    "Strategy",
    "SuccessiveHalving",
    "branch_average",
    "branches",
    "never",
    "one_step",
    "relay",
    "rounds",
    "trajectory_average",
    "worse_than",
]
