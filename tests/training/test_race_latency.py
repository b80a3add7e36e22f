"""Races for a budget of latency: met as measured, resumed to the same numbers.

The clock is a function of shapes, but for one run.
"""

import copy
import json
import math
import signal

import jax
import pytest

from maestro.cost import layer_latency
from maestro.cost.budget import Budget
from maestro.errors import Interrupted, UserError
from maestro.methods.proposals import Proposal
from maestro.report import figures, tables
from maestro.runs import checkpoint
from maestro.runs import workdir as workdir_lib
from maestro.schema import ConfigError
from maestro.training import build, latency, loop
from maestro.training.config import parse

BASE = {
  "model": {"name": "mlp", "features": [48, 32]},
  "data": {"name": "digits"},
  "batch_size": 64,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "method": {"name": "race", "race": {"share": 0.3, "latency_batch_size": 8}},
  "budget": "latency_ms:4",
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "settle": {
    "epochs": 3,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "checkpoint": {"keep": 9},
  "mesh": {"data": 1},
}
NUMBERS = 64 * 48 + 48 * 32 + 32 * 10


def config(**changes):
  return copy.deepcopy(BASE) | changes


def clock(bend=1.2, drift=0.0):
  """Returns a fake of make_measure, and what each call was given.

  1 + 5 x^bend ms at a fraction x of the kernels' numbers: sums of single
  layers' savings are wrong unless bend is 1. Each call is slower by drift.
  """
  calls = []

  def measure(forms):
    calls.append(len(forms))
    times = []
    for form in forms:
      sizes = [x.size for x in jax.tree.leaves(form["params"]) if x.ndim > 1]
      x = sum(sizes) / NUMBERS
      times.append(1 + 5 * x**bend + drift * len(calls))
    return times

  def make(model, example, *, batch_size, repeats):
    assert (batch_size, repeats) == (8, 30) and example.shape == (1, 8, 8, 1)
    return measure

  return make, calls


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)


@pytest.fixture(scope="module")
def layers():
  return build.make_training(parse(config())).layers


def run(monkeypatch, workdir, measure, **changes):
  with monkeypatch.context() as patch:
    patch.setattr(latency, "make_measure", measure)
    return loop.train(config(**changes), workdir)


def leaves(workdir):
  step = max(checkpoint.list_steps(workdir / "checkpoints"))
  found, _ = checkpoint.load_leaves(workdir / "checkpoints", step)
  return {path: x.tobytes() for path, x in found.items()}


def measured(workdir):
  kept = workdir_lib.read_json(workdir / "latency.json")
  return {json.dumps(n["ranks"]): n["ms"] for n in kept["networks"]}


def factors(results):
  return {
    row["path"]: row["rank"]
    for row in results["layers"]
    if row["form"] == "factored"
  }


@pytest.mark.quick(0)
@pytest.mark.parametrize("bend", [1.0, 1.5, 0.6])
def test_a_budget_is_met_as_measured_and_used(
  bend, tmp_path, monkeypatch, layers
):
  measure, calls = clock(bend)
  results = run(monkeypatch, tmp_path, measure)
  found = results["race"]["latency"]
  times = measured(tmp_path)
  assert found["budget_ms"] == 4 and found["dense_ms"] == 6
  assert found["measured_ms"] == times[json.dumps(factors(results))]
  assert 0.9 * 4 < found["measured_ms"] <= 4
  if bend == 1:
    assert found["predicted_ms"] == pytest.approx(found["measured_ms"], 0.01)
  candidates = [
    c for heat in results["race"]["heats"] for c in heat["candidates"]
  ]
  assert len({c["name"] for c in candidates}) > 1
  for c in candidates:
    ranks = layer_latency.stored(layers, c["ranks"])
    assert times[json.dumps(dict(sorted(ranks.items())))] <= 4
  # 1 + 3 * 5 for the tables, the fastest of these, at most four rounds, and the
  # neighbours; each in three sessions, the dense network in all of them.
  calls = calls[::3]
  assert calls[0] == 16 and len(calls) <= 7
  assert found["networks_measured"] == len(times) == sum(calls) - len(calls) + 1
  assert (found["batch_size"], found["device"]) == (8, "cpu: cpu")


