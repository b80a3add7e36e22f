"""Colours and styles that all figures share."""

from typing import Any

STYLE: dict[Any, Any] = {
  "axes.axisbelow": True,
  "axes.edgecolor": "#8c8c8c",
  "axes.grid": True,
  "axes.labelcolor": "#333333",
  "axes.spines.right": False,
  "axes.spines.top": False,
  "axes.titlelocation": "left",
  "axes.titlepad": 8.0,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "figure.dpi": 150,
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
INK, GREY = "#222222", "#a8adb3"
COLOURS = (
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#c98a00",
  "#3f9fdb",
  "#7a5195",
  "#8c6d31",
  "#5f6b6d",
  "#a6192e",
  "#3b7d23",
  "#1b3a8c",
)
STAGES = {
  "start": GREY,
  "end of discover": "#0072b2",
  "final": "#d55e00",
}
