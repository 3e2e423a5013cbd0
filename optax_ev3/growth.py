"""Growth: models that become larger while they train."""

from optax_ev3._src.applications.growth import Grown, grow
from optax_ev3._src.applications.parameter_mapping import Growth, transplant

__all__ = ["Grown", "Growth", "grow", "transplant"]