@pytest.mark.quick(0)
def test_a_stopped_race_is_resumed_by_what_was_measured(tmp_path, monkeypatch):
  whole, calls = clock(drift=0.01)
  expected = run(monkeypatch, tmp_path / "whole", whole)
  made = build.make_dispatch
  again, other = clock(drift=0.01)

  def stop_at(n):
    count = 0

    def hooked(step, steps):
      dispatch = made(step, steps)

      def call(state, data):
        nonlocal count
        count += 1
        if count == n:  # of 16 in discover
          signal.raise_signal(signal.SIGTERM)
        return dispatch(state, data)

      return call

    return hooked

  for n in (18, 2):
    with monkeypatch.context() as patch:
      patch.setattr(build, "make_dispatch", stop_at(n))
      with pytest.raises(Interrupted, match="within the race"):
        run(monkeypatch, tmp_path / "cut", again)
  before = measured(tmp_path / "cut")
  results = run(monkeypatch, tmp_path / "cut", again)
  # Neighbours alone were left to be measured, if they came after the stop.
  assert len(other) == len(calls)
  after = measured(tmp_path / "cut")
  assert {key: after[key] for key in before} == before
  assert after == measured(tmp_path / "whole")
  assert results["race"] == expected["race"]
  assert leaves(tmp_path / "cut") == leaves(tmp_path / "whole")


def test_a_budget_too_small_is_named(tmp_path, monkeypatch):
  measure, _ = clock()
  with pytest.raises(UserError) as error:
    run(monkeypatch, tmp_path, measure, budget="latency_ms:0.5")
  message = str(error.value)
  least = min(measured(tmp_path).values())
  assert "config.budget, or config.method.budget" in message
  assert f"{least:.4g} ms" in message and "the dense one 6 ms" in message
  assert "Raise" in message and 1 < least < 2
  assert not (tmp_path / "metrics.jsonl").exists()  # before anything is trained


@pytest.mark.quick(0)
@pytest.mark.parametrize("ms", [6, 100])
def test_a_budget_above_the_dense_network_is_the_whole(
  ms, tmp_path, monkeypatch
):
  measure, _ = clock()
  results = run(monkeypatch, tmp_path, measure, budget=f"latency_ms:{ms}")
  assert results["race"]["heats"] == [] and not factors(results)
  assert results["final"]["macs"] == results["dense"]["macs"]
  assert results["race"]["latency"]["measured_ms"] == 6


@pytest.mark.quick(0)
def test_where_factors_are_slower_layers_stay_dense(tmp_path, monkeypatch):
  def measure(forms):
    slow = ("fc2", "fc3")
    return [
      6
      - 0.04
      * (48 - form["params"]["fc1"].get("u", jax.numpy.ones(48)).shape[-1])
      + sum("u" in form["params"][path] for path in slow)
      for form in forms
    ]

  def make(model, example, **options):
    return measure

  results = run(monkeypatch, tmp_path, make, budget="latency_ms:5")
  assert list(factors(results)) == ["fc1"]
  assert results["race"]["latency"]["measured_ms"] <= 5


@pytest.mark.parametrize("harm", ["damaged", "foreign", "malformed"])
def test_a_file_that_cannot_be_used_is_measured_anew(
  harm, tmp_path, layers, capsys
):
  path = tmp_path / "latency.json"
  count = []

  def measure(profiles):
    count.append(len(profiles))
    return [float(len(ranks)) for ranks in profiles]

  meter = latency.Meter(measure, layers, {"device": "a"}, path)
  profiles = [{}, {"fc1": 3}, {"fc1": 48, "fc2": 2}]
  assert meter(profiles) == meter(profiles) == [0.0, 1.0, 1.0]
  assert meter([{"fc1": 48}, {"fc2": 2}]) == [0.0, 1.0]  # merged, known
  assert count == [3] * 3 and capsys.readouterr().out == ""
  if harm == "damaged":
    path.write_text(path.read_text().replace("1.0", "0.1"))
  elif harm == "malformed":
    workdir_lib.write_json(path, {"device": "a", "networks": [{"ms": 1}]})
  else:
    meter = latency.Meter(measure, layers, {"device": "b"}, path)
  assert meter(profiles) == [0.0, 1.0, 1.0] and count == [3] * 6
  assert "measured anew" in capsys.readouterr().out
  assert meter(profiles) == [0.0, 1.0, 1.0] and count == [3] * 6


