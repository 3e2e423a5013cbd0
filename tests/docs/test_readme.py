"""What README and docs show runs, and does what they say."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ev3

ROOT = pathlib.Path(__file__).parents[2]
MODULES = [
    "optax_ev3",
    *(
        module.name
        for module in pkgutil.walk_packages(optax_ev3.__path__, "optax_ev3.")
        if "._" not in module.name
    ),
]


def shown_in(file, number=0):
    """A Python example of a page, compiled."""
    path = ROOT / file
    code = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)[number]
    return compile(code, str(path), "exec")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_first_example(page):
    names = {}
    exec(shown_in(page), names)
    reached = float(names["score"](names["best"], names["held_out"]).mean())
    assert reached > -0.2  # -0.69 knows nothing.


@pytest.mark.slow
def test_the_recommended_setting():
    names = {}
    exec(shown_in("docs/settings.md"), names)
    reached = float(names["score"](names["best"], names["held_out"]).mean())
    assert reached > -0.1
    # Explorers that did not win were paused.
    mean = optax_ev3.history(names["state"])["mean"]
    assert np.isnan(mean).any() and not np.isnan(mean).all(axis=0).any()
    # Without a loss it takes the loop's gradients; it may know when it ends.
    exec(shown_in("docs/settings.md", 1), names)
    grads = jax.tree.map(jnp.ones_like, names["params"])
    state = names["tx"].init(names["params"])
    names["tx"].update(grads, state, names["params"])
    exec(shown_in("docs/settings.md", 2), names)
    written_out = names["tx"].init(names["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(written_out, names["state"])
    # What the page says the preset stands for has the same state.
    exec(shown_in("docs/settings.md", 3), names)
    written_out = names["tx"].init(names["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(written_out, names["state"])


def test_the_three_lines():
    names = {
        "optax": optax,
        "optax_ev3": optax_ev3,
        "score": lambda w: -((w - jnp.ones(4)) ** 2),
        "params": jnp.zeros([]),
    }
    exec(shown_in("README.md", 1), names)
    explorers = names["state"].explore.explorers
    assert sum(len(one.positions) for one in explorers.values()) == 8
    assert optax_ev3.best_params(names["state"]) == 0


@pytest.mark.parametrize("name", MODULES)
def test_the_api_lists_every_public_name(name):
    module = importlib.import_module(name)
    pages = (ROOT / "docs/api").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    listed, current = set(), ""
    for kind, target in re.findall(
        r"^\.\. (currentmodule|auto\w+):: (\S+)", text, re.M
    ):
        if kind == "currentmodule":
            current = target
        else:
            is_full = target.startswith("optax_ev3.")
            listed.add(target if is_full else f"{current}.{target}")
    assert {f"{name}.{x}" for x in public(module)} - listed == set()


def public(module):
    names = getattr(module, "__all__", [])
    return [x for x in names if not inspect.ismodule(getattr(module, x))]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_example(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(recurse=False)
    without = [
        x
        for x in public(module)
        if not any(test.examples for test in finder.find(getattr(module, x), x))
    ]
    assert without == []
