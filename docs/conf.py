"""Sphinx configuration: ``sphinx-build docs build/docs`` after ``pip install -c constraints.txt -e ".[docs]"``."""

from hrem_layers import __version__

project = "hrem-layers"
author = "The hrem-layers developers"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
]
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable", None)}
autodoc_typehints = "description"
autodoc_member_order = "bysource"
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
exclude_patterns = ["build"]
