"""Figures by matplotlib, which would leave its list of fonts in HOME: it lies in a temporary folder instead."""

import atexit
import os
import shutil
import tempfile


def new_figure(width: float, height: float):
    """An empty figure of that size, in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if "MPLCONFIGDIR" not in os.environ:
        os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
        atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
