"""EV3 (explore, assess, adapt) as one optax gradient transformation."""

from optax_ev3 import (
    adapt,
    combine,
    distillation,
    evidence,
    explore,
    growth,
    metrics,
)
from optax_ev3._src.assess import in_chunks
from optax_ev3._src.composer import ev3
from optax_ev3._src.evolve import evolve, found_schedule, log_uniform, uniform
from optax_ev3._src.explore import Explorer, explorer, product, sweep
from optax_ev3._src.figures import host_metric
from optax_ev3._src.held_out import held_out
from optax_ev3._src.keep_params import keep_params
from optax_ev3._src.minimize import minimize
from optax_ev3._src.progress import credit, should_grow, stalled
from optax_ev3._src.record import (
    EV3State,
    ExplorerState,
    history,
    stable_params,
    summary,
)

__version__ = "0.1.0"

__all__ = [
    "EV3State",
    "Explorer",
    "ExplorerState",
    "adapt",
    "combine",
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
    "metrics",
    "minimize",
    "product",
    "should_grow",
    "stable_params",
    "stalled",
    "summary",
    "sweep",
    "uniform",
]
