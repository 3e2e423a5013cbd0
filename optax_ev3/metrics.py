"""Metrics that are no mean of one score for each example."""

from optax_ev3._src.assess.aggregate import AggregateMetric
from optax_ev3._src.assess.metrics import (
    expected_calibration_error,
    f1,
    macro_f1,
    roc_auc,
)

__all__ = ["AggregateMetric", "expected_calibration_error", "f1", "macro_f1", "roc_auc"]
