"""Time and memory of one training step in every form, against stated peers.

  python -m benchmarks.train_step                   # all four networks
  python -m benchmarks.train_step --networks=lenet --rounds=30 --out=step.jsonl
  python -m benchmarks.train_step --dtype=bfloat16  # on an accelerator
  python -m benchmarks.train_step --smoke

Forms (--forms):

  plain           the same network in plain `flax.linen`, with an optax step
  dense           ours, before any layer is decomposed
  factored        ours at full rank
  sampled         and with the one-layer sampler
  lasso           and with the group lasso
  independent     at full rank, with the sampler that draws all layers' ranks
  switch          the same with products whose cost follows the rank, where that
                  pays (`ops.prefer`)
  truncated50     factored, cut to 50 % of the ranks; no sampler, no lasso
  truncated25     to 25 %
  torch_dense     the same network in PyTorch
  torch_factored  the same at full rank, each layer as two, written by hand
  penalty         the group lasso's gradient alone; importance and shrink alone

All forms are timed in one run, round by round in an order that is shuffled
each time, so that a drifting machine hits them alike. A round lasts at least
0.3 s or one call. A time is the median over rounds; a ratio is the median of
the ratios within the rounds. CPU time is that of all threads of the process,
waiting threads of PyTorch that spin included; on a machine busy with other work
it says more than the clock. A step gathers its batch from uint8 arrays, scales
it and does SGD with momentum; data are random. PyTorch runs in processes of its
own, on the same device; without it, or where it does not know the device or the
dtype, its forms are left out.

Training state: parameters, optimizer state and batch statistics. Peak memory is
what the compiled program says that it needs: arguments, outputs and temporary
buffers; on CPUs that leaves out what a convolution allocates while it runs.

--out appends one JSON line a form; without it nothing is written.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from benchmarks import plain
from maestro import cli, data, lowrank, models, ops, sampling
from maestro import introspect as nn
from maestro.data.photos import cores
from maestro.errors import UserError
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.parallel.rules import Placement
from maestro.report.tables import align
from maestro.runs.provenance import git_commit
from maestro.training import losses
from maestro.training.state import TrainState, zero_metrics
from maestro.training.step import make_dispatch, make_step

ROOT = pathlib.Path(__file__).parents[1]
BATCHES = 4  # the random data are so many batches
LEARNING_RATE = 1e-3  # small, as the labels are random
LAM = 1e-5


@dataclasses.dataclass(frozen=True)
class Network:
  """The inputs of a network, its usual batch and the options of its models."""

  title: str
  shape: tuple[int, int, int]
  batch_size: int
  has_width: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


NETWORKS = {
  "lenet": Network("LeNet", (28, 28, 1), 256),
  "resnet18": Network("ResNet-18", (32, 32, 3), 64, has_width=True),
  "vgg19": Network("VGG-19", (32, 32, 3), 32, has_width=True),
  "mlp": Network(
    "MLP, 4 x 1024", (28, 28, 1), 128, options={"features": (1024,) * 4}
  ),
}


@dataclasses.dataclass(frozen=True)
class Ours:
  """One of our forms.

  Attributes:
    fraction: of the ranks that are stored; None is dense.
    sampler: of the ranks of a step.
    lam: of the lasso.
    implementation: that products prefer.
  """

  fraction: float | None = 1.0
  sampler: Callable = sampling.full
  lam: float = 0.0
  implementation: str = "xla"


OURS = {
  "dense": Ours(None),
  "factored": Ours(),
  "sampled": Ours(sampler=sampling.one_layer),
  "lasso": Ours(sampler=sampling.one_layer, lam=LAM),
  "independent": Ours(sampler=sampling.independent),
  "switch": Ours(sampler=sampling.independent, implementation="switch"),
  "truncated50": Ours(0.5),
  "truncated25": Ours(0.25),
}
TORCH = {"torch_dense": False, "torch_factored": True}
LABELS = {
  "plain": "plain Flax, dense",
  "dense": "ours, dense",
  "factored": "ours, full rank",
  "sampled": "  + sampler",
  "lasso": "  + sampler + lasso",
  "independent": "  + independent ranks",
  "switch": "  + these by a switch",
  "truncated50": "ours, 50 % of the ranks",
  "truncated25": "ours, 25 % of the ranks",
  "torch_dense": "PyTorch, dense",
  "torch_factored": "PyTorch, factored",
}
FORMS = (*LABELS, "penalty")
# Ratios: the end of the key in the JSON, the table's heading, the form.
REFERENCES = (
  ("dense", "/ dense", "dense"),
  ("plain_flax", "/ Flax", "plain"),
  ("torch_dense", "/ torch", "torch_dense"),
  ("torch_factored", "/ t.fact", "torch_factored"),
)


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured, and how long.

  Attributes:
    networks: keys of `NETWORKS`.
    forms: of `FORMS`.
    batch_size: examples of a step; None is the network's own.
    rounds: how often every form is timed.
    round_seconds: a round does as many calls as take this long, at least one.
    dtype: of the computation; None is float32.
    steps_per_dispatch: steps per call; None is 1 on CPUs and 16 elsewhere.
    width: channels of the first stage of ResNet-18 and VGG-19; None is 64.
  """

  networks: Sequence[str] = tuple(NETWORKS)
  forms: Sequence[str] = FORMS
  batch_size: int | None = None
  rounds: int = 10
  round_seconds: float = 0.3
  dtype: str | None = None
  steps_per_dispatch: int | None = None
  width: int | None = None

  def __post_init__(self):
    """Refuses names and numbers that mean nothing."""
    for key, known in (("networks", NETWORKS), ("forms", FORMS)):
      if unknown := [n for n in getattr(self, key) if n not in known]:
        raise UserError(
          f"--{key}: {', '.join(unknown)} unknown; choose of {', '.join(known)}"
        )
      if not getattr(self, key):
        raise UserError(f"--{key}: nothing is chosen of {', '.join(known)}")
    for key in ("batch_size", "rounds", "steps_per_dispatch", "width"):
      value = getattr(self, key)
      if value is not None and value < 1:
        raise UserError(f"--{key}: {value} is below 1")
    if self.dtype not in (None, "bfloat16", "float16"):
      raise UserError(
        f"--dtype: {self.dtype!r} is unknown; use bfloat16 or float16, or leave"
        " it out for float32"
      )