def test_a_busy_machine_is_measured_again(tmp_path, layers, capsys):
  # The slowest of three; two of five left out; the nearest three of seven.
  text = "1 1.02 1  1.5 1.04 0.5 1 1.07  1.2 1.5 1.3 1.6 0.5 1.7 0.9"
  load = map(float, text.split())

  def measure(profiles):
    now = next(load)
    return [now * (5 - len(ranks)) for ranks in profiles]

  meter = latency.Meter(measure, layers, {}, tmp_path / "latency.json")
  assert meter([{}, {"fc1": 3}]) == [1.02 * 5, 1.02 * 4]
  assert meter([{"fc2": 3}]) == [1.07 * 4]
  assert "busy" not in capsys.readouterr().out
  assert meter([{"fc2": 4}]) == [1.3 * 4]
  assert "busy" in capsys.readouterr().out
  assert meter([{}, {"fc1": 3}]) == [1.02 * 5, 1.02 * 4]
  assert next(load, None) is None


def test_proposals_that_never_fit_are_dropped(tmp_path, layers):
  """One name's networks are slower than any table says."""

  def measure(profiles):
    return [
      6
      - sum(1.5 * (1 - r / 100) for r in ranks.values())
      + 9 * (ranks.get("fc1") == 7)
      for ranks in profiles
    ]

  limits = {path: spec.full_rank for path, spec in layers.items()}
  facts = {"device": "a", "batch_size": 1}
  meter = latency.Meter(measure, layers, facts, tmp_path / "latency.json")
  costs = layer_latency.latency_tables(layers, limits, meter)
  bad = Proposal("bad", {"fc1": 7, "fc2": 32, "fc3": 10})
  good = Proposal("good", {"fc1": 5, "fc2": 32, "fc3": 10})
  twin = Proposal("twin", dict(good.ranks))
  budget = Budget.parse("latency_ms:5")
  left, limit = latency.meeting(
    lambda limit: [bad, good, twin], costs, 5_000_000, budget, meter
  )
  assert left == [good] and limit == costs.total(good.ranks)
  left, _ = latency.meeting(
    lambda limit: [bad], costs, 5_000_000, budget, meter
  )
  assert left == [Proposal("smallest", costs.smallest)]
  with pytest.raises(UserError, match="cannot be reached"):
    budget = Budget.parse("latency_ms:1")
    latency.meeting(lambda limit: [bad], costs, 1_000_000, budget, meter)


@pytest.mark.parametrize("name", ["maestro", "fixed", "svd"])
def test_other_methods_refuse_a_latency(name, tmp_path):
  with pytest.raises(ConfigError, match="another kind"):
    loop.train(config(method=name), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_options_are_counts(tmp_path):
  for key in ("latency_batch_size", "latency_repeats"):
    method = {"name": "race", "race": {key: 0}}
    with pytest.raises(ConfigError, match=f"config.method.race.{key}"):
      loop.train(config(method=method), tmp_path / "run")


@pytest.mark.quick(0)
def test_reports_name_the_budget(tmp_path, monkeypatch):
  results = run(monkeypatch, tmp_path, clock()[0])
  results["workdir"] = str(tmp_path)
  assert "race latency_ms:4" in tables.compare([results])


@pytest.mark.quick(0)
def test_a_real_clock(tmp_path):
  """Says nothing of how fast anything is."""
  method = {"name": "race", "race": {"latency_repeats": 1}}
  c = config(method=method, budget="latency_ms:1000", mesh={"data": 2})
  found = loop.train(c, tmp_path)["race"]["latency"]
  times = found["dense_ms"], found["measured_ms"], found["predicted_ms"]
  assert all(math.isfinite(ms) and ms > 0 for ms in times)
  # The tables' networks, and the fastest by them, if it is none of these.
  assert found["networks_measured"] in (16, 17)
