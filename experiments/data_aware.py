"""Output errors of the SVD and of data-aware factors, LeNet on MNIST.

  python -m experiments.data_aware                  # trains LeNet for 10 epochs
  python -m experiments.data_aware --smoke          # for two, to try it
  python -m experiments.data_aware --workdir=<dir>  # a dense run that is there

Decomposes every layer of a trained dense LeNet twice, by the plain SVD and for
512 training examples (`methods.calibrate`), and reports at every rank the
relative squared error of the layer's outputs, on those examples and on the
5,000 of the validation split, which neither has seen. Writes
experiments/results/data_aware/data_aware.json and docs/images/data_aware.png;
exit code 1 if the data-aware error is above the SVD's at any layer and rank on
the calibration examples.
"""

import math
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from absl import flags

from experiments import runs
from maestro import cli, lowrank, trees
from maestro import data as data_lib
from maestro.data import epoch_order
from maestro.errors import UserError
from maestro.methods import calibrate
from maestro.report import style
from maestro.report import tables as report
from maestro.report.tables import markdown_table
from maestro.runs import provenance
from maestro.runs import workdir as workdir_lib
from maestro.training import opened

CONFIG = "experiments/lenet_comparison.py:dense,100"
EXAMPLES = 512  # as many as the method data_svd takes
RUNS = pathlib.Path("runs/experiments/data_aware")
RESULTS = pathlib.Path("experiments/results/data_aware/data_aware.json")
FIGURE = pathlib.Path("docs/images/data_aware.png")
# On calibration examples the data-aware error may exceed the SVD's by rounding.
TOLERANCE = 1e-6

Errors = Mapping[str, Mapping[str, list[float]]]


def output_errors(
  kernel: np.ndarray, u: np.ndarray, v: np.ndarray, moments: np.ndarray
) -> list[float]:
  """Relative squared output errors at ranks 0 .. R, of any factors.

    e_r = ||X (K - u[:, :r] v[:r])||^2 / ||X K||^2, from C = X^T X / N

  Args:
    kernel: [in, out].
    u: [in, R].
    v: [R, out].
    moments: C, [in, in].
  """
  total = np.sum(kernel * (moments @ kernel))
  errors = []
  for r in range(u.shape[-1] + 1):
    rest = kernel - u[:, :r] @ v[:r]
    errors.append(float(max(np.sum(rest * (moments @ rest)), 0.0) / total))
  return errors


def _batches(dataset, split, count: int) -> Iterator[jax.Array]:
  """Preprocesses `count` examples of a split, chosen as data_svd does."""
  order = np.asarray(epoch_order(0, 0, len(split)))[:count]
  for start in range(0, count, 256):
    x = split.inputs[np.sort(order[start : start + 256])]
    yield dataset.preprocess(jnp.asarray(x))


def measure(
  model: Any,
  params: trees.Tree,
  layers: Mapping[str, trees.LayerSpec],
  dataset: data_lib.Dataset,
) -> dict[str, Errors]:
  """Returns {"calibration" or "validation": {path: {"svd", "data": errors}}}.

  `params` are dense; layers have no leading axes.
  """

  def moments(split, count):
    batches = _batches(dataset, split, count)
    return calibrate.second_moments(model, {"params": params}, batches, layers)

  seen = moments(dataset.train, EXAMPLES)
  by = {
    "calibration": seen,
    "validation": moments(dataset.val, len(dataset.val)),
  }
  rules = [lowrank.Rule()]
  forms = {
    "svd": lowrank.decompose(params, rules, layers),
    "data": calibrate.decompose(params, rules, layers, seen),
  }

  def matrix(tree: Any, path: str, name: str, shape: tuple) -> np.ndarray:
    x = np.asarray(trees.get(tree, path)[name], np.float64)
    return x.reshape(shape)

  found: dict[str, dict] = {}
  for split, c in by.items():
    found[split] = {}
    for path, spec in layers.items():
      shape = (spec.n_in, spec.n_out)
      kernel = matrix(params, path, "kernel", shape)
      found[split][path] = {
        name: output_errors(
          kernel,
          matrix(tree, path, "u", (spec.n_in, -1)),
          matrix(tree, path, "v", (-1, spec.n_out)),
          np.asarray(c[path], np.float64),
        )
        for name, tree in forms.items()
      }
  return found


