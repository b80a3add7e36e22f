"""Budgets of latency in a race: what is measured, kept, and met.

What was measured is in the workdir's latency.json before it decides anything,
so that a race that begins anew comes to the same numbers.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from maestro.cost.budget import NANOSECONDS, WHERE, Budget, Ranks, Tables
from maestro.cost.latency import make_measure
from maestro.cost.layer_latency import network_at, stored
from maestro.errors import UserError
from maestro.methods.proposals import Proposal
from maestro.methods.race import Options
from maestro.runs import workdir as workdir_lib
from maestro.training.build import Training
from maestro.training.state import TrainState, variables_of
from maestro.trees import Layers

_ROUNDS = 4  # of proposals that are measured
_AIM, _CLOSE = 0.98, 0.96  # of a budget: sought, and near enough
_SESSIONS, _TRIES = 3, 7  # that count, of which a network's slowest is taken
_STEADY = 0.05  # by which the dense network differs where a session counts

_Key = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Meter:
  """Measures networks at ranks, each once; remembers that in a file.

  In three sessions, of which the slowest counts, as a budget must hold. The
  dense one is measured along with them: it tells whether the machine is as busy
  as it was at first; else there are more sessions, up to seven.

  Attributes:
    measure: profiles -> milliseconds of their networks, taking turns.
    layers: of the model.
    facts: what they are measured on; other facts, other numbers.
    path: of the file.
  """

  measure: Callable[[Sequence[Ranks]], list[float]]
  layers: Layers
  facts: Mapping[str, Any]
  path: pathlib.Path

  @classmethod
  def of(
    cls,
    t: Training,
    options: Options,
    state: TrainState,
    workdir: pathlib.Path,
  ) -> "Meter":
    """Returns the meter of a run whose state is dense."""
    device = jax.devices()[0]  # one, whatever the mesh
    timed = make_measure(
      t.model,
      t.facts.example,
      batch_size=options.latency_batch_size,
      repeats=options.latency_repeats,
    )

    def measure(profiles: Sequence[Ranks]) -> list[float]:
      host = jax.device_get(variables_of(state))
      dense = jax.device_put(host, device)  # which all forms share
      return timed(
        [
          {**dense, "params": network_at(dense["params"], t.layers, ranks)}
          for ranks in profiles
        ]
      )

    facts = {
      "device": f"{device.platform}: {device.device_kind}",
      "jax": jax.__version__,
      "batch_size": options.latency_batch_size,
      "repeats": options.latency_repeats,
      "params": t.dense.params,
      "macs": t.dense.macs,
    }
    return cls(measure, t.layers, facts, workdir / "latency.json")

  def _key(self, ranks: Mapping[str, int]) -> _Key:
    return tuple(sorted(stored(self.layers, ranks).items()))

  def _known(self) -> dict[_Key, float]:
    """What the file holds of these facts; else {}, with a message."""
    if not self.path.exists():
      return {}
    try:
      kept = workdir_lib.read_json(self.path, keys={"networks": list})
      networks = kept.pop("networks")
      if kept != self.facts:
        raise UserError(f"{self.path} is of another network or device: {kept}")
      return {self._key(row["ranks"]): row["ms"] for row in networks}
    except (UserError, AttributeError, KeyError, TypeError) as error:
      print(f"{error}; latencies are measured anew")
      return {}

  def __call__(self, profiles: Sequence[Mapping[str, int]]) -> list[float]:
    """Returns milliseconds of networks; a layer without a rank is dense."""
    known, keys = self._known(), [self._key(ranks) for ranks in profiles]
    if new := [key for key in dict.fromkeys(keys) if key not in known]:
      found = self._steady(new, known.get(()))
      known |= {key: ms for key, ms in found.items() if key not in known}
      rows = [{"ranks": dict(key), "ms": ms} for key, ms in known.items()]
      workdir_lib.write_json(self.path, {**self.facts, "networks": rows})
    return [known[key] for key in keys]

  def _steady(
    self, keys: Sequence[_Key], dense: float | None
  ) -> dict[_Key, float]:
    """Measures networks while the dense one takes what it did, if it does."""
    forms = [(), *(key for key in keys if key)]
    sessions: list[list[float]] = []
    for _ in range(_TRIES):
      sessions.append(self.measure([dict(key) for key in forms]))
      usual = dense or statistics.median(times[0] for times in sessions)
      sessions.sort(key=lambda times, usual=usual: abs(times[0] - usual))
      kept = sessions[:_SESSIONS]
      steady = abs(kept[-1][0] - usual) <= _STEADY * usual
      if len(kept) == _SESSIONS and steady:
        break
    else:
      found = ", ".join(f"{times[0]:.4g}" for times in sessions)
      print(
        f"latency: the dense network took {usual:.4g} ms, then {found}; while a"
        " machine is busy with other things, budgets may not hold"
      )
    slowest = map(max, zip(*kept, strict=True))
    return dict(zip(forms, slowest, strict=True))

  def within(
    self, budget: Budget, proposals: Sequence[Proposal]
  ) -> list[Proposal]:
    """Measures proposals; returns those that meet a budget."""
    times = self([p.ranks for p in proposals])
    pairs = zip(proposals, times, strict=True)
    return [p for p, ms in pairs if ms <= budget.value]

  def record(
    self, budget: Budget, tables: Tables, ranks: Ranks
  ) -> dict[str, Any]:
    """What results.json tells of a winner."""
    measured, dense = self([ranks, {}])
    return {
      "budget_ms": budget.value,
      "dense_ms": dense,
      "measured_ms": measured,
      "predicted_ms": tables.total(ranks) / NANOSECONDS,
      "batch_size": self.facts["batch_size"],
      "device": self.facts["device"],
      "networks_measured": len(self._known()),
    }

  def refusal(self, budget: Budget, tried: Sequence[Ranks]) -> UserError:
    """Says that no profile tried meets a budget, and what can be done."""
    (dense,), least, facts = self([{}]), min(self(tried)), self.facts
    where = f"a batch of {facts['batch_size']} on {facts['device']}"
    return UserError(
      f"{WHERE}: budget {budget} cannot be reached: for {where}, the fastest"
      f" network tried takes {least:.4g} ms, the dense one {dense:.4g} ms."
      " Raise the budget, in a new workdir; a larger"
      " config.method.race.latency_batch_size leaves more to save, if such"
      " batches will be served"
    )


def meeting(
  offer: Callable[[int], list[Proposal]],
  tables: Tables,
  limit: int,
  budget: Budget,
  meter: Meter,
) -> tuple[list[Proposal], int]:
  """Returns proposals that meet a budget as measured, and the model's limit.

  The limit is moved by what the slowest proposal misses the budget by, in at
  most four rounds; of each name, the largest that met the budget is left.

  Args:
    offer: limit -> proposals, by the tables.
    tables: the model.
    limit: to begin with.
    budget: of latency_ms.
    meter: of networks.

  Raises:
    UserError: none meets it.
  """
  low, high = tables.total(tables.smallest), tables.total(tables.whole)
  found: dict[str, Proposal] = {}
  tried = [tables.smallest]
  for _ in range(_ROUNDS):
    proposals = offer(limit)
    tried += [p.ranks for p in proposals]
    for p in meter.within(budget, proposals):
      best = found.setdefault(p.name, p)
      if tables.total(p.ranks) > tables.total(best.ranks):
        found[p.name] = p
    slowest = max(meter([p.ranks for p in proposals]))
    moved = limit + round((_AIM * budget.value - slowest) * NANOSECONDS)
    moved = min(max(moved, low), high)
    close = _CLOSE * budget.value <= slowest <= budget.value
    if close or moved == limit:
      break
    limit = moved
  if not found:
    found = {
      p.name: p
      for p in meter.within(budget, [Proposal("smallest", tables.smallest)])
    }
  if not found:
    raise meter.refusal(budget, tried)
  distinct: dict[tuple, Proposal] = {}
  for p in found.values():  # the first of equals keeps its name
    distinct.setdefault(tuple(sorted(p.ranks.items())), p)
  left = list(distinct.values())
  return left, max(tables.total(p.ranks) for p in left)
