"""Growth: models that become larger while they train."""

from optax_ev3._src.growth import Grown, grow
from optax_ev3._src.placement import Growth, transplant

__all__ = ["Grown", "Growth", "grow", "transplant"]