def exceeding(errors: Errors) -> list[str]:
  """Names each layer and rank at which data-aware factors are the worse."""
  return [
    f"{path} rank {r}"
    for path, e in errors.items()
    for r, (svd, data) in enumerate(zip(e["svd"], e["data"], strict=True))
    if data > svd + TOLERANCE
  ]


def table(found: Mapping[str, Errors]) -> str:
  """Tabulates errors at a half and a quarter of the full rank, in Markdown."""
  head = ["layer", "rank"]
  head += [f"{name}, {s}" for s in found for name in ("SVD", "data-aware")]
  lines = [head]
  for path, e in found["calibration"].items():
    full = len(e["svd"]) - 1
    for r in (math.ceil(full / 2), math.ceil(full / 4)):
      row = [path, f"{r} of {full}"]
      for errors in found.values():
        row += [f"{errors[path][name][r]:.2g}" for name in ("svd", "data")]
      lines.append(row)
  return markdown_table(lines)


def draw(found: Mapping[str, Errors]) -> matplotlib.figure.Figure:
  """Draws a panel for each layer: errors over ranks, on both splits."""
  paths = list(found["calibration"])
  columns = 3
  rows = -(-len(paths) // columns)
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(
      figsize=(8, 2.3 * rows + 0.4), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, path in zip(grid.flat, paths, strict=False):
      for split, dash in (("validation", "-"), ("calibration", (0, (1, 1.5)))):
        for name, label, colour in (
          ("svd", "SVD", style.COLOURS[0]),
          ("data", "data-aware", style.COLOURS[1]),
        ):
          errors = found[split][path][name][:-1]
          axes.plot(
            range(len(errors)),
            errors,
            linestyle=dash,
            color=colour,
            label=f"{label}, {split}",
          )
      axes.set(title=path, yscale="log", ylim=(1e-4, 1.5), xlabel="rank")
      axes.xaxis.set_major_locator(
        matplotlib.ticker.MaxNLocator(5, integer=True)
      )
    for axes in grid[:, 0]:
      axes.set_ylabel("relative squared error")
    for axes in grid.flat[len(paths) :]:
      axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
  return figure


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_string("workdir", None, "A finished dense run of LeNet.")
  flags.DEFINE_bool("smoke", False, "Two epochs; not kept.")


def main(argv: list[str]) -> None:
  """Trains if need be, measures, writes the results, prints the table."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  smoke, workdir = flags.FLAGS.smoke, flags.FLAGS.workdir
  if workdir is None:
    workdir = RUNS / ("smoke" if smoke else "dense_seed0")
    runs.run(CONFIG + (",smoke" if smoke else ""), workdir)
  run = opened.open_run(workdir)
  trained = report.load(pathlib.Path(workdir))
  if run.ranks:
    raise UserError(f"--workdir: {workdir} has factors; name a dense run")
  dataset = data_lib.make(**run.config.data)
  found = measure(run.model, run.params, run.layers, dataset)
  worse = exceeding(found["calibration"])
  figure = RUNS / FIGURE.name if smoke else FIGURE
  if not smoke:
    record = {
      "config": workdir_lib.read_json(pathlib.Path(workdir) / "config.json"),
      "git": provenance.git_commit(),
      "trained_at": trained["git"],
      "device": trained["device"],
      "jax": jax.__version__,
      "seed": trained["seed"],
      "examples": EXAMPLES,
      "errors": found,
    }
    runs.write_results(RESULTS, record)
  figure.parent.mkdir(parents=True, exist_ok=True)
  draw(found).savefig(figure)
  print(table(found))
  worse_held_out = exceeding(found["validation"])
  total = sum(len(e["svd"]) for e in found["calibration"].values())
  print(
    f"\ndata-aware above the SVD: {len(worse)} of {total} layers and ranks on"
    f" calibration examples, {len(worse_held_out)} on validation examples"
  )
  print(f"figure: {figure}")
  if worse:
    sys.exit(f"failed: {', '.join(worse)}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
