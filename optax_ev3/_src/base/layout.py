"""Which candidates there are, and where: the only place that counts them.

Dimensions: ``K`` explorers, those of sweeps counted one by one, ``C`` candidates.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from optax_ev3._src.base import sharding

# Names of the two candidates that are always there.
CURRENT, STABLE = "current", "stable"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The candidates in their order, known before anything is traced.

    First the K explorers, then their averages, K of each kind, then ``current`` and
    ``stable``.

    Attributes:
      members: By the name of an explorer, the names of those it stands for.
      single: By the name of an explorer, whether it is no sweep: its arrays are not
        stacked.
      prefixes: What stands before the names of averages, by kind.
    """

    members: Mapping[str, Sequence[str]]
    single: Mapping[str, bool]
    prefixes: Sequence[str] = ()

    @property
    def explorers(self) -> int:
        """K, how many explorers there are."""
        return sum(map(len, self.members.values()))

    @property
    def kinds(self) -> int:
        """How many candidates each explorer has: itself and its averages."""
        return 1 + len(self.prefixes)

    @property
    def proposals(self) -> int:
        """How many candidates come before ``current``."""
        return self.kinds * self.explorers

    @property
    def current(self) -> int:
        """The candidate that are the parameters at the round's start."""
        return self.proposals

    @property
    def stable(self) -> int:
        """The candidate that are the stable parameters."""
        return self.proposals + 1

    @property
    def candidates(self) -> int:
        """C, how many candidates there are."""
        return self.proposals + 2

    @property
    def names(self) -> list[str]:
        """The names of all candidates."""
        names = [name for names in self.members.values() for name in names]
        averages = [f"{prefix}/{name}" for prefix in self.prefixes for name in names]
        return [*names, *averages, CURRENT, STABLE]

    def rows(self, name: str) -> range:
        """Which candidates an explorer's members are."""
        first = 0
        for other, names in self.members.items():
            if other == name:
                return range(first, first + len(names))
            first += len(names)
        raise KeyError(name)

    def stands_for(self, name: str, explorer: jax.Array) -> jax.Array:
        """Whether an explorer, by its index, is one of those that a name stands for."""
        rows = self.rows(name)
        return (explorer >= rows[0]) & (explorer <= rows[-1])

    def all_rows(self, name: str) -> list[int]:
        """Which candidates an explorer's members and their averages are."""
        return [
            kind * self.explorers + row
            for kind in range(self.kinds)
            for row in self.rows(name)
        ]

    def of_explorer(self, explorer: jax.Array) -> jax.Array:
        """Which candidates one explorer and its averages are, by its index."""
        return explorer + self.explorers * jnp.arange(self.kinds)

    def split(self, values: jax.Array) -> dict[str, jax.Array]:
        """Of ``[K, ...]`` the part of each explorer, by name; squeezed if single."""
        return {
            name: values[rows[0]]
            if self.single[name]
            else values[rows[0] : rows[-1] + 1]
            for name in self.members
            for rows in [self.rows(name)]
        }

    def join(self, parts: Mapping[str, jax.Array]) -> jax.Array:
        """``[K, ...]`` from the parts of all explorers, by name."""
        parts = {
            name: sharding.replicated(jnp.asarray(parts[name])) for name in self.members
        }
        return jnp.concatenate(
            [part[None] if self.single[name] else part for name, part in parts.items()]
        )

    def repeat(self, flags: Mapping[str, jax.Array]) -> jax.Array:
        """``[K]`` bool from flags by name, one or ``[G]``; false for those without."""
        return jnp.concatenate(
            [
                jnp.broadcast_to(flags.get(name, False), [len(names)])
                for name, names in self.members.items()
            ]
        )

    def tile(self, flags: jax.Array, others: bool = False) -> jax.Array:
        """``[C]``: flags ``[K]`` for explorers and averages, one for the others."""
        return jnp.append(jnp.tile(flags, self.kinds), jnp.full([2], others))

    def owner(self, candidate: jax.Array) -> jax.Array:
        """The explorer that a candidate is, or is an average of; else K."""
        is_own = candidate < self.proposals
        return jnp.where(is_own, candidate % self.explorers, self.explorers)
