"""CIFAR-10: dense, nested, race, Maestro and others, by a config's variant.

  python -m experiments.cifar10 --variant=gpu --limit_minutes=9 --out=DIR
  python -m experiments.cifar10 --variant=gpu --at_once    # on 16 cores or so
  python -m experiments.cifar10 --variant=gpu --network=vgg
  python -m experiments.cifar10 --variant=short            # on CPUs
  python -m experiments.cifar10 --variant=gpu --smoke      # to try it

First checks on the device that all forms of a truncated network agree. Then
every row goes through `python -m maestro.main` into a folder of its own under
--workdir. At --limit_minutes the row at work saves its state, and the exit code
is 75; the same command goes on. Results files, curves and a figure are copied
to --out, experiments/results/cifar10_VARIANT (cifar10_vgg_VARIANT) if not
given, from which `maestro.report` makes the table. Variants: "" (settled),
paper, gpu, short.

--at_once starts all rows together, which then share the device: most of a
short run on a GPU is compilation, by the CPU. Images a second mean nothing
then.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
from absl import flags

from experiments.runs import make_folder
from maestro import cli
from maestro.errors import EXIT_TERMINATED, Interrupted, UserError
from maestro.report import style
from maestro.report import tables as report
from maestro.runs import metrics

CONFIGS = {"resnet": "configs/resnet_od.py", "vgg": "configs/vgg_od.py"}
RUNS = pathlib.Path("runs/experiments")
RESULTS = pathlib.Path("experiments/results")

# Rows of each variant: name -> more variants, and overrides, of the config.
_DENSE = ["--config.method=dense"]
_PAPER = {
  "dense": _DENSE,
  "lam16e-6": ["--config.discover.lam=16e-6"],
  "lam32e-6": ["--config.discover.lam=32e-6"],
}
ROWS: dict[str, dict[str, list[str]]] = {
  "": _PAPER,
  "paper": _PAPER,
  # In the order of what is to be known first; both phases share the epochs.
  "gpu": {
    "dense": _DENSE,
    "nested": ["nested"],
    "race_macs0.4": ["race", "--config.budget=macs:0.4"],
    "race_macs0.2": ["race", "--config.budget=macs:0.2"],
    "lam16e-6": ["--config.discover.lam=16e-6"],
    "fixed_macs0.4": ["--config.method=fixed", "--config.budget=macs:0.4"],
    "pufferfish": ["pufferfish"],
    "quarter": ["--config.method=pufferfish"],  # in every layer
  },
  # Larger ones: there are only 300 steps in which they can act.
  "short": {
    "dense": _DENSE,
    "lam1e-3": ["--config.discover.lam=1e-3"],
  },
}

# Rows of one network alone, as the other's config has no such variant.
ONLY = {"pufferfish": "resnet"}

# What others report; None is not available. (name, accuracy %, params in M,
# MACs in G), from Horvath et al., ICML 2024; VGG's MACs are given there as a
# share of dense.
PUBLISHED: dict[str, list[tuple[str, float, float | None, float | None]]] = {
  "resnet": [
    ("Maestro, lambda 16e-6", 94.19, 4.08, 0.39),
    ("Maestro, smaller", 93.97, 2.19, None),
    ("Pufferfish", 94.17, 3.336, 0.22),
  ],
  "vgg": [
    ("dense", 92.94, None, None),
    ("Maestro", 93.10, 2.20, 0.33 * 0.398136320),
    ("Maestro, smaller (about)", 92.70, 0.06 * 20.040522, 0.20 * 0.398136320),
    ("Pufferfish (about)", 92.69, 8.37, None),
    ("Cuttlefish (about)", 93.39, None, None),
    ("Rare Gems (about)", 86.28, None, None),
  ],
}

_CHECK = "device_check.json"
_SAVE_SECONDS = 60.0  # what a stopped run may take to save its state
_CURVES = ("train/", "val/", "rank/", "cost/", "examples_per_second")

# ---------------------------------------------------------------------------
# The check of the device
# ---------------------------------------------------------------------------


def check_device(network: str, width: int = 64) -> dict[str, Any]:
  """Compares all forms of a truncated network on the default device.

  Random weights, random ranks, eight random images, float32 at the highest
  precision of products.

  Returns:
    {"device": its name, "differences": {form: largest difference of its logits
    from the masked network's, as a share of their largest}}.

  Raises:
    UserError: a difference is above 1e-3.
  """
  # Imported here: the process that starts the runs must not hold the device.
  import jax
  import numpy as np

  import maestro
  from maestro import ops, trees
  from maestro.models import MODELS

  name = {"resnet": "resnet18", "vgg": "vgg19"}[network]
  model = MODELS[name](num_classes=10, width=width)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((8, 32, 32, 3)).astype(np.float32)
  layers = maestro.layers(model, x)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  kernels = variables["params"]
  factor = jax.jit(lambda k: maestro.decompose(k, [maestro.Rule()], layers))
  params = factor(kernels)
  full = trees.flatten_ranks(jax.device_get(maestro.full_ranks(params)))
  # At least half of them: fewer, in every layer, leave nothing of a signal.
  ranks = trees.unflatten_ranks(
    {path: np.int32(rng.integers(r // 2, r + 1)) for path, r in full.items()}
  )

  @ops.jit_precise
  def logits(params, ranks=None):
    inputs = variables | {"params": params}
    return model.apply(
      inputs if ranks is None else {**inputs, "ranks": ranks}, x
    )

  with jax.default_matmul_precision("highest"):
    pairs = {
      "factored, of dense": (logits(params), logits(kernels)),
      "ranks": (logits(params, ranks), None),
      "truncated": (logits(maestro.truncate(params, ranks)), None),
      "extracted": (logits(maestro.extract(params, ranks, layers)), None),
    }
    masked = logits(maestro.mask(params, ranks))
  found = {}
  for form, (y, wanted) in pairs.items():
    wanted = np.asarray(masked if wanted is None else wanted)
    scale = np.abs(wanted).max()
    found[form] = float(np.abs(np.asarray(y) - wanted).max() / scale)
  device = jax.devices()[0]
  device = f"{device.platform}: {device.device_kind}"
  forms = ", ".join(f"{form} {value:.1e}" for form, value in found.items())
  print(f"{name} on {device}: {forms}", flush=True)
  if not all(value < 1e-3 for value in found.values()):
    raise UserError(
      f"forms of one truncated {name} differ on this device: {found}; nothing"
      " was trained"
    )
  return {"network": name, "device": device, "differences": found}


# ---------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------


def rows_of(variant: str, network: str) -> dict[str, list[str]]:
  """The rows of `ROWS` that there are for a network."""
  rows = ROWS[variant].items()
  return {name: row for name, row in rows if ONLY.get(name, network) == network}


class Clock:
  """Knows when to stop, and stops the process at work by SIGTERM."""

  def __init__(self, minutes: float | None):
    seconds = float("inf") if minutes is None else 60 * minutes
    # Half of a very short limit, so that it can be tried at all.
    self.stop_at = time.monotonic() + max(seconds - _SAVE_SECONDS, seconds / 2)
    self._asked = False

  @property
  def over(self) -> bool:
    return self._asked or time.monotonic() >= self.stop_at

  def ask(self, *_: Any) -> None:
    self._asked = True

  def call(self, command: Sequence[str], log: Any, env: Mapping) -> int:
    """Runs a command; sends SIGTERM once when the time is over."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    told = False
    while True:
      with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=0.5)
      if self.over and not told:
        process.send_signal(signal.SIGTERM)
        told = True


@contextlib.contextmanager
def _sigterm(clock: Clock) -> Iterator[None]:
  before = signal.signal(signal.SIGTERM, clock.ask)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _train(workdir: pathlib.Path, changes: list[str], clock: Clock) -> None:
  """Trains one row, or goes on with it.

  Raises:
    Interrupted: the time is over; what is done is saved.
    UserError: the run failed.
  """
  values = flags.FLAGS
  if clock.over:
    raise Interrupted(f"{workdir.name} is not finished")
  variants = [values.variant, "smoke" if values.smoke else ""]
  variants += [word for word in changes if not word.startswith("--")]
  config = CONFIGS[values.network] + ":" + ",".join(filter(None, variants))
  command = [sys.executable, "-m", "maestro.main"]
  command += [f"--config={config.rstrip(':')}", f"--workdir={workdir}"]
  workdir.mkdir(parents=True, exist_ok=True)
  env = dict(os.environ)
  if values.at_once:
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if values.variant == "gpu":
    # A run that goes on in the next call need not compile again.
    cache = workdir.parent / "compiled"
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.resolve()))
  with (workdir / "log.txt").open("a") as log:
    overrides = [word for word in changes if word.startswith("--")]
    code = clock.call([*command, *overrides], log, env)
  if code in (EXIT_TERMINATED, -signal.SIGTERM):
    raise Interrupted(f"{workdir.name} is not finished")
  if code:
    raise UserError(f"{workdir} ended with code {code}; see its log.txt")
  print(f"done: {workdir}", flush=True)


