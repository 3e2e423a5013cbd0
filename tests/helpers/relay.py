"""A relay by hand: optimizers alone, averages and decisions in NumPy."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import optax

from helpers.trajectories import data, loss, score, start
from helpers.turns import Plain

HELD = data(999)
gradient = jax.jit(jax.grad(loss))
_scores = jax.jit(lambda params: score(params, HELD))


def assess(params):
    """Scores on data that stay the same."""
    return score(params, HELD)


@functools.cache
def _stepper(tx):
    """One step of an optimizer alone, whose update is scaled."""

    @jax.jit
    def step(w, state, batch, factor):
        updates, state = tx.update(jax.grad(loss)(w, batch), state, w)
        updates = jax.tree.map(lambda u: u * factor, updates)
        return optax.apply_updates(w, updates), state

    return step


def mixed(mean, new, past):
    """An average that goes on, and what its past weighs."""

    def move(m, n):
        return np.float32(past) * np.asarray(m) + np.float32(1 - past) * np.asarray(n)

    return jax.tree.map(move, mean, new)


class ByHand:
    """A relay of some optimizers, call by call.

    Args:
      inner: Optimizers.
      length: Calls in a turn.
      racing: As that of the relay.
      changed: What the caller does to the visible parameters after each call.
      poisoned: Calls whose gradients are not finite.
      factor: Of all updates, by calls before.
      decay: Of the branches' averages.
    """

    def __init__(
        self,
        inner,
        length,
        racing,
        *,
        changed=None,
        poisoned=(),
        factor=None,
        decay=0.99,
    ):
        self.inner = list(inner)
        self.changed = changed or (lambda params: params)
        self.poisoned, self.factor, self.decay = set(poisoned), factor, decay
        self.plain = Plain(len(self.inner), length, racing)
        w = start()
        self.branches = [self.begun(tx, w) for tx in self.inner]
        self.best, self.who, self.step, self.calls = w, 0, 0, 0
        self.length = [*self.plain.stages, length][0]
        self.lengths, self.means, self.owners = [], [], []
        self.joined = self.begun_anew = 0

    def begun(self, tx, w):
        return SimpleNamespace(w=w, state=tx.init(w), turn=w, branch=w, age=0)

    def call(self):
        """The visible parameters after a call."""
        at_work = self.branches[self.who]
        is_poisoned = self.calls in self.poisoned
        if not is_poisoned:
            self.advance(at_work, self.inner[self.who])
        self.step, self.calls = self.step + 1, self.calls + 1
        if is_poisoned or self.step == self.length:
            self.end_turn(is_poisoned)
        visible = self.branches[self.who]
        visible.w = self.changed(visible.w)
        return visible.w

    def advance(self, one, tx):
        factor = 1.0 if self.factor is None else self.factor(self.calls)
        step = _stepper(tx)
        one.w, one.state = step(one.w, one.state, data(self.calls), np.float32(factor))
        one.age += 1
        # Of five steps, one enters the averages; and the last one.
        if self.step % 5 == 4 or self.step == self.length - 1:
            before, ever = self.step // 5, (one.age - 1) // 5
            one.turn = mixed(one.turn, one.w, before / (before + 1))
            past = min(ever / (ever + 1), self.decay**5)
            one.branch = mixed(one.branch, one.w, past)

    def end_turn(self, is_poisoned):
        who = self.branches[self.who]
        candidates = [who.w, who.turn, who.branch, self.best]
        values = np.stack([np.asarray(_scores(c), np.float64) for c in candidates])
        mean = values.mean(1)
        own, adopted = int(np.argmax(mean[:3])), int(np.argmax(mean))
        difference = values[own] - values[-1]
        stderr = difference.std(ddof=1) / np.sqrt(len(difference))
        self.lengths.append(self.step)
        self.means.append(mean)
        self.owners.append(self.who)
        self.best = candidates[adopted]
        following, self.length, joins = self.plain.after(
            self.who,
            difference.mean(),
            stderr,
            mean[adopted] - mean[-1],
            adopted < 3,
            True,
        )
        # In a turn without any step the branch is where gradients are not finite.
        if is_poisoned and self.step == 1 and adopted == 3:
            self.begun_anew += 1
            self.branches[self.who] = self.begun(self.inner[self.who], self.best)
        if joins:
            self.joined += 1
            leader, one = self.branches[self.plain.leader], self.branches[following]
            # The inner state is the leader's where it is of the same kind.
            same = jax.tree.structure(leader.state) == jax.tree.structure(one.state)
            copy = SimpleNamespace(**vars(leader))
            copy.state = leader.state if same else one.state
            self.branches[following] = copy
        self.who, self.step = following, 0
        # The average over a turn begins with it.
        coming = self.branches[self.who]
        coming.turn = coming.w
