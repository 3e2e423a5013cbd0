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
from optax_ev3._src.assess.aggregate import host_metric
from optax_ev3._src.assess.chunks import in_chunks
from optax_ev3._src.assess.held_out import held_out
from optax_ev3._src.assess.minimize import minimize
from optax_ev3._src.ev3 import ev3
from optax_ev3._src.explore.evolve import evolve, found_schedule, log_uniform, uniform
from optax_ev3._src.explore.explorers import Explorer, explorer, product, sweep
from optax_ev3._src.history.progress import credit, should_grow, stalled
from optax_ev3._src.history.record import (
    EV3State,
    ExplorerState,
    history,
    stable_params,
    summary,
)
from optax_ev3._src.keep_params import keep_params

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