def _train_at_once(
  jobs: Mapping[pathlib.Path, list[str]], clock: Clock
) -> None:
  """Trains all rows at the same time.

  Raises:
    UserError: rows failed, once all have ended.
    Interrupted: none did, but some are not finished.
  """
  with concurrent.futures.ThreadPoolExecutor(max(len(jobs), 1)) as pool:
    started = [pool.submit(_train, *job, clock) for job in jobs.items()]
    errors = [future.exception() for future in started]
  errors.sort(key=lambda error: isinstance(error, Interrupted))
  for error in filter(None, errors):
    raise error


def curves(workdir: pathlib.Path) -> dict[str, dict[str, list]]:
  """Reads {metric: {"step": [...], "value": [...]}} of a run, kept short."""
  found: dict[str, dict[str, list]] = {}
  for record in metrics.read(workdir):
    for key, value in record.items():
      if key.startswith(_CURVES) and value is not None:
        if isinstance(value, float):
          value = float(f"{value:.5g}")
        series = found.setdefault(key, {"step": [], "value": []})
        series["step"].append(record["step"])
        series["value"].append(value)
  return found


def _keep(workdir: pathlib.Path, out: pathlib.Path) -> None:
  """Copies what is kept of a run: its results, once finished, and curves."""
  name = workdir.name
  if (workdir / "results.json").exists():
    shutil.copyfile(workdir / "results.json", out / f"{name}.json")
  if (workdir / metrics.FILE).exists():
    lines = [
      f"{json.dumps(key)}: {json.dumps(series, separators=(',', ':'))}"
      for key, series in curves(workdir).items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    (out / f"{name}_curves.json").write_text(text)


# ---------------------------------------------------------------------------
# Table and figure
# ---------------------------------------------------------------------------


def published_table(network: str) -> str:
  """Tabulates what others report for a network on CIFAR-10."""
  rows = [["published, not run here", "accuracy %", "params M", "GMACs"]]
  for name, *values in PUBLISHED[network]:
    texts = ["not available" if x is None else f"{x:.2f}" for x in values]
    rows.append([name, *texts])
  return report.text_table(rows)


def draw(
  rows: Mapping[str, Mapping[str, Any]],
  results: Mapping[str, Mapping[str, Any]],
  published: Sequence[tuple[str, float, float | None, float | None]] = (),
  title: str = "",
) -> matplotlib.figure.Figure:
  """Draws training loss, total rank, and accuracy against MACs.

  Args:
    rows: {row: curves}, see `curves`.
    results: {row: content of results.json} of the finished rows.
    published: (name, accuracy %, params, GMACs), hollow marks.
    title: of the figure.
  """
  with matplotlib.rc_context(style.STYLE):
    figure = matplotlib.figure.Figure(figsize=(9, 3.2), layout="constrained")
    loss, rank, cost = figure.subplots(1, 3)
    for (name, series), colour in zip(
      rows.items(), style.COLOURS, strict=False
    ):
      label = name.replace("lam", "λ ")
      if "train/loss" in series:
        line = series["train/loss"]
        loss.plot(line["step"], line["value"], color=colour, label=label)
      if "rank/total" in series:
        line = series["rank/total"]
        rank.plot(
          line["step"],
          line["value"],
          drawstyle="steps-post",
          color=colour,
          label=label,
        )
      if name in results:
        final = results[name]["final"]
        cost.plot(
          final["macs"] / 1e9,
          100 * final["metrics"]["accuracy"],
          "o",
          color=colour,
          label=label,
        )
    costed = [(p[0], p[1], p[3]) for p in published if p[3] is not None]
    for (name, accuracy, gmacs), marker in zip(costed, "s^Dv", strict=False):
      cost.plot(
        gmacs,
        accuracy,
        marker,
        color="#6b6b6b",
        mfc="none",
        label=f"published: {name}",
      )
    loss.set(title="Training loss, without penalty", xlabel="step")
    loss.set_ylabel("nats per example")
    loss.set_yscale("log")  # a row may start far above the others
    rank.set(title="Total rank", xlabel="step", ylim=(0, None))
    cost.set(title="Test accuracy against cost", xlabel="GMACs")
    cost.set_ylabel("accuracy (%)")
    cost.margins(x=0.1, y=0.1)
    if costed:  # room for the legend, below all marks
      low, high = cost.get_ylim()
      cost.set_ylim(low - 0.4 * (high - low), high)
      marks = cost.get_legend_handles_labels()
      marks = [m for m in zip(*marks, strict=True) if "published" in m[1]]
      cost.legend(*zip(*marks, strict=True), loc="lower right", fontsize=6.5)
    for axes in (loss, rank):
      axes.set_xlim(0, None)
      axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    handles, labels = loss.get_legend_handles_labels()
    if handles:
      figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels)
      )
    if title:
      figure.suptitle(title)
  return figure


