"""Models that grow, in Flax Linen and in Flax NNX."""
