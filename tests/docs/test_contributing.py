"""What CONTRIBUTING.md says of the repository is there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
FOLDERS = ["optax_ev3", "tests", "benchmarks", "docs"]
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def test_files_are_there():
    paths = [f"/{path.relative_to(ROOT)}" for path in FILES]
    names = re.findall(r"[\w./]+\.py\b", TEXT)
    assert len(names) > 50
    assert not [x for x in names if not any(path.endswith(f"/{x}") for path in paths)]


def test_constants_and_functions_are_there():
    code = "\n".join(path.read_text("utf-8") for path in FILES)
    names = set(re.findall(r"`([A-Z_]{3,}|\w*_\w+)`", TEXT)) - {"SUITE"}
    assert {"ALL_RULES", "BOUNDS", "decide_within"} <= names
    defined = set(re.findall(r"^(?:def )?(\w+)\b(?: =|\()", code, re.M))
    assert names - defined - {"rule_state", "optax_ev3"} == set()


def test_targets_are_there():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = re.findall(r"`make ([a-z -]+)", TEXT)
    assert {x for names in named for x in names.split()} <= targets
