"""For Flax Linen: models that grow."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn

from optax_ev3._src.applications.parameter_mapping import Growth
from optax_ev3.models import _sizes

__all__ = ["MLP", "ResNet"]

_HE = nn.initializers.he_normal()


class MLP(nn.Module):
    """A multilayer perceptron with ReLUs: inputs ``[n, ...]``, logits ``[n, classes]``.

    Attributes:
      features: Widths of the hidden layers.
      classes: Number of outputs.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_ev3 import growth
      >>> from optax_ev3.models import linen
      >>> model, x = linen.MLP((8,), classes=3), jnp.ones([2, 4])
      >>> params = model.init(jax.random.key(0), x)
      >>> model, how = model.deepen()
      >>> fresh = model.init(jax.random.key(1), x)
      >>> params = growth.transplant(params, fresh, how)
      >>> model.features, model.apply(params, x).shape
      ((8, 8), (2, 3))
    """

    features: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Logits; training and inference are the same."""
        del train
        x = x.reshape([x.shape[0], -1])
        for i, width in enumerate(self.features, 1):
            x = nn.relu(nn.Dense(width, kernel_init=_HE, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)

    def deepen(self) -> tuple["MLP", Growth]:
        """One more hidden layer behind the last, as wide, at first the identity.

        Raises:
          ValueError: If there is no hidden layer yet: inputs may be negative.
        """
        features, growth = _sizes.deeper_mlp(self.features)
        return self.clone(features=features), growth

    def widen(self, factor: int = 2) -> tuple["MLP", Growth]:
        """All hidden layers wider.

        Args:
          factor: How many times, at least 2.

        Raises:
          ValueError: If there is no hidden layer, or ``factor`` is below 2.
        """
        features = _sizes.wider_mlp(self.features, factor)
        return self.clone(features=features), Growth()


class ResNet(nn.Module):
    """A residual network for small images, as for CIFAR.

    Inputs are ``[n, height, width, channels]``, logits ``[n, classes]``. Behind a
    convolution of 3x3, each stage halves height and width, except the first, and
    doubles the channels; a block has two convolutions of 3x3, each with BatchNorm, and
    the first one of a stage a projection around it. With ``b`` blocks in each of three
    stages it has 6b+2 layers.

    Attributes:
      blocks: Blocks of each stage.
      classes: Number of outputs.
      filters: Channels of the first stage.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from optax_ev3.models import linen
      >>> model = linen.ResNet(blocks=(1, 1, 1), classes=100)  # ResNet-8
      >>> init = lambda: model.init(jax.random.key(0), jnp.ones([1, 32, 32, 3]))
      >>> shapes = jax.eval_shape(init)["params"]
      >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
      83892

    References:
      He et al., `Deep Residual Learning <https://arxiv.org/abs/1512.03385>`_, 2016,
      section 4.2.
    """

    blocks: Sequence[int]
    classes: int
    filters: int = 16

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        """Logits; where ``train``, by the batch's own statistics."""
        x = _conv(self.filters, 3, 1, "conv")(x)
        x = nn.relu(_norm(train, "norm")(x))
        for name, (stage, block) in _sizes.block_names(self.blocks).items():
            filters, stride = _sizes.shape_of_block(stage, block, self.filters)
            x = _Block(filters, stride, name=name)(x, train)
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))

    def deepen(
        self, stage: int | None = None, count: int = 1
    ) -> tuple["ResNet", Growth]:
        """More blocks at the end of stages, which at first let everything pass.

        Args:
          stage: Which one, from 1; None for all.
          count: How many blocks more in each of them.

        Raises:
          ValueError: If there is no such stage, or ``count`` is below 1.
        """
        blocks = _sizes.deeper(self.blocks, stage, count)
        growth = _sizes.deeper_growth(self.blocks, blocks)
        return self.clone(blocks=blocks), growth

    def widen(self, factor: int = 2) -> tuple["ResNet", Growth]:
        """More channels everywhere.

        Args:
          factor: How many times, at least 2.
        """
        return self.clone(filters=_sizes.wider(self.filters, factor)), Growth()


class _Block(nn.Module):
    """Two convolutions, with the identity or a projection around them."""

    filters: int
    stride: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        y = _conv(self.filters, 3, self.stride, "conv_1")(x)
        y = nn.relu(_norm(train, "norm_1")(y))
        y = _norm(train, "norm_2")(_conv(self.filters, 3, 1, "conv_2")(y))
        if x.shape != y.shape:
            x = _conv(self.filters, 1, self.stride, "projection")(x)
            x = _norm(train, "norm_projection")(x)
        return nn.relu(x + y)


def _conv(filters: int, size: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(
        filters,
        (size, size),
        (stride, stride),
        use_bias=False,
        kernel_init=_HE,
        name=name,
    )


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
