"""The look that the figures of the experiments share."""

from typing import Any

INK = "#222222"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#3f9fdb")
GREY = "#a8adb3"

# For matplotlib.rc_context.
STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": "#8c8c8c",
  "axes.grid": True,
  "axes.labelcolor": "#333333",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "figure.facecolor": "white",
  "font.size": 9,
  "grid.color": "#e8e8e8",
  "grid.linewidth": 0.6,
  "legend.frameon": False,
  "lines.linewidth": 1.6,
  "savefig.dpi": 150,
  "xtick.color": "#555555",
  "xtick.labelsize": 8,
  "ytick.color": "#555555",
  "ytick.labelsize": 8,
}
