"""Unlike optimizers in one stack, each member with one of them.

The loss is then in the program once, and not once for each kind of optimizer, and the
members can be spread over devices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_ev3._src.base import callbacks, control, trees
from optax_ev3._src.explore import packing
from optax_ev3._src.explore.explorers import Explorer

# Room for the states of all members, over what they use: more is not worth it.
_MOST_ROOM = 1.5
# Parameters to try optimizers with; some treat matrices, or large ones, their own way.
_PROBE = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {"large": (256, 256), "small": (3, 4), "vector": (4,)}.items()
}


@dataclasses.dataclass(frozen=True, eq=False)
class Unlike:
    """The factory of a stack of unlike optimizers.

    Attributes:
      explorers: By name, of each kind one, or alike ones stacked.
      known: What their states consist of, by the types of parameters: it takes time to
        find out, and is asked for at each step.
    """

    explorers: Mapping[str, Explorer]
    known: dict[Any, dict[str, packing.Form]] = dataclasses.field(default_factory=dict)

    def __call__(self, row: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer in this row, whose states are :class:`packing.Packed`."""
        optimizers, firsts, first = {}, [], 0
        for name, one in self.explorers.items():
            size = len(one.rows)
            # The row may be that of another kind, where all of them are computed.
            own = jnp.clip(row - first, 0, size - 1)
            optimizers[name] = one.tx if one.size is None else one.member(own)[0]
            firsts.append(first)
            first += size
        # A sum, as rows may be on several devices.
        kind = sum(row >= first for first in firsts[1:])

        def init(params: optax.Params) -> packing.Packed:
            made = packing.Packing(optimizers, self._forms(params), params)
            return control.switch(kind, [made.first(name) for name in optimizers])

        def update(
            updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
        ) -> tuple[optax.Updates, packing.Packed]:
            made = packing.Packing(optimizers, self._forms(params), params)
            steps = [made.step(k, updates, state, extra_args) for k in optimizers]
            return control.switch(kind, steps)

        return optax.GradientTransformationExtraArgs(init, update)

    def forms(self, params: optax.Params) -> list[packing.Form]:
        """What the state of each member consists of."""
        found = self._forms(params)
        return [found[k] for k, one in self.explorers.items() for _ in one.rows]

    def _forms(self, params: optax.Params) -> dict[str, packing.Form]:
        """The same of each kind."""
        leaves, structure = jax.tree.flatten(params)
        key = structure, tuple(map(jax.typeof, leaves))
        if key not in self.known:
            self.known[key] = {
                name: packing.form_of(one.tx, params)
                for name, one in self.explorers.items()
            }
        return self.known[key]


def joined(explorers: Mapping[str, Explorer]) -> Explorer:
    """Explorers with the same loss as one stack.

    Args:
      explorers: By name, of each kind one, or alike ones stacked.
    """
    factory = Unlike(explorers)
    members = [label for name, one in explorers.items() for label in one.members(name)]
    return next(iter(explorers.values()))._replace(
        tx=factory(0),
        name=None,
        grid={"row": tuple(range(len(members)))},
        factory=factory,
        labels=tuple(members),
        forms=factory.forms,
    )


def worth_it(explorers: Mapping[str, Explorer]) -> dict[str, Explorer]:
    """Those whose states have about the same size: each gets the room of all."""
    group = dict(explorers)
    sizes = {name: _bytes(_state(one)) for name, one in group.items()}
    while len(group) > 1:
        whole = joined(group)
        used = sum(len(one.rows) * sizes[name] for name, one in group.items())
        if len(whole.rows) * _bytes(_state(whole)) <= _MOST_ROOM * used:
            break
        del group[max(group, key=lambda name: sizes[name])]
    return group


def can_be_joined(explorer: Explorer) -> bool:
    """Whether an optimizer takes gradients alone, and its state keeps its types.

    One that cannot be tried here, such as one for parameters of a certain structure, is
    left alone; so is one that needs the value of the loss, and a group that evolves.
    """
    if explorer.space is not None or callbacks.free(explorer.tx.update, 3).names:
        return False

    def first_step(params: Any) -> Any:
        state = explorer.tx.init(params)
        return state, explorer.tx.update(params, state, params)[1]

    try:
        before, after = jax.eval_shape(first_step, _PROBE)
    except Exception:  # Whatever it is: apart, it raises where it is used.
        return False
    return trees.types(before) == trees.types(after)


def _state(explorer: Explorer) -> Any:
    return jax.eval_shape(explorer.tx.init, _PROBE)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
