"""What devices exchange in a program, read from its text.

A program is a set of computations that call each other. Here one has the result bytes
of the collectives in it, on one device: those outside of conditionals take place in
every call, those in conditionals in some calls.
"""

import re
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_BYTES = {"pred": 1}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# An asynchronous collective counts where it is done: its start has its operands, too.
_COLLECTIVE = re.compile(rf" = (.*?) (?:{'|'.join(KINDS)})(?:-done)?\(")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")


class Moved(NamedTuple):
    """Bytes of results, on one device, in one call.

    Attributes:
      always: Of the collectives outside of conditionals.
      at_most: Of these, and in each conditional of the branch with the most.
    """

    always: int
    at_most: int


def moved(text: str) -> Moved:
    """Of a compiled program's text.

    Loops whose number of turns the compiler knows, such as those over layers, count as
    often; others as a conditional, of one turn.
    """
    computations, entry = _computations(text)
    known: dict[str, Moved] = {}

    def of(name: str) -> Moved:
        if name not in known:
            known[name] = _total([of_line(line) for line in computations[name]])
        return known[name]

    def of_line(line: str) -> Moved:
        if loop := _LOOP.search(line):
            turn = _total([of(name) for name in loop.groups()])
            trips = _TRIPS.search(line)
            if trips:
                return Moved(*(int(trips.group(1)) * number for number in turn))
            return turn._replace(always=0)
        branches = _TRUE_FALSE.findall(line)
        if listed := _BRANCHES.search(line):
            branches = re.findall(r"[\w.\-]+", listed.group(1))
        if branches:
            most = max((of(name) for name in branches), key=lambda x: x.at_most)
            return most._replace(always=0)
        if found := _COLLECTIVE.search(line):
            # What it calls is a sum or a maximum of two numbers.
            return Moved(*[_bytes(found.group(1))] * 2)
        return _total([of(name) for name in _CALLS.findall(line)])

    return of(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and which one is the program."""
    found, entry, lines = {}, "", []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found[head.group(2)] = []
            entry = head.group(2) if head.group(1) else entry
        elif " = " in line:
            lines.append(line)
    return found, entry


def _total(parts: list[Moved]) -> Moved:
    return Moved(*(sum(numbers) for numbers in zip(Moved(0, 0), *parts, strict=True)))


def _bytes(types: str) -> int:
    """Of a type, or of a tuple of types, such as ``(f32[8,16]{1,0}, s32[])``."""
    total = 0
    for name, sizes in re.findall(r"\b([a-z]+\d*)\w*\[([\d,]*)\]", types):
        bits = re.search(r"\d+", name)
        size = _BYTES.get(name) or max(1, int(bits.group()) // 8)
        for length in filter(None, sizes.split(",")):
            size *= int(length)
        total += size
    return total
