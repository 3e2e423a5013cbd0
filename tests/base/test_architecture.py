"""The layout of the package: what may import what, and how long things may get."""

import ast
import functools
import graphlib
import pathlib

import optax_ev3

PACKAGE = pathlib.Path(optax_ev3.__file__).parent
TESTS = pathlib.Path(__file__).parents[1]

# What lies in ``_src``, from the ground up: each imports only what lies below, or in
# the same package. The stages know nothing of each other.
LEVELS = [
    {"base"},
    {"explore", "assess", "adapt"},
    {"history"},
    {"arguments", "inputs", "keys"},
    {"composer"},
    {"ev3"},
    {"presets", "keep_params", "state_shardings"},
    {"memory", "applications"},
]


@functools.cache
def modules():
    """The syntax tree of each module of the package, by its full name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def lines(name):
    """How many lines the source of a module has."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return len(path.read_text(encoding="utf-8").splitlines())


def imported(tree):
    """The full names of what is imported anywhere in a module, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def edges():
    """For each module of the package those that it imports."""

    def module(name):
        """The module itself, or the one that has this attribute."""
        return name if name in modules() else name.rpartition(".")[0]

    return {
        importer: {
            module(name)
            for name in imported(tree)
            if name.split(".")[0] == PACKAGE.name
        }
        for importer, tree in modules().items()
    }


def short(name):
    """Of ``optax_ev3._src.explore.racing`` it is ``explore.racing``."""
    return name.removeprefix(PACKAGE.name).removeprefix("._src").removeprefix(".")


def room(name):
    """Of ``optax_ev3._src.explore.racing`` it is ``explore``; "" for what is public."""
    return short(name).split(".")[0] if "._src." in name else ""


def level(name):
    return next((i for i, rooms in enumerate(LEVELS) if room(name) in rooms), None)


def test_no_cycles():
    graphlib.TopologicalSorter(edges()).prepare()


def test_every_module_has_its_room():
    rooms = {room(name) for name in modules()} - {""}
    assert rooms == set().union(*LEVELS)


def test_no_imports_upwards():
    found = {
        f"{short(importer)} imports {short(name)}"
        for importer, names in edges().items()
        for name in names
        if room(importer) != room(name)
        and None not in (level(importer), level(name))
        and level(importer) <= level(name)
    }
    assert not found


def test_the_source_imports_nothing_public():
    found = {
        f"{importer} imports {name}"
        for importer, names in edges().items()
        for name in names
        if room(importer) and not room(name)
    }
    assert not found


def test_modules_are_short():
    limits = {"composer": 300}
    found = {
        short(name) for name in modules() if lines(name) > limits.get(short(name), 450)
    }
    assert not found


def without_docstrings(function):
    """How many lines a function has, from its name on, all docstrings left out."""
    count = function.end_lineno - function.lineno + 1
    for node in ast.walk(function):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            count -= node.body[0].end_lineno - node.body[0].lineno + 1
    return count


def test_functions_are_short():
    found = {
        f"{short(name)}.{node.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and without_docstrings(node) > 60
    }
    assert not found


def test_no_test_file_imports_another():
    for path in TESTS.rglob("*.py"):
        names = imported(ast.parse(path.read_text(encoding="utf-8")))
        parts = {part for name in names for part in name.split(".")}
        found = {part for part in parts if part.startswith("test_")}
        assert not found | parts & {"tests", "conftest"}, path
