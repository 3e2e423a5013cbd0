"""Arguments of the transformation: checked, and brought to the form we use."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from optax_ev3._src.adapt.confident import confident
from optax_ev3._src.adapt.farsighted import farsighted
from optax_ev3._src.adapt.rules import greedy
from optax_ev3._src.assess import stage as assess
from optax_ev3._src.base import callbacks
from optax_ev3._src.base.decision import Rule
from optax_ev3._src.explore import explorers as explore
from optax_ev3._src.explore.explorers import Explorer
from optax_ev3._src.explore.one_step import one_step
from optax_ev3._src.explore.strategy import Strategy


def checked_strategy(
    strategy: Any, explorers: Mapping[str, Explorer], has_loss: bool
) -> Strategy:
    """The ``explore`` argument; raises unless it goes with the explorers."""
    if strategy is None:
        strategy = one_step()
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"explore must be a strategy, such as optax_ev3.explore.one_step() or "
            f"optax_ev3.explore.branches(25), got {strategy!r} of type "
            f"{type(strategy).__name__}."
        )
    return strategy.checked(explorers, has_loss)


def checked_rule(
    rule: Any, strategy: Strategy, explorers: Mapping[str, Explorer]
) -> Rule:
    """The ``adapt`` argument; raises unless it is a rule."""
    if rule is None:
        rule = _default_rule(strategy, explorers)
    if not isinstance(rule, Rule):
        raise TypeError(
            "adapt must be a rule, such as optax_ev3.adapt.confident(), got "
            f"{rule!r} of type {type(rule).__name__}."
        )
    for name in rule.objectives:
        explore.check_characters(name, "an objective")
    return rule


def _default_rule(strategy: Strategy, explorers: Mapping[str, Explorer]) -> Rule:
    """What suits the strategy.

    Where explorers start from what is adopted, a harmful choice lasts: the default is
    careful, and where rounds are of one step, it looks further than they do. Where
    explorers go on from where they are, the best one may always be visible.
    """
    if not strategy.restarts:
        return greedy()
    # One that is another explorer after each step makes no progress of its own.
    evolves = any(explorer.space is not None for explorer in explorers.values())
    return farsighted() if strategy.one_step and not evolves else confident()


def check_callbacks(
    assess_fn: Any,
    loss_fn: Callable[..., Any] | None,
    explorers: Mapping[str, Explorer],
) -> None:
    """Raises unless they can be called, and no function is to be both high and low."""
    assess.check(assess_fn, [loss_fn, *(x.loss_fn for x in explorers.values())])
    if loss_fn is not None:
        callbacks.check_callback(loss_fn, "loss_fn")
    explore.check_spaces(explorers)


def check_aux(
    aux: Any,
    explorers: Mapping[str, Explorer],
    callback_fns: Iterable[Callable[..., Any] | None],
) -> None:
    """Raises where ``aux`` is given to ``update``, and nobody takes it.

    Statistics that are lost would stay at their start, unnoticed.
    """
    if aux is None or any(one.merge_fn is not None for one in explorers.values()):
        return
    of_explorers = [(one.loss_fn, 1) for one in explorers.values()]
    of_explorers += [(one.tx.update, 3) for one in explorers.values()]
    for fn, count in [*((fn, 1) for fn in callback_fns), *of_explorers]:
        if fn is not None and "aux" in callbacks.free(fn, count).names:
            return
    raise TypeError(
        "update was given aux=, what a loss computed on the side, and no explorer has "
        "a merge_fn that puts it into the parameters: make each of them "
        "optax_ev3.explorer(tx, merge_fn=...), or leave aux out."
    )


def check_axis(axis: Any, strategy: Strategy) -> None:
    """Raises unless it is the name of an axis, and explorers work at the same time."""
    if axis is None:
        return
    if not isinstance(axis, str):
        raise TypeError(
            f"explorer_axis must be the name of a mesh axis, a string, got {axis!r}."
        )
    if strategy.takes_turns:
        raise ValueError(
            f"explorer_axis={axis!r} spreads explorers that work at the same time, and "
            f"those of explore.relay take turns: take explore.branches."
        )


def check_spread(axis: str | None, explorers: Mapping[str, Explorer]) -> None:
    """Raises unless there is something to spread over the axis, if there is one."""
    if axis is not None and all(one.size is None for one in explorers.values()):
        raise ValueError(
            f"explorer_axis={axis!r} spreads explorers that have the same loss, and "
            f"whose optimizers need no more than a gradient; there are no two of them "
            f"among {', '.join(explorers)}."
        )


def checked_mode(mode: Any, strategy: Strategy) -> str:
    """The ``assess_mode`` argument; raises unless there is such a one."""
    if mode is None:
        # A loop copies each candidate, which matters where all are scored in each call.
        return "unroll" if strategy.one_step else "map"
    if mode not in assess.MODES:
        raise ValueError(f"assess_mode must be one of {assess.MODES}, got {mode!r}.")
    return mode
