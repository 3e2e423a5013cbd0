"""What devices exchange in a call, in bytes.

How large the result of each collective is, is in the text of the compiled program. How
often it takes place, in conditionals and loops, too, is in a profile of the call.
"""

import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# An asynchronous collective counts where it is done: its start has its operands, too.
_COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) (?:{'|'.join(KINDS)})(?:-done)?\(",
    re.MULTILINE,
)


def moved(text: str, call: Callable[[], Any], devices: int) -> float:
    """Bytes of the results of all collectives in a call, on one device.

    Args:
      text: Of the compiled program.
      call: Calls it.
      devices: On how many it runs.
    """
    sizes = result_sizes(text)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    return sum(
        sizes.get(event.name, 0) / devices
        for plane in profile.planes
        for line in plane.lines
        for event in line.events
    )


def result_sizes(text: str) -> dict[str, int]:
    """Bytes of the result of each collective, by its name."""
    return {name: _bytes(types) for name, types in _COLLECTIVE.findall(text)}


def _bytes(types: str) -> int:
    """Of a type, or of a tuple of types, such as ``(f32[8,16]{1,0}, pred[])``."""
    total = 0
    for name, lengths in re.findall(r"\b([a-z]+\d*)\w*\[([\d,]*)\]", types):
        bits = re.search(r"\d+", name)
        size = max(1, int(bits.group()) // 8) if bits else 1
        for length in filter(None, lengths.split(",")):
            size *= int(length)
        total += size
    return total
