"""Configuration of the documentation (Sphinx)."""

from importlib import metadata

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
# Fields that a docstring lists are not listed a second time.
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The README links to files of the repository, which are no pages of this site.
suppress_warnings = ["myst.xref_missing"]
