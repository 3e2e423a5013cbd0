"""Which branches start the next round from the adopted parameters.

Dimensions: ``K`` explorers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import evidence, select
from optax_ev3._src.base.layout import Layout
from optax_ev3._src.base.select import Stacked
from optax_ev3._src.base.states import ExploreState, RoundInfo
from optax_ev3._src.explore import inner, strategy
from optax_ev3._src.explore.strategy import Context

INNER_STATES = ("keep", "new", "copy")
REFERENCES = ("adopted", "start")

# A branch is shown to be worse where noise would say so with probability 0.00135.
_WORSE = 3.0


@dataclasses.dataclass(frozen=True)
class Restart:
    """Every branch starts from the adopted parameters; others do less.

    Attributes:
      inner_state: What becomes of the inner state of a branch that starts from
        parameters that are not its own: ``"keep"``, ``"new"`` or ``"copy"``.

    Examples:
      >>> from optax_ev3 import explore
      >>> isinstance(explore.worse_than("start"), explore.Restart)
      True
    """

    inner_state: str = "keep"

    def lead(self, adopted: jax.Array, lead: jax.Array, layout: Layout) -> jax.Array:
        """The branch that the visible parameters follow next; K for none."""
        owner = layout.owner(adopted)
        return jnp.where(owner < layout.explorers, owner, lead)

    def restarts(self, info: RoundInfo, lead: jax.Array, layout: Layout) -> jax.Array:
        """Which branches start from the adopted parameters: ``[K]`` bool."""
        del info, lead
        return jnp.ones([layout.explorers], bool)


class Never(Restart):
    """No branch starts anew: independent runs, the best of which is visible."""

    def lead(self, adopted: jax.Array, lead: jax.Array, layout: Layout) -> jax.Array:
        """The adopted branch; where something else is adopted, that stays visible."""
        del lead
        return jnp.minimum(adopted, layout.explorers)

    def restarts(self, info: RoundInfo, lead: jax.Array, layout: Layout) -> jax.Array:
        """The lead branch alone, whose parameters the visible ones are."""
        del info
        return jnp.arange(layout.explorers) == lead


@dataclasses.dataclass(frozen=True)
class WorseThan(Restart):
    """Branches that are shown to be worse than a reference, and non-finite ones.

    Attributes:
      reference: ``"adopted"`` or ``"start"``.
    """

    reference: str = "adopted"

    def restarts(self, info: RoundInfo, lead: jax.Array, layout: Layout) -> jax.Array:
        """Those by a paired test, and the lead branch."""
        rival = info.decision.adopted if self.reference == "adopted" else layout.current
        against = evidence.compare(info.evidence, info.objective, rival)
        worse = (against.z < -_WORSE) | ~info.evidence.valid
        return worse[: layout.explorers] | (jnp.arange(layout.explorers) == lead)


def never(inner_state: str = "keep") -> Restart:
    """Branches go on from where they are: independent runs, the best one visible.

    Where another candidate than a branch is adopted, it stays visible for the next
    round. A paused branch that returns starts from the adopted parameters.

    Args:
      inner_state: What becomes of the inner state of such a branch: ``"keep"``,
        ``"new"``, or ``"copy"`` (the winner's, where its structure is the same, else
        kept).

    Returns:
      For the ``restart`` argument of :func:`optax_ev3.explore.branches`.

    Raises:
      ValueError: If there is no such choice.

    Examples:
      >>> from optax_ev3 import explore
      >>> explore.never()
      Never(inner_state='keep')
    """
    return Never(checked_inner_state(inner_state, "inner_state"))


def worse_than(reference: str, inner_state: str = "keep") -> Restart:
    """Branches start anew from the adopted parameters where they are shown to be worse.

    That is by a paired test at three standard errors, by the main objective. So do
    those that became non-finite.

    Args:
      reference: Worse than what: ``"adopted"``, the candidate adopted in this round, or
        ``"start"``, where the leader was at the round's start: what is slow at first
        has time to catch up; for :func:`optax_ev3.evolve`.
      inner_state: What becomes of the inner state of a branch that starts from
        parameters that are not its own: ``"keep"``, ``"new"``, or ``"copy"`` (the
        winner's, where its structure is the same, else kept).

    Returns:
      For the ``restart`` argument of :func:`optax_ev3.explore.branches`.

    Raises:
      ValueError: If there is no such choice.

    Examples:
      >>> from optax_ev3 import explore
      >>> explore.worse_than("start", inner_state="copy")
      WorseThan(inner_state='copy', reference='start')
    """
    if reference not in REFERENCES:
        raise ValueError(f"reference must be one of {REFERENCES}, got {reference!r}.")
    return WorseThan(checked_inner_state(inner_state, "inner_state"), reference)


def checked_inner_state(inner_state: str, name: str) -> str:
    """The choice; raises if there is no such one."""
    if inner_state not in INNER_STATES:
        raise ValueError(f"{name} must be one of {INNER_STATES}, got {inner_state!r}.")
    return inner_state


def inner_states(
    ctx: Context,
    state: ExploreState,
    restart: Restart,
    visible: optax.Params,
    moved: jax.Array,
    owner: jax.Array,
) -> dict[str, Any]:
    """The inner states of branches that restart: kept, made anew, or copied.

    Args:
      ctx: What the strategy knows.
      state: Where the explorers are.
      restart: What is to become of inner states.
      visible: The adopted parameters.
      moved: ``[K]`` bool, branches that start from others' parameters.
      owner: ``[]``, the explorer that was adopted, or K.

    Returns:
      By name.
    """
    old = strategy.opt_states(state)
    if restart.inner_state == "keep":
        return old
    renewed = {}
    for name, mask in ctx.layout.split(moved).items():
        if restart.inner_state == "new":
            made = inner.init_state(ctx.explorers[name], visible)
        else:
            copy, known = copied(ctx, old, name, owner)
            made = select.spread(copy, ctx.explorers[name].size)
            mask = mask & known
        renewed[name] = select.where_rows(mask, made, old[name])
    return renewed


def copied(
    ctx: Context, opt_states: dict[str, Any], name: str, owner: jax.Array
) -> tuple[Any, jax.Array]:
    """The owner's state for this explorer, and whether it fits.

    Returns:
      The state, and ``[]`` bool; ``[G]`` for the members of a sweep.
    """
    stacks = {k: one.stack(opt_states[k]) for k, one in ctx.explorers.items()}
    types = {other: _member_types(stack) for other, stack in stacks.items()}
    # Unlike members of a stack have states that are packed alike.
    kinds = {
        other: [None] * len(one.rows) if one.forms is None else one.forms(ctx.params)
        for other, one in ctx.explorers.items()
    }
    nobody = Stacked(select.Lazy(lambda: select.row(stacks[name], 0)))
    sources, fits = [], []
    for other, source in stacks.items():
        fit = types[other] == types[name]
        sources += [source] if fit else [nobody] * select.count(source)
        # By owner, for each member of ``name``.
        fits += [[fit and kind == own for own in kinds[name]] for kind in kinds[other]]
    copied = select.pick(owner, [*sources, nobody])
    fits = jnp.asarray([*fits, [False] * len(kinds[name])])[owner]
    return copied, fits[0] if ctx.layout.single[name] else fits


def _member_types(states: Stacked) -> Any:
    """Structure, shapes and dtypes of one of the states."""
    leaves, structure = jax.tree.flatten(states.tree)
    first = 0 if states.size is None else 1
    return structure, [(x.shape[first:], x.dtype) for x in leaves]