@dataclasses.dataclass
class Form:
  """Something to be timed.

  Attributes:
    run: does so many calls; returns the seconds that they took, by the clock
      and of the CPU.
    steps: steps of training (or evaluations of a penalty) in one call.
    facts: what is known without timing: bytes, parameters, seconds to compile.
  """

  run: Callable[[int], tuple[float, float]]
  steps: int = 1
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)


# ---------------------------------------------------------------------------
# Forms in JAX
# ---------------------------------------------------------------------------


def _bytes(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


def _program_bytes(compiled: Any) -> int | None:
  """Arguments, outputs and temporaries of a program, if the backend tells."""
  m = compiled.memory_analysis()
  if m is None:
    return None
  return (
    m.argument_size_in_bytes
    + m.output_size_in_bytes
    - m.alias_size_in_bytes
    + m.temp_size_in_bytes
  )


def _clock() -> np.ndarray:
  """Seconds by the clock and of the CPU, over all threads."""
  return np.asarray([time.perf_counter(), time.process_time()])


def _stepper(dispatch: Callable, state: Any, arrays: Any, steps: int) -> Form:
  """Compiles dispatch(state, arrays) -> (state, losses) into a form."""
  started = time.perf_counter()
  compiled = dispatch.lower(state, arrays).compile()
  compile_seconds = time.perf_counter() - started
  box = [state]  # each call consumes the state before it

  def run(calls: int) -> tuple[float, float]:
    started = _clock()
    for _ in range(calls):
      box[0], loss = compiled(box[0], arrays)
    jax.block_until_ready((box[0], loss))
    return tuple((_clock() - started).tolist())

  facts = {
    "peak_bytes": _program_bytes(compiled),
    "compile_seconds": compile_seconds,
  }
  return Form(run, steps, facts)


def _evaluator(function: Callable, *args: Any) -> Form:
  """Compiles a function without state into a form."""
  compiled = jax.jit(function).lower(*args).compile()

  def run(calls: int) -> tuple[float, float]:
    started = _clock()
    for _ in range(calls):
      out = compiled(*args)
    jax.block_until_ready(out)
    return tuple((_clock() - started).tolist())

  return Form(run)


def _plain_step(model: Any, tx: Any, batch_size: int) -> Callable:
  """The training step as a user of Flax would write it."""

  def step(state, arrays):
    start = state["step"] % BATCHES * batch_size
    i = jax.lax.dynamic_slice_in_dim(arrays["order"], start, batch_size)
    x = arrays["inputs"][i].astype(jnp.float32) / 255
    y = arrays["targets"][i]

    def objective(params):
      variables = {"params": params, "batch_stats": state["batch_stats"]}
      logits, updates = model.apply(
        variables, x, train=True, mutable=["batch_stats"]
      )
      loss = jnp.mean(losses.cross_entropy(logits, y))
      return loss, updates.get("batch_stats", {})

    grad = jax.value_and_grad(objective, has_aux=True)
    (loss, stats), grads = grad(state["params"])
    updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
    return {
      "step": state["step"] + 1,
      "params": optax.apply_updates(state["params"], updates),
      "batch_stats": stats,
      "opt_state": opt_state,
    }, loss

  return step


class Bench:
  """One network with its data and initial parameters, and its forms.

  Attributes:
    network: of `NETWORKS`.
    batch_size: examples of a step.
    steps: steps per dispatch.
    options: of the network's models.
  """

  def __init__(self, name: str, options: Options):
    """Makes data, models and initial parameters."""
    self.name, self.network = name, NETWORKS[name]
    self.batch_size = options.batch_size or self.network.batch_size
    default = 1 if jax.default_backend() == "cpu" else 16
    self.steps = options.steps_per_dispatch or default
    self.width = options.width if self.network.has_width else None
    self.options = dict(self.network.options)
    if self.width is not None:
      self.options["width"] = self.width
    model_options = {"num_classes": 10, "dtype": options.dtype, **self.options}
    self.model = models.MODELS[name](**model_options)
    self.plain = plain.NETWORKS[name](**model_options)
    self.tx = optax.sgd(LEARNING_RATE, momentum=0.9)
    n, rng = BATCHES * self.batch_size, np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *self.network.shape), dtype=np.uint8)
    self.arrays = {
      "inputs": jnp.asarray(images),
      "targets": jnp.asarray(rng.integers(0, 10, n, dtype=np.int32)),
      "order": data.epoch_order(0, 0, n),
    }
    x = jnp.zeros((1, *self.network.shape))
    variables = jax.jit(self.model.init)(jax.random.key(0), x)
    self.params = variables["params"]
    self.batch_stats = variables.get("batch_stats", {})
    self.layers = nn.layers(self.model, x)

  @functools.cached_property
  def factored(self) -> dict:
    """The initial parameters, factored at full rank."""
    return lowrank.decompose(self.params, [lowrank.Rule()], self.layers)

  def _fresh(self, params: Any) -> dict[str, Any]:
    """Copies what a training state starts from, as steps consume theirs."""
    params = jax.tree.map(jnp.copy, params)
    return {
      "step": jnp.zeros((), jnp.int32),
      "params": params,
      "batch_stats": jax.tree.map(jnp.copy, self.batch_stats),
      "opt_state": self.tx.init(params),
    }

  def _facts(self, state: Mapping[str, Any]) -> dict[str, Any]:
    parts = ("params", "opt_state", "batch_stats")
    return {
      "params": sum(x.size for x in jax.tree.leaves(state["params"])),
      "state_bytes": _bytes([state[part] for part in parts]),
    }

  def plain_form(self) -> Form:
    """The peer in plain Flax."""
    state = self._fresh(self.params)
    facts = self._facts(state)
    step = _plain_step(self.plain, self.tx, self.batch_size)
    dispatch = make_dispatch(step, self.steps)
    form = _stepper(dispatch, state, self.arrays, self.steps)
    form.facts |= facts
    return form

  def our_form(self, ours: Ours) -> Form:
    """Our step, see `OURS`."""
    params, ranks = self.params, {}
    if ours.fraction is not None:
      full = lowrank.full_ranks(self.factored)
      ranks = sampling.fixed(jax.random.key(0), full, fraction=ours.fraction)
      params = lowrank.truncate(self.factored, ranks)
    fresh = self._fresh(params)
    facts = self._facts(fresh)
    state = TrainState(
      **fresh,
      ranks=jax.tree.map(jnp.copy, ranks),
      key=jax.random.key_data(jax.random.key(1)),
      metrics=zero_metrics("cross_entropy"),
    )
    step = make_step(
      self.model,
      self.tx,
      loss="cross_entropy",
      preprocess=lambda x, key=None: x.astype(jnp.float32) / 255,
      sampler=ours.sampler,
      batch_size=self.batch_size,
      steps_per_epoch=BATCHES,
      lam=ours.lam,
      penalty=lowrank.group_lasso,
      full_pass=None,
      placement=Placement(make_mesh(MeshShape(data=1)), {}),
    )
    step = ops.prefer(ours.implementation)(step)
    dispatch = make_dispatch(step, self.steps)
    form = _stepper(dispatch, state, self.arrays, self.steps)
    form.facts |= facts
    return form

  def penalty_forms(self) -> dict[str, Form]:
    """The group lasso with its gradient, and what follows an epoch."""
    params, ranks = self.factored, lowrank.full_ranks(self.factored)

    def penalty(params, ranks):
      return LAM * lowrank.group_lasso(params, ranks)

    shrink = functools.partial(lowrank.shrink, threshold=1e-5)
    return {
      "penalty": _evaluator(jax.value_and_grad(penalty), params, ranks),
      "importance": _evaluator(shrink, params, ranks),
    }


