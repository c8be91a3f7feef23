"""Weights from third parties: their sources and licences, where to find them on this machine, and their download.

The project includes none of them. `find` locates a file, `fetch` downloads it, `weights_key` hashes its content.
"""

from tccp.weights.downloading import MIRROR_VARIABLE, Fetched, fetch
from tccp.weights.weight_files import FOLDER_VARIABLE, available, default_folder, find, listing, text_table, weights_key
from tccp.weights.weight_table import WEIGHTS, Weight, entry

__all__ = [
    "FOLDER_VARIABLE",
    "MIRROR_VARIABLE",
    "WEIGHTS",
    "Fetched",
    "Weight",
    "available",
    "default_folder",
    "entry",
    "fetch",
    "find",
    "listing",
    "text_table",
    "weights_key",
]
