"""Turns of a relay in plain Python, written from what is documented."""

import math


class NearTieError(Exception):
    """Rounding decides: the rest of a case is not compared."""


def below(one, other):
    if one != other and abs(one - other) < 1e-5 * max(abs(one), abs(other)):
        raise NearTieError
    return one < other


def share_of(part, whole, of):
    """Whether ``part`` is at most this share of the whole."""
    limit = of * abs(whole)
    if limit and abs(part - limit) < 1e-5 * limit:
        raise NearTieError
    return part <= limit


def doubled(length):
    """1, 2, 4, ... below the length; 1 if there is none."""
    found = [1]
    while found[-1] * 2 < length:
        found.append(found[-1] * 2)
    return found


class Plain:
    """Who is next, in plain Python."""

    def __init__(self, count, length, racing):
        self.everybody = list(range(count))
        self.length, self.racing = length, racing
        # First turns, and after how many cycles how many are left, halved each time.
        self.stages, self.halvings, left = [], 0, count
        while left > 1:
            left = math.ceil(left / 2)
            self.halvings += 1
        if count > 1:
            self.stages = doubled(length)
            # Then a whole turn, and of half of those who are left twice as much.
            for _ in range(self.halvings - 1):
                self.stages.append(length)
                length *= 2
        self.cycle, self.field = 0, list(self.everybody)
        self.level, self.best = [0.0] * count, 0.0
        self.adopted, self.harmful, self.fell = set(), set(), [0] * count
        self.leader, self.rival = 0, None
        self.gap = self.wait = racing.window if racing else 0
        self.challenges, self.lost, self.standing, self.behind = [0] * count, 0, 0, 0.0

    def able(self):
        return [i for i in self.everybody if i not in self.harmful]

    def best_of(self, some):
        return max(some, key=lambda i: (self.level[i], -i))

    def after(self, who, gain, stderr, moved, adopted, finite):
        """Who is next, for how many calls, and whether from where the leader is."""
        stands = share_of(abs(gain), self.best, 1e-4)
        self.note(who, gain, stderr, moved, adopted, finite)
        if self.cycle < len(self.stages):
            following, joins = self.first_turns(who), False
        else:
            following, joins = self.later(who, stands)
        return following, [*self.stages, self.length][self.cycle], joins

    def note(self, who, gain, stderr, moved, adopted, finite):
        before = self.level[who]
        if adopted:
            self.adopted.add(who)
        if finite:
            self.level[who] = self.best + gain
            # Three standard errors; an exact score falls where all progress is undone.
            fall = 3 * stderr if stderr else self.best
            fell = self.level[who] < before - fall
            self.fell[who] = self.fell[who] + 1 if fell else 0
        else:
            self.fell[who] = 2
        if self.fell[who] >= 2 and who not in self.adopted:
            self.harmful.add(who)
            if not self.able():
                self.harmful.clear()  # If all are harmful, all go on.
        self.best += moved

    def first_turns(self, who):
        self.field = [i for i in self.field if i not in self.harmful] or self.able()
        left = [i for i in self.field if i > who]
        if left:
            return left[0]
        self.cycle += 1
        by_level = sorted(self.field, key=lambda i: (-self.level[i], i))
        if self.cycle == len(self.stages):
            by_level = by_level[:1]
        elif self.cycle > len(self.stages) - self.halvings:
            by_level = by_level[: math.ceil(len(by_level) / 2)]
        self.field = sorted(by_level)
        self.leader = self.field[0]
        return self.field[0]

    def later(self, who, stands):
        if self.racing is None or len(self.everybody) == 1:
            return self.alive(self.leader), False
        is_leader = who == self.leader
        if is_leader:
            self.standing = self.standing + 1 if stands else 0
        still = self.standing >= 2
        if self.rival is not None:
            if not is_leader:
                if self.rival in self.harmful:
                    self.end_challenge(still)
                return self.leader, False
            return self.decided(still), False
        self.leader = self.alive(self.leader)
        if is_leader:
            self.wait -= 1
            others = [i for i in self.able() if i != self.leader]
            if len(set(self.level)) == 1:
                others = []  # Scores that say nothing leave the first one in the lead.
            if others and (self.wait <= 0 or still):
                return self.challenge(others, still)
        return self.leader, False

    def alive(self, leader):
        """The leader, or who takes its place if it is harmful."""
        self.leader = self.best_of(self.able()) if leader in self.harmful else leader
        return self.leader

    def challenge(self, others, still):
        fewest = min(self.challenges[i] for i in others)
        others = [i for i in others if self.challenges[i] == fewest]
        self.rival = self.best_of(others)
        self.challenges[self.rival] += 1
        self.lost = 0
        far = below(self.level[self.rival], self.best - 0.05 * abs(self.best))
        joins = far and self.challenges[self.rival] > 1 and not still
        self.behind = 0.0 if joins else self.best - self.level[self.rival]
        return self.rival, joins

    def decided(self, still):
        """Both have had a turn: who is next."""
        behind = self.level[self.leader] - self.level[self.rival]
        if behind < 0 or self.leader in self.harmful:
            self.leader, self.standing = self.rival, 0
            self.end_challenge(still)
            return self.leader
        self.lost = 0 if behind < self.behind / 2 else self.lost + 1
        self.behind = behind
        if self.lost >= self.racing.patience:
            self.end_challenge(still)
            return self.leader
        return self.rival

    def end_challenge(self, still):
        self.rival = None
        if not still:
            self.gap *= 2
        self.wait = self.gap
