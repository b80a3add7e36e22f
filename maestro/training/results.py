"""What a run counts, warns of and leaves behind: results.json."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from maestro import lowrank, trees
from maestro.cost import count as cost
from maestro.errors import UserError
from maestro.methods.bind import Bound
from maestro.runs import workdir as workdir_lib
from maestro.runs.provenance import git_commit
from maestro.training.durations import Clock
from maestro.training.state import TrainState
from maestro.trees import Layers


@dataclasses.dataclass
class Ledger:
  """What a run counts on the host; saved with every checkpoint.

  Attributes:
    programs: train steps and evaluations compiled so far, by form. A resumed
      process compiles again, which is not counted.
    macs: multiply-accumulates of all training steps: a forward and a backward
      pass taken as three forward passes, at the ranks that are stored.
    examples: training examples seen.
    train_seconds: time in training steps.
    wall_seconds: time of the whole run, less what killed processes lost.
    alarms: what a user should know, in words.
    discover_steps: length of the discover phase; a method may end it early.
    ranks: {layer: rank} right after decomposition.
    stable_ranks: of the last epoch, if the method looks at them.
    sums: of training metrics, over the epoch's windows that were written.
    race: what a race between profiles cost and found; {} without one.
    replaced: training examples that stood for others that could not be read.
  """

  discover_steps: int
  programs: list[str] = dataclasses.field(default_factory=list)
  macs: int = 0
  examples: int = 0
  train_seconds: float = 0.0
  wall_seconds: float = 0.0
  alarms: list[str] = dataclasses.field(default_factory=list)
  ranks: dict[str, Any] = dataclasses.field(default_factory=dict)
  stable_ranks: dict[str, float] = dataclasses.field(default_factory=dict)
  sums: dict[str, float] = dataclasses.field(default_factory=dict)
  race: dict[str, Any] = dataclasses.field(default_factory=dict)
  replaced: int = 0

  @classmethod
  def load(cls, saved: Mapping[str, Any], clock: Clock) -> "Ledger":
    """Reads what a checkpoint has; older ones count discover in epochs."""
    known: dict[str, Any] = {"discover_steps": clock.discover} | dict(saved)
    if "discover_epochs" in saved:
      epochs = known.pop("discover_epochs")
      known["discover_steps"] = epochs * clock.steps_per_epoch
    return cls(**known)

  def compiles(self, name: str) -> None:
    if name not in self.programs:
      self.programs.append(name)

  def phase(self, step: int) -> str:
    """The phase that makes a step, "discover" or "settle"."""
    return "discover" if step < self.discover_steps else "settle"


def rank_text(ranks: Any) -> str:
  flat = trees.flatten_ranks(ranks)
  if not flat:
    return ""
  total = sum(int(np.sum(r)) for r in flat.values())
  return f" rank {total}"


def rank_record(layers: Layers, state: TrainState) -> dict[str, Any]:
  """Ranks of all layers, and the network's cost at them."""
  ranks = jax.device_get(state.ranks)
  now = cost.count_cost(layers, state.params, ranks)
  record = {"cost/params": now.params, "cost/macs": now.macs}
  flat = trees.flatten_ranks(ranks)
  if flat:
    record |= {f"rank/{path}": int(np.sum(r)) for path, r in flat.items()}
    record["rank/total"] = sum(int(np.sum(r)) for r in flat.values())
  return record


