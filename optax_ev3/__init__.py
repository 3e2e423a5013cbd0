"""EV3 (explore, assess, adapt) as one optax gradient transformation."""

from optax_ev3 import (
    adapt,
    distillation,
    evidence,
    explore,
    growth,
    metrics,
)
from optax_ev3._src.assess.aggregate import host_metric
from optax_ev3._src.assess.chunks import in_chunks
from optax_ev3._src.assess.held_out import held_out
from optax_ev3._src.assess.minimize import minimize
from optax_ev3._src.base.states import EV3State, ExplorerState
from optax_ev3._src.ev3 import ev3
from optax_ev3._src.explore.evolve import evolve
from optax_ev3._src.explore.explorers import Explorer, explorer, product, sweep
from optax_ev3._src.explore.ranges import log_uniform, uniform
from optax_ev3._src.history.progress import credit, should_grow, stalled
from optax_ev3._src.history.report import (
    best_params,
    history,
    stable_params,
    summary,
)
from optax_ev3._src.history.schedule import found_schedule
from optax_ev3._src.keep_params import keep_params
from optax_ev3._src.memory import memory
from optax_ev3._src.presets import paper, portfolio
from optax_ev3._src.state_shardings import state_shardings

__version__ = "0.2.0"

__all__ = [
    "EV3State",
    "Explorer",
    "ExplorerState",
    "adapt",
    "best_params",
    "credit",
    "distillation",
    "ev3",
    "evidence",
    "evolve",
    "explore",
    "explorer",
    "found_schedule",
    "growth",
    "held_out",
    "history",
    "host_metric",
    "in_chunks",
    "keep_params",
    "log_uniform",
    "memory",
    "metrics",
    "minimize",
    "paper",
    "portfolio",
    "product",
    "should_grow",
    "stable_params",
    "stalled",
    "state_shardings",
    "summary",
    "sweep",
    "uniform",
]
