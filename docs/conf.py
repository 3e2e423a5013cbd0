"""Configuration of the documentation (Sphinx)."""

import hashlib
import pathlib
import sys
import zlib
from importlib import metadata, util

from sphinx.ext import intersphinx

HERE = pathlib.Path(__file__).parent
BUILT = HERE / "_build"
sys.path.insert(0, str(HERE))

import thumbnails  # noqa: E402

project = "optax_ev3"
author = "The optax_ev3 authors"
project_copyright = author
release = metadata.version("optax_ev3")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"optax_ev3 {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields that a docstring lists are not listed a second time; it says their types.
napoleon_use_ivar = True
napoleon_attr_annotations = False

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True


def source_hash():
    """Changes with the package: notebooks then run again."""
    root = pathlib.Path(util.find_spec("optax_ev3").origin).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    for name in ("jax", "optax"):
        digest.update(metadata.version(name).encode())
    return digest.hexdigest()[:16]


nb_execution_mode = "cache"
nb_execution_cache_path = str(BUILT / "notebooks" / source_hash())
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True


def inventory(name, address):
    """Where another project's documentation has some names, for builds offline.

    A line of ``inventories/NAME.txt`` holds a page, the kind of its names, and those.
    """
    lines = []
    for line in (HERE / "inventories" / f"{name}.txt").read_text().splitlines():
        page, kind, *names = line.split()
        lines += [f"{x} py:{kind} 1 {page.format(x)}#$ -\n" for x in names]
    head = (
        "# Sphinx inventory version 2\n# Project: {}\n# Version: \n"
        "# The remainder of this file is compressed using zlib.\n"
    )
    file = BUILT / "inventories" / f"{name}.inv"
    file.parent.mkdir(parents=True, exist_ok=True)
    body = zlib.compress("".join(lines).encode())
    file.write_bytes(head.format(name).encode() + body)
    return address, (None, str(file))


# The address first, and where there is no network, the few names listed here.
intersphinx_mapping = {
    "optax": inventory("optax", "https://optax.readthedocs.io/en/latest/"),
    "jax": inventory("jax", "https://docs.jax.dev/en/latest/"),
}
intersphinx_timeout = 5
intersphinx_disabled_reftypes = ["std:*"]


def link_public_names(app, env, node, contnode):
    """Leads types, which name the modules that define them, to the pages of others."""
    package, _, module = node["reftarget"].partition(".")
    if not module.startswith(("_src.", "jaxlib._")):
        return None
    node["reftarget"] = f"{package}.{module.rpartition('.')[2]}"
    return intersphinx.missing_reference(app, env, node, contnode)


def setup(app):
    app.connect("builder-inited", lambda app: thumbnails.draw(BUILT / "thumbnails"))
    app.connect("missing-reference", link_public_names)