# ---------------------------------------------------------------------------
# Forms in PyTorch
# ---------------------------------------------------------------------------


def _no_torch(options: Options) -> str | None:
  """Says why the PyTorch peers cannot run; None if they can."""
  if importlib.util.find_spec("torch") is None:
    return "PyTorch is not installed"
  if options.dtype not in (None, "bfloat16"):
    return f"they do not run in {options.dtype}"
  if jax.default_backend() == "cpu":
    return None
  if jax.default_backend() != "gpu":
    return "they run on CPUs and GPUs only"
  # Asked of another process: this one's memory is JAX's.
  probe = "import torch; assert torch.cuda.is_available()"
  found = subprocess.run([sys.executable, "-c", probe], capture_output=True)
  return "PyTorch finds no GPU" if found.returncode else None


def _torch_form(
  bench: Bench, factored: bool, dtype: str | None, stack: contextlib.ExitStack
) -> Form:
  """Starts a PyTorch peer, which ends with `stack`."""
  process = stack.enter_context(
    subprocess.Popen(
      [sys.executable, "-m", "benchmarks.torch_peer"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
  )

  def ask(question: dict) -> dict:
    print(json.dumps(question), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
      raise UserError(
        "the PyTorch peer ended; its error is above. Leave it out by --forms"
      )
    return json.loads(answer)

  facts = ask(
    {
      "network": bench.name,
      "factored": factored,
      "shape": bench.network.shape,
      "batch_size": bench.batch_size,
      "options": bench.options,
      "threads": cores(),
      "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
      "dtype": dtype or "float32",
    }
  )

  def run(calls: int) -> tuple[float, float]:
    answer = ask({"steps": calls})
    return answer["seconds"], answer["cpu_seconds"]

  return Form(run, 1, facts)


# ---------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------


def _forms(bench: Bench, options: Options, stack) -> dict[str, Form]:
  """Makes the forms that were asked for."""
  forms = {}
  for name in options.forms:
    if name == "plain":
      forms[name] = bench.plain_form()
    elif name in OURS:
      forms[name] = bench.our_form(OURS[name])
    elif name == "penalty":
      forms |= bench.penalty_forms()
    elif not _no_torch(options):
      forms[name] = _torch_form(bench, TORCH[name], options.dtype, stack)
  return forms


def interleave(
  forms: Mapping[str, Form], rounds: int, round_seconds: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, int]]:
  """Times forms round by round, in an order that is shuffled each time.

  Returns:
    {form: ms per step [rounds]}, the same of the CPU, and {form: steps in a
    round}.
  """
  calls = {}
  for name, form in forms.items():
    first, _ = form.run(1)  # it is slow, and may be all that a round takes
    once = form.run(1)[0] if first < round_seconds else first
    calls[name] = max(1, math.ceil(round_seconds / max(once, 1e-6)))
  steps = {name: calls[name] * form.steps for name, form in forms.items()}
  times: dict[str, list] = {name: [] for name in forms}
  rng = np.random.default_rng(0)
  for _ in range(rounds):
    for name in rng.permutation(list(forms)).tolist():
      seconds = np.asarray(forms[name].run(calls[name]))
      times[name].append(1e3 * seconds / steps[name])
  wall, cpu = (
    {name: np.asarray(ms)[:, i] for name, ms in times.items()} for i in (0, 1)
  )
  return wall, cpu, steps


def ratio(
  times: Mapping[str, np.ndarray], form: str, reference: str
) -> float | None:
  """Median over rounds of one form's time over another's; None if absent."""
  if form not in times or reference not in times:
    return None
  return float(np.median(times[form] / times[reference]))


def machine() -> dict[str, Any]:
  """Says where and from which source a measurement is."""
  device = jax.devices()[0]
  now = datetime.datetime.now(datetime.UTC)
  return {
    "device": f"{device.platform}: {device.device_kind}",
    "cores": cores(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "git": git_commit(),
    "date": now.isoformat(timespec="seconds"),
  }


def measure(name: str, options: Options) -> list[dict[str, Any]]:
  """Measures one network; returns a row per form, as in the JSON lines."""
  with contextlib.ExitStack() as stack:
    bench = Bench(name, options)
    forms = _forms(bench, options, stack)
    times, cpu, steps = interleave(forms, options.rounds, options.round_seconds)
  stats = jax.devices()[0].memory_stats() or {}
  common = {
    "benchmark": "train_step",
    "network": name,
    "batch_size": bench.batch_size,
    "width": bench.width,
    "dtype": options.dtype or "float32",
    "rounds": options.rounds,
    # Of the process, all forms together; None where the device keeps no count.
    "device_peak_bytes": stats.get("peak_bytes_in_use"),
    **machine(),
  }
  rows = []
  for form, ms in times.items():
    low, median, high = np.percentile(ms, [25, 50, 75]).tolist()
    rows.append(
      common
      | {
        "form": form,
        "steps_per_dispatch": forms[form].steps,
        "steps_per_round": steps[form],
        "ms": median,
        "quartiles_ms": [low, high],
        "cpu_ms": float(np.median(cpu[form])),
        "cpu_ratio_to_dense": ratio(cpu, form, "dense"),
      }
      | {
        f"ratio_to_{key}": ratio(times, form, reference)
        for key, _, reference in REFERENCES
      }
      | {
        "share_of_factored": ratio(times, form, "factored"),
        "cpu_share_of_factored": ratio(cpu, form, "factored"),
        "ratio_to_sampled": ratio(times, form, "sampled"),
      }
      | dict.fromkeys(
        ("params", "state_bytes", "peak_bytes", "compile_seconds", "torch")
      )
      | forms[form].facts
    )
  return rows


# ---------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Lays out the rows of one network as text."""
  first = rows[0]
  by_form = {row["form"]: row for row in rows}
  torch = next((f", PyTorch {r['torch']}" for r in rows if r["torch"]), "")
  lines = [
    f"{NETWORKS[first['network']].title}, batch {first['batch_size']},"
    f" {first['dtype']}, {first['device']}, {first['cores']} cores,"
    f" JAX {first['jax']}{torch}, {first['rounds']} rounds"
  ]

  def number(value, form, scale=1):
    return "-" if value is None else format(value / scale, form)

  cells = [
    [
      "form",
      "ms",
      "quartiles",
      *(heading for _, heading, _ in REFERENCES),
      "CPU ms",
      "/ dense",
      "state MB",
      "peak MB",
      "compile s",
    ]
  ]
  for form, row in by_form.items():
    if form in LABELS:
      low, high = row["quartiles_ms"]
      ratios = [row[f"ratio_to_{key}"] for key, _, _ in REFERENCES]
      cells.append(
        [
          LABELS[form],
          f"{row['ms']:.2f}",
          f"{low:.2f} - {high:.2f}",
          *(number(value, ".2f") for value in ratios),
          f"{row['cpu_ms']:.2f}",
          number(row["cpu_ratio_to_dense"], ".2f"),
          number(row["state_bytes"], ".1f", 1e6),
          number(row["peak_bytes"], ".1f", 1e6),
          number(row["compile_seconds"], ".1f"),
        ]
      )
  lines += align(cells)
  if "penalty" in by_form:
    lasso, shrink = by_form["penalty"], by_form["importance"]
    text = (
      f"alone: lasso and its gradient {lasso['ms']:.2f} ms, importance and"
      f" shrink {shrink['ms']:.2f} ms"
    )
    for key, unit in (("share", "clock"), ("cpu_share", "CPU time")):
      shares = [row[f"{key}_of_factored"] for row in (lasso, shrink)]
      if None not in shares:
        text += f"; {shares[0]:.1%} and {shares[1]:.1%} of a factored step"
        text += f" by {unit}"
    lines.append(text)
  if "lasso" in by_form and by_form["lasso"]["ratio_to_sampled"]:
    times = by_form["lasso"]["ratio_to_sampled"]
    lines.append(f"a step with the lasso over one without: {times:.3f}")
  return "\n".join(lines)


def figure(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Draws every form's time as a ratio to our dense step, a panel a network."""
  import matplotlib

  matplotlib.use("agg")
  import matplotlib.pyplot as plt

  networks = list(dict.fromkeys(row["network"] for row in rows))
  shown = [
    r for r in rows if r["form"] in LABELS and r["ratio_to_dense"] is not None
  ]
  if not shown:
    raise UserError('--figure: needs the form "dense", to which it compares')
  n = max(sum(r["network"] == name for r in shown) for name in networks)
  fig, axes = plt.subplots(
    1,
    len(networks),
    figsize=(1.4 + 2.8 * len(networks), 0.9 + 0.28 * n),
    sharey=True,
    squeeze=False,
    layout="constrained",
  )
  for axis, name in zip(axes[0], networks, strict=True):
    mine = [row for row in shown if row["network"] == name]
    labels = [LABELS[row["form"]].strip() for row in mine]
    values = [row["ratio_to_dense"] for row in mine]
    colours = [
      "0.55" if row["form"] in ("plain", *TORCH) else "tab:blue" for row in mine
    ]
    bars = axis.barh(labels, values, color=colours, height=0.7)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8, bbox=white)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlim(0, 1.18 * max(values))
    network, batch = NETWORKS[name].title, mine[0]["batch_size"]
    axis.set_title(f"{network}, batch {batch}", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0, 0].invert_yaxis()
  fig.supxlabel("time of a training step / ours, dense", fontsize=9)
  fig.savefig(path, dpi=150)
  plt.close(fig)


def append(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
  """Appends rows as JSON lines; makes the folder if need be.

  With no rows it checks, before anything is measured, that it can.

  Raises:
    UserError: it cannot.
  """
  path = pathlib.Path(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
      for row in rows:
        file.write(json.dumps(row) + "\n")
  except OSError as error:
    raise UserError(
      f"--out: cannot write {path} ({error.strerror}); name a file that can be"
      " written"
    ) from error


def main(argv: list[str]) -> None:
  """Measures what the flags say, network by network, and prints the tables."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  keys = ("networks", "forms", "batch_size", "rounds", "dtype")
  keys += ("steps_per_dispatch", "width")
  options = Options(**{key: values[key].value for key in keys})
  if values.smoke:
    options = dataclasses.replace(
      options, rounds=1, round_seconds=0.0, batch_size=8, width=8
    )
  why = _no_torch(options)
  if why and any(form in TORCH for form in options.forms):
    print(f"PyTorch peers are left out: {why}\n")
  rows: list[dict[str, Any]] = []
  if values.out:
    append([], values.out)
  for name in options.networks:
    new = measure(name, options)
    if values.out:
      append(new, values.out)
    print(table(new), end="\n\n", flush=True)
    rows += new
  if values.figure:
    figure(rows, values.figure)


def define_flags() -> None:
  """Defines the flags; called only as a program, as others use the names."""
  options = Options()
  flags.DEFINE_list("networks", list(options.networks), "Networks to measure.")
  flags.DEFINE_list("forms", list(options.forms), "Forms, see above.")
  flags.DEFINE_integer(
    "batch_size",
    None,
    "Examples per step; the default is 256 for LeNet, 64 for ResNet-18, 32 for"
    " VGG-19, 128 for the MLP.",
  )
  flags.DEFINE_integer("rounds", options.rounds, "Times each form is timed.")
  flags.DEFINE_string("dtype", None, "Of the computation; float32 if left out.")
  flags.DEFINE_integer(
    "steps_per_dispatch",
    None,
    "Steps per call of the device; the default is 1 on CPUs, else 16.",
  )
  flags.DEFINE_integer(
    "width", None, "Channels of the first stage; the networks' own are 64."
  )
  flags.DEFINE_bool("smoke", False, "One step of small networks, to try it.")
  flags.DEFINE_string("out", None, "File to append JSON lines to.")
  flags.DEFINE_string("figure", None, "File for bars of the ratios.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
