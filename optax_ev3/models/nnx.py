"""For Flax NNX: models that grow, those of :mod:`optax_ev3.models.linen`."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from optax_ev3._src.applications.parameter_mapping import Growth
from optax_ev3.models import _sizes

__all__ = ["MLP", "ResNet"]

_HE = nnx.initializers.he_normal()


class MLP(nnx.Module):
    """A multilayer perceptron with ReLUs: inputs ``[n, ...]``, logits ``[n, classes]``.

    Args:
      inputs: Number of inputs of an example.
      features: Widths of the hidden layers.
      classes: Number of outputs.
      rngs: For the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx as flax_nnx
      >>> from optax_ev3.models import nnx
      >>> model = nnx.MLP(4, (8,), classes=3, rngs=flax_nnx.Rngs(0))
      >>> model, how = model.deepen(rngs=flax_nnx.Rngs(1))
      >>> model.features, model(jnp.ones([2, 4])).shape
      ((8, 8), (2, 3))
    """

    def __init__(
        self, inputs: int, features: Sequence[int], classes: int, *, rngs: nnx.Rngs
    ):
        self.inputs: int = inputs
        self.features: tuple[int, ...] = tuple(features)
        self.classes: int = classes
        for i, width in enumerate(features, 1):
            layer = nnx.Linear(inputs, width, kernel_init=_HE, rngs=rngs)
            setattr(self, f"hidden_{i}", layer)
            inputs = width
        self.head: nnx.Linear = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits."""
        x = x.reshape([x.shape[0], -1])
        for i in range(1, len(self.features) + 1):
            x = nnx.relu(getattr(self, f"hidden_{i}")(x))
        return self.head(x)

    def deepen(self, *, rngs: nnx.Rngs) -> tuple["MLP", Growth]:
        """A new model with one more hidden layer, and how this one lies in it.

        Args:
          rngs: For the new model's parameters.

        Raises:
          ValueError: If there is no hidden layer yet: inputs may be negative.
        """
        features, growth = _sizes.deeper_mlp(self.features)
        return MLP(self.inputs, features, self.classes, rngs=rngs), growth

    def widen(self, factor: int = 2, *, rngs: nnx.Rngs) -> tuple["MLP", Growth]:
        """A new model with wider hidden layers, and how this one lies in it.

        Args:
          factor: How many times, at least 2.
          rngs: For the new model's parameters.

        Raises:
          ValueError: If there is no hidden layer, or ``factor`` is below 2.
        """
        features = _sizes.wider_mlp(self.features, factor)
        return MLP(self.inputs, features, self.classes, rngs=rngs), Growth()


class ResNet(nnx.Module):
    """A residual network for small images, see :class:`optax_ev3.models.linen.ResNet`.

    Args:
      channels: Of the inputs, ``[n, height, width, channels]``.
      blocks: Blocks of each stage.
      classes: Number of outputs.
      filters: Channels of the first stage.
      rngs: For the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx as flax_nnx
      >>> from optax_ev3.models import nnx
      >>> model = nnx.ResNet(1, (1, 1), classes=3, filters=4, rngs=flax_nnx.Rngs(0))
      >>> model, how = model.deepen(stage=2, rngs=flax_nnx.Rngs(1))
      >>> model.blocks, how.zero
      ((1, 2), ['*stage_2_block_2/norm_2/scale'])
    """

    def __init__(
        self,
        channels: int,
        blocks: Sequence[int],
        classes: int,
        filters: int = 16,
        *,
        rngs: nnx.Rngs,
    ):
        self.channels: int = channels
        self.blocks: tuple[int, ...] = tuple(blocks)
        self.classes: int = classes
        self.filters: int = filters
        self.conv: nnx.Conv = _conv(channels, filters, 3, 1, rngs)
        self.norm: nnx.BatchNorm = _norm(filters, rngs)
        width = filters
        for name, (stage, block) in _sizes.block_names(blocks).items():
            before = width
            width, stride = _sizes.shape_of_block(stage, block, filters)
            setattr(self, name, _Block(before, width, stride, rngs))
        self.head: nnx.Linear = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Logits; by the batch's own statistics after ``train()``."""
        x = nnx.relu(self.norm(self.conv(x)))
        for name in _sizes.block_names(self.blocks):
            x = getattr(self, name)(x)
        return self.head(x.mean(axis=(1, 2)))

    def deepen(
        self, stage: int | None = None, count: int = 1, *, rngs: nnx.Rngs
    ) -> tuple["ResNet", Growth]:
        """A new model with more blocks, and how this one lies in it.

        Args:
          stage: Which one, from 1; None for all.
          count: How many blocks more in each of them.
          rngs: For the new model's parameters.

        Raises:
          ValueError: If there is no such stage, or ``count`` is below 1.
        """
        blocks = _sizes.deeper(self.blocks, stage, count)
        model = ResNet(self.channels, blocks, self.classes, self.filters, rngs=rngs)
        return model, _sizes.deeper_growth(self.blocks, blocks)

    def widen(self, factor: int = 2, *, rngs: nnx.Rngs) -> tuple["ResNet", Growth]:
        """A new model with more channels everywhere, and how this one lies in it.

        Args:
          factor: How many times, at least 2.
          rngs: For the new model's parameters.
        """
        filters = _sizes.wider(self.filters, factor)
        model = ResNet(self.channels, self.blocks, self.classes, filters, rngs=rngs)
        return model, Growth()


class _Block(nnx.Module):
    """Two convolutions, with the identity or a projection around them."""

    def __init__(self, inputs: int, filters: int, stride: int, rngs: nnx.Rngs):
        self.conv_1 = _conv(inputs, filters, 3, stride, rngs)
        self.norm_1 = _norm(filters, rngs)
        self.conv_2 = _conv(filters, filters, 3, 1, rngs)
        self.norm_2 = _norm(filters, rngs)
        self.projects = inputs != filters or stride != 1
        if self.projects:
            self.projection = _conv(inputs, filters, 1, stride, rngs)
            self.norm_projection = _norm(filters, rngs)

    def __call__(self, x: Any) -> Any:
        y = nnx.relu(self.norm_1(self.conv_1(x)))
        y = self.norm_2(self.conv_2(y))
        if self.projects:
            x = self.norm_projection(self.projection(x))
        return nnx.relu(x + y)


def _conv(
    inputs: int, filters: int, size: int, stride: int, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        filters,
        (size, size),
        (stride, stride),
        use_bias=False,
        kernel_init=_HE,
        rngs=rngs,
    )


def _norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, rngs=rngs)