def alarms_of(
  method: Bound,
  ledger: Ledger,
  layers: Layers,
  state: TrainState,
  shrunk: bool,
) -> Iterator[str]:
  """Says what a user should not find out by accident.

  Args:
    method: of the run.
    ledger: whose ranks are those right after decomposition.
    layers: of the model.
    state: at the end of an epoch.
    shrunk: whether a discover phase that shrinks ranks ends here.
  """
  flat = trees.flatten_ranks(jax.device_get(state.ranks))
  for path, rank in flat.items():
    has_kernel = layers[path].weight in trees.get(state.params, path)
    if not np.all(rank) and not has_kernel:
      yield (
        f"layer {path} has died: it has rank 0 and outputs its bias alone."
        f" Lower {method.lam_key}, or keep the layer dense by a rule with"
        " decompose=False"
      )
  if not (shrunk and flat):
    return
  if all(np.all(rank == ledger.ranks[path]) for path, rank in flat.items()):
    scores = lowrank.importance(state.params, state.ranks)
    least = min(float(np.min(x)) for x in jax.device_get(scores).values())
    text = (
      "no rank has moved while discovering: the least important component"
      f" scores {least:.1e}. Raise {method.lam_key} or config.discover.epochs"
    )
    if method.threshold is not None:
      text += (
        f"; config.threshold is {method.threshold:g}: if lambda is large"
        " already, it lies below the floor of order (learning rate *"
        " lambda)^2: raise it"
      )
    yield text


def results_of(
  config: Mapping[str, Any],
  ledger: Ledger,
  layers: Layers,
  dense: cost.Cost,
  final: trees.Tree,
  state: TrainState,
  metrics: Mapping[str, Mapping[str, float]],
) -> dict:
  """Assembles results.json; see docs/method.md for its fields.

  Args:
    config: as it was given.
    ledger: what the run has counted.
    layers: of the model.
    dense: cost of the dense network.
    final: the deployable parameters.
    state: that they were cut from.
    metrics: {"val": ..., "test": ...} of the final network.
  """
  final_cost = cost.count_cost(layers, final)
  flat = trees.flatten_ranks(jax.device_get(state.ranks))
  device = jax.devices()[0]
  rows = []
  for row, whole in zip(final_cost.layers, dense.layers, strict=True):
    rank = np.asarray(flat[row.path]).tolist() if row.path in flat else None
    rows.append(
      {
        "path": row.path,
        "rank": rank,
        "full_rank": None if rank is None else row.full_rank,
        "params": row.params,
        "macs": row.macs,
        "form": row.form,
        "dense_params": whole.params,
        "dense_macs": whole.macs,
      }
    )
  return {
    "config": json.loads(json.dumps(workdir_lib.plain(config))),
    "git": git_commit(),
    "device": f"{device.platform}: {device.device_kind}",
    "jax": jax.__version__,
    "seed": config.get("seed", 0),
    "steps": int(state.step),
    "wall_seconds": ledger.wall_seconds,
    "dense": {"params": dense.params, "macs": dense.macs},
    "final": {
      "params": final_cost.params,
      "macs": final_cost.macs,
      "bytes": final_cost.bytes,
      "metrics": metrics["test"],
      "val_metrics": metrics["val"],
    },
    "layers": rows,
    "train": {
      "examples_per_second": ledger.examples / max(ledger.train_seconds, 1e-9),
      "macs_total": ledger.macs,
      "compilations": len(ledger.programs),
      "programs": ledger.programs,
    }
    | ({"replaced": ledger.replaced} if ledger.replaced else {}),
    "alarms": ledger.alarms,
  } | ({"race": ledger.race} if ledger.race else {})


def write_spectra(workdir: pathlib.Path, name: str, state: TrainState) -> None:
  """Adds the importances of all components to importance.json."""
  if not state.ranks:
    return
  path = workdir / "importance.json"
  spectra = {}
  if path.exists() and name != "start":
    try:
      spectra = workdir_lib.read_json(path)
    except UserError as error:
      print(f"{error}; begun anew without the earlier spectra")
  scores = jax.device_get(lowrank.importance(state.params, state.ranks))
  # Stacked and grouped layers show their mean spectrum.
  spectra[name] = {
    layer: np.mean(x, axis=tuple(range(x.ndim - 1))).tolist()
    for layer, x in scores.items()
  }
  workdir_lib.write_json(path, spectra)
