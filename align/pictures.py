"""Figures by matplotlib. Its font cache goes to a temporary folder, not to HOME."""

import atexit
import os
import shutil
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if "MPLCONFIGDIR" not in os.environ:
        os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
        atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
