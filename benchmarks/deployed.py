"""Latency of a network cut to half of its MACs, against its dense form.

  python -m benchmarks.deployed                      # ResNet-18 and VGG-19
  python -m benchmarks.deployed --networks=lenet --fractions=0.5,0.25
  python -m benchmarks.deployed --smoke

Random weights, as values do not matter for time: decomposed, cut by the rule
"uniform" to fractions of the dense MACs, with ranks that are multiples of
--multiple_of (16; odd ranks leave vectors unfilled), and extracted, which
merges layers where dense is cheaper. Dense, factored at full rank, truncated
and extracted networks take turns, pass by pass, at batch 1 and 64. Then a
latency budget of --latency (0.8) times the dense network's median is asked for
at batch 1, and the network that it leads to joins the others; it was within the
budget when it was measured alone, without others between that empty the caches.

--out appends one JSON line a form; without it nothing is written.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import train_step
from maestro import cli, lowrank, models
from maestro import introspect as nn
from maestro.cost import count as cost
from maestro.cost.latency import measure_latencies
from maestro.deploy import choose as allocate
from maestro.errors import UserError
from maestro.report import tables as report
from maestro.training import build, opened

INPUTS = {"lenet": (28, 28, 1), "resnet18": (32, 32, 3), "vgg19": (32, 32, 3)}
BATCHES = (1, 64)


def random_run(network: str, width: int | None = None) -> opened.Run:
  """Returns a run that nobody trained: random factors at full rank."""
  options = {} if width is None or network == "lenet" else {"width": width}
  model = models.MODELS[network](num_classes=10, **options)
  shape = INPUTS[network]
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  layers = nn.layers(model, x)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  params = jax.eval_shape(
    lambda p: lowrank.decompose(p, [lowrank.Rule()], layers), shapes["params"]
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: 0.05 * rng.standard_normal(a.shape, np.float32), params
  )
  stats = jax.tree.map(
    lambda a: np.ones(a.shape, np.float32), shapes.get("batch_stats", {})
  )
  facts = build.Facts("random", shape, "float32", 10, None, 0)
  return opened.Run(
    workdir=pathlib.Path("random"),
    config=None,  # nothing here reads it
    facts=facts,
    model=model,
    layers=layers,
    step=0,
    params=params,
    batch_stats=stats,
    ranks=jax.device_get(lowrank.full_ranks(params, layers)),
  )


def measure(
  network: str,
  fractions: Sequence[float],
  *,
  repeats: int,
  latency: float,
  multiple_of: int = 16,
  width: int | None = None,
) -> list[dict[str, Any]]:
  """Measures all forms of one network; see the file's docstring.

  Args:
    network: a key of `INPUTS`.
    fractions: of the dense network's MACs.
    repeats: passes of each form.
    latency: budget, as a fraction of the dense network's latency.
    multiple_of: of the ranks, but for whole layers.
    width: channels of the first stage, None for the network's own.

  Returns:
    A row for each form, with its latencies and ratios to dense.
  """
  run = random_run(network, width)
  norms = {"batch_stats": run.batch_stats} if run.batch_stats else {}
  params = jax.device_put(run.params)
  # Jitted: one compilation, where op by op there would be hundreds.
  dense = jax.jit(lambda p: lowrank.merge(p, run.layers))(params)
  forms = {"dense": dense, "factored, full rank": params}

  def cut(name: str, ranks: Any) -> None:
    forms[name] = jax.jit(lambda p: lowrank.extract(p, ranks, run.layers))(
      params
    )

  for fraction in fractions:
    text = f"macs:{fraction:g}"
    ranks = allocate.choose_ranks(
      run, text, rule="uniform", multiple_of=multiple_of
    )
    forms[f"truncated, {text}"] = lowrank.truncate(params, ranks)
    cut(f"extracted, {text}", ranks)
  example = run.facts.example
  first = measure_latencies(
    run.model, [{"params": dense, **norms}], example, repeats=repeats
  )[0]
  budget = f"latency_ms:{latency * first:.4g}"
  ranks = allocate.choose_ranks(
    run,
    budget,
    rule="uniform",
    latency_repeats=repeats,
    multiple_of=multiple_of,
  )
  cut(f"extracted, {budget}", ranks)
  times = {
    batch: measure_latencies(
      run.model,
      [{"params": form, **norms} for form in forms.values()],
      example,
      batch_size=batch,
      repeats=repeats,
    )
    for batch in BATCHES
  }
  rows = []
  for i, (name, form) in enumerate(forms.items()):
    size = cost.count_cost(run.layers, form)
    rows.append(
      {
        "benchmark": "deployed",
        "network": network,
        "form": name,
        "params": size.params,
        "macs": size.macs,
        "latency_ms": {str(b): times[b][i] for b in BATCHES},
        "ratio_to_dense": {str(b): times[b][i] / times[b][0] for b in BATCHES},
        "repeats": repeats,
        "multiple_of": multiple_of,
        **train_step.machine(),
      }
    )
  return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Lays out the rows of one network as text."""
  first = rows[0]
  cells = [["form", "MACs", "parameters"]]
  for batch in BATCHES:
    cells[0] += [f"ms, batch {batch}", "/ dense"]
  for row in rows:
    share = f"{100 * row['macs'] / first['macs']:.1f} %"
    cells.append([row["form"], share, f"{row['params']:,}"])
    for batch in BATCHES:
      cells[-1] += [
        f"{row['latency_ms'][str(batch)]:.3f}",
        f"{row['ratio_to_dense'][str(batch)]:.2f}",
      ]
  head = (
    f"{first['network']}, float32, {first['device']}, {first['cores']} cores,"
    f" JAX {first['jax']}, median of {first['repeats']} passes"
  )
  return f"{head}\n{report.text_table(cells)}"


def main(argv: list[str]) -> None:
  """Measures what the flags ask for."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  networks = ["lenet"] if values.smoke else values.networks
  if unknown := set(networks) - set(INPUTS):
    raise UserError(
      f"--networks: {sorted(unknown)} are unknown; known: {sorted(INPUTS)}"
    )
  try:
    fractions = [float(x) for x in values.fractions]
  except ValueError as error:
    raise UserError(f"--fractions: {error}") from error
  for network in networks:
    rows = measure(
      network,
      fractions,
      repeats=5 if values.smoke else values.repeats,
      latency=values.latency,
      multiple_of=values.multiple_of,
    )
    print(f"{table(rows)}\n", flush=True)
    if values.out:
      train_step.append(rows, values.out)


def define_flags() -> None:
  """Defines the command's flags."""
  flags.DEFINE_list("networks", ["resnet18", "vgg19"], "Of lenet, ... vgg19.")
  flags.DEFINE_list("fractions", ["0.5"], "Budgets, of the dense MACs.")
  flags.DEFINE_float("latency", 0.8, "Budget, of the dense latency.")
  flags.DEFINE_integer("multiple_of", 16, "Of the ranks.", lower_bound=1)
  flags.DEFINE_integer("repeats", 50, "Forward passes of each form.")
  flags.DEFINE_bool("smoke", False, "LeNet, five passes, to try it.")
  flags.DEFINE_string("out", None, "File to append JSON lines to.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
