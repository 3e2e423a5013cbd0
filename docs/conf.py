"""Configuration of the documentation (Sphinx)."""

import pathlib
from importlib import metadata

from sphinx import addnodes

project = "optax_ev3"
author = "The optax_ev3 authors"
project_copyright = author
release = metadata.version("optax_ev3")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"optax_ev3 {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Fields that a docstring lists are not listed a second time; it says their types.
napoleon_use_ivar = True
napoleon_attr_annotations = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3


def link_included_files(app, doctree):
    """Leads links from the README to files of the repository to pages of this site."""
    del app
    for node in doctree.findall(addnodes.pending_xref):
        file = pathlib.PurePosixPath(node["reftarget"])
        if str(file) == "CHANGELOG.md" or file.parent == pathlib.PurePosixPath("docs"):
            node["refdomain"], node["reftarget"] = "doc", file.stem.lower()
            node["reftargetid"] = None
        elif file.parent == pathlib.PurePosixPath("examples"):
            node["refdomain"], node["reftarget"] = "doc", "examples"
            node["reftargetid"] = file.stem


def setup(app):
    app.connect("doctree-read", link_included_files)
