"""Sizes of models that grow, and what Linen's and NNX's models share."""

from collections.abc import Sequence

from optax_ev3._src.applications.parameter_mapping import Growth
from optax_ev3._src.base import checks


def deeper(blocks: Sequence[int], stage: int | None, count: int) -> tuple[int, ...]:
    """The blocks of each stage with ``count`` more in one stage, or in all."""
    count = checks.integer(count, "count", 1)
    if stage is None:
        return tuple(size + count for size in blocks)
    stage = checks.integer(stage, "stage")
    if not 1 <= stage <= len(blocks):
        raise ValueError(f"stage must be from 1 to {len(blocks)}, got {stage}.")
    return tuple(s + count * (i == stage) for i, s in enumerate(blocks, 1))


def wider(size: int, factor: int) -> int:
    """A width, multiplied."""
    return size * checks.integer(factor, "factor", 2)


def deeper_mlp(features: Sequence[int]) -> tuple[tuple[int, ...], Growth]:
    """Widths with one more hidden layer, at first the identity."""
    features = (*_hidden(features), features[-1])
    return features, Growth(identity=[f"*hidden_{len(features)}"])


def wider_mlp(features: Sequence[int], factor: int) -> tuple[int, ...]:
    """Widths of the hidden layers, multiplied."""
    return tuple(wider(width, factor) for width in _hidden(features))


def _hidden(features: Sequence[int]) -> Sequence[int]:
    """Widths of hidden layers; raises if there are none."""
    if not features:
        raise ValueError("an MLP without hidden layers cannot grow.")
    return features


def block_names(blocks: Sequence[int]) -> dict[str, tuple[int, int]]:
    """By name of the block, the number of its stage and its own there, from 1."""
    return {
        f"stage_{stage}_block_{block}": (stage, block)
        for stage, size in enumerate(blocks, 1)
        for block in range(1, size + 1)
    }


def shape_of_block(stage: int, block: int, filters: int) -> tuple[int, int]:
    """Channels and stride of a residual block."""
    return filters * 2 ** (stage - 1), 2 if block == 1 and stage > 1 else 1


def deeper_growth(small: Sequence[int], large: Sequence[int]) -> Growth:
    """New residual blocks at first let everything pass."""
    new = block_names(large).keys() - block_names(small).keys()
    return Growth(zero=[f"*{name}/norm_2/scale" for name in sorted(new)])
