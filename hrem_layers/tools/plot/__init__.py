"""Pictures of what the relations of a batch are: needs matplotlib, ``pip install "hrem-layers[plot]"``.

Every function returns a :class:`matplotlib.figure.Figure` that no window and no global state knows of: show it in a
notebook by being the last value of a cell, save it with ``figure.savefig("graph.png")``. The colours keep their order
in
grey print and for colour-blind readers.
"""

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise ModuleNotFoundError(
        'hrem_layers.tools.plot needs matplotlib: pip install "hrem-layers[plot]"', name="matplotlib"
    ) from error

from hrem_layers.tools.plot.alignment import plot_alignment
from hrem_layers.tools.plot.graph import plot_graph
from hrem_layers.tools.plot.neighbors import plot_neighbors
from hrem_layers.tools.plot.terms import plot_terms

__all__ = ["plot_alignment", "plot_graph", "plot_neighbors", "plot_terms"]
