"""Sphinx configuration: ``make docs`` after ``pip install -c constraints.txt -e ".[docs]"``. Needs no network."""

import re
import zlib
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.ext.intersphinx import missing_reference

from hrem_layers import __version__

project = "hrem-layers"
author = "The hrem-layers developers"
copyright = author
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "hrem-layers"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
pygments_dark_style = "github-dark"
exclude_patterns = ["build", "static"]
autodoc_mock_imports = ["matplotlib"] if find_spec("matplotlib") is None else []
nitpicky = True

# What the pages refer to elsewhere. An inventory fetched from the network would hide a misspelt name on the day on
# which the network is away; from this list, a name that is not on it is a warning, and `make docs` fails on those.
ELSEWHERE = {
    "torch": (
        "https://docs.pytorch.org/docs/stable",
        {
            "torch.Tensor": "tensors.html",
            "torch.Generator": "generated/torch.Generator.html",
            "torch.device": "tensor_attributes.html",
            "torch.dtype": "tensor_attributes.html",
            "torch.finfo": "type_info.html",
            "torch.nn.Module": "generated/torch.nn.Module.html",
            "torch.nn.Parameter": "generated/torch.nn.parameter.Parameter.html",
            "torch.nn.parameter.Parameter": "generated/torch.nn.parameter.Parameter.html",
            "torch.nn.MultiheadAttention": "generated/torch.nn.MultiheadAttention.html",
            "torch.nn.TransformerEncoderLayer": "generated/torch.nn.TransformerEncoderLayer.html",
            "torch.nn.modules.module.Module": "generated/torch.nn.Module.html",
            "torch.utils.data.DataLoader": "data.html",
            "torch.utils.data.Sampler": "data.html",
        },
    ),
    "numpy": (
        "https://numpy.org/doc/stable",
        {
            "numpy.ndarray": "reference/generated/numpy.ndarray.html",
            "numpy.dtype": "reference/generated/numpy.dtype.html",
            "numpy.floating": "reference/arrays.scalars.html",
            "numpy.int64": "reference/arrays.scalars.html",
        },
    ),
    "matplotlib": (
        "https://matplotlib.org/stable",
        {"matplotlib.figure.Figure": "api/figure_api.html"},
    ),
    "python": (
        "https://docs.python.org/3",
        {
            "collections.abc.Callable": "library/collections.abc.html",
            "collections.abc.Iterable": "library/collections.abc.html",
            "collections.abc.Iterator": "library/collections.abc.html",
            "collections.abc.Mapping": "library/collections.abc.html",
            "collections.abc.Sequence": "library/collections.abc.html",
            "os.PathLike": "library/os.html",
            "pathlib.Path": "library/pathlib.html",
            "typing.Any": "library/typing.html",
            "typing.NamedTuple": "library/typing.html",
            "typing.Protocol": "library/typing.html",
        },
    ),
}


def _inventory(name: str, pages: dict[str, str]) -> str:
    """Writes a Sphinx inventory of these classes; the path, for intersphinx."""
    path = Path(__file__).parents[1] / "build" / "inventories" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = (
        f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n# The remainder is compressed using zlib.\n"
    )
    body = "".join(f"{target} py:class 1 {page}#{target} -\n" for target, page in pages.items())
    path.write_bytes(header.encode() + zlib.compress(body.encode()))
    return str(path)


intersphinx_mapping = {name: (url, _inventory(name, pages)) for name, (url, pages) in ELSEWHERE.items()}

# As they stand in annotations that Sphinx could not look up
SHORT = {"Tensor": "torch.Tensor", "nn.Module": "torch.nn.Module", "npt.NDArray": "numpy.ndarray"}


def _resolve_short_name(app, env, node, contnode):
    if node.get("reftarget") not in SHORT:
        return None
    node["reftarget"] = SHORT[node["reftarget"]]
    return missing_reference(app, env, node, contnode)


COLON = "\ue000"  # of the private use area: in no docstring
SECTION = re.compile(r"(\s*)(\w+):$")


def _hide_colons(app, what, name, obj, options, lines) -> None:
    """Napoleon takes what stands before a colon for a type: "L(v, u): ..." would lose its first words, and "Returns: a
    figure: ..." would name none. Types are in the annotations.
    """
    if lines and lines[0].startswith("Alias for field number"):  # what Python says of a field that has no docstring
        lines.clear()
    if what in ("attribute", "data", "property"):
        lines[:] = [line.replace(":", COLON) for line in lines]
    section, margin = "", 0
    for place, line in enumerate(lines):
        if line.strip() and len(line) - len(line.lstrip()) <= margin:
            found = SECTION.match(line)
            section, margin = (found[2], len(found[1])) if found else ("", 0)
        elif section in ("Returns", "Yields"):
            lines[place] = line.replace(":", COLON)


def _show_colons(app, what, name, obj, options, lines) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def _mathml(display: str):
    """Formulas as MathML, which browsers draw by themselves: each reader would fetch MathJax from the network."""

    def visit(translator, node) -> None:
        formula = convert(node.astext(), display=display)
        translator.body.append(formula if display == "inline" else f'<div class="math">{formula}</div>')
        raise nodes.SkipNode

    return visit, None


def setup(app) -> None:
    app.add_html_math_renderer("mathml", _mathml("inline"), _mathml("block"))
    app.connect("missing-reference", _resolve_short_name)
    app.connect("autodoc-process-docstring", _hide_colons, priority=1)
    app.connect("autodoc-process-docstring", _show_colons, priority=999)