def _report(names: Sequence[str], out: pathlib.Path) -> None:
  """Prints the table and draws the figure of all rows kept so far."""
  values = flags.FLAGS
  series, results = {}, {}
  for name in names:
    if (out / f"{name}_curves.json").exists():
      text = (out / f"{name}_curves.json").read_text()
      series[name] = json.loads(text)
    if (out / f"{name}.json").exists():
      results[name] = report.load(out / f"{name}.json")
  if not series:
    return
  comparable = values.variant != "short" and not values.smoke
  title = {"resnet": "ResNet-18", "vgg": "VGG-19"}[values.network]
  title += f" on CIFAR-10, {values.variant or 'settled'}"
  if not comparable:
    title += " (a demonstration: far too short for its accuracy to mean much)"
  published = PUBLISHED[values.network] if comparable else []
  figure = draw(series, results, published, title)
  figure.savefig(out / "curves.png")
  print(f"\nfigure: {out / 'curves.png'}")
  if results:
    print(f"\n{report.compare(list(results.values()))}")
    for name, one in results.items() if not values.at_once else ():
      speed = one["train"]["examples_per_second"]
      print(f"{name}: {speed:,.1f} images/s in training")
  print(f"\n{published_table(values.network)}")


def main(argv: list[str]) -> None:
  """Checks the device, runs what is missing, reports what there is."""
  values = flags.FLAGS
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if values.check_only:
    found = check_device(values.network, width=8 if values.smoke else 64)
    if values.out is not None:
      text = json.dumps(found, indent=1) + "\n"
      (pathlib.Path(values.out) / _CHECK).write_text(text)
    return
  rows = rows_of(values.variant, values.network)
  chosen = list(rows) if values.rows is None else values.rows
  if unknown := [name for name in chosen if name not in rows]:
    raise UserError(f"--rows: {unknown} unknown; known: {', '.join(rows)}")
  clock = Clock(values.limit_minutes)
  parts = ["cifar10", "vgg" if values.network == "vgg" else ""]
  parts += [
    values.variant or "settled",
    "smoke" if values.smoke else "",
  ]
  folder = "_".join(filter(None, parts))
  root = pathlib.Path(values.workdir or RUNS / folder)
  out = pathlib.Path(
    values.out or (root / "report" if values.smoke else RESULTS / folder)
  )
  make_folder(root, "--workdir")
  make_folder(out, "--out")
  with _sigterm(clock):
    try:
      missing = [n for n in chosen if not (root / n / "results.json").exists()]
      if missing and not (root / _CHECK).exists():
        command = [sys.executable, "-m", "experiments.cifar10", "--check_only"]
        command += [
          f"--network={values.network}",
          f"--smoke={values.smoke}",
        ]
        command += [f"--out={root}"]
        code = clock.call(command, None, os.environ)
        if clock.over:
          raise Interrupted("no time is left after the check of the device")
        if code:
          raise UserError("the check of the device failed, see above")
      jobs = {root / name: rows[name] for name in missing}
      if values.at_once:
        _train_at_once(jobs, clock)
      else:
        for workdir, changes in jobs.items():
          _train(workdir, changes, clock)
    finally:
      if (root / _CHECK).exists():
        shutil.copyfile(root / _CHECK, out / _CHECK)
      for name in rows:
        if (root / name).exists():
          _keep(root / name, out)
      _report(list(rows), out)


def define_flags() -> None:
  """Defines the command's flags."""
  flags.DEFINE_enum("variant", "", list(ROWS), "Of the config.")
  flags.DEFINE_enum("network", "resnet", list(CONFIGS), "Which one.")
  flags.DEFINE_list("rows", None, "Some of the rows, by name.")
  flags.DEFINE_bool("smoke", False, "Two epochs a run; kept in runs/.")
  flags.DEFINE_bool("at_once", False, "Start all rows together, see above.")
  flags.DEFINE_string("out", None, "Folder of results, curves, figure.")
  flags.DEFINE_string("workdir", None, "Folder of the runs' workdirs.")
  flags.DEFINE_float(
    "limit_minutes", None, "Stop within so many minutes, saved; None never."
  )
  flags.DEFINE_bool("check_only", False, "Only check the device.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
