"""Races of profiles: fair, within their share, resumed to the same numbers."""

import copy
import signal

import jax
import numpy as np
import pytest

from maestro import trees
from maestro.errors import Interrupted
from maestro.report import figures
from maestro.runs import checkpoint, metrics
from maestro.schema import ConfigError
from maestro.training import build, loop
from maestro.training import race as racing
from maestro.training import state as state_lib
from maestro.training.config import parse

BASE = {
  "model": {"name": "mlp", "features": [24, 16]},
  "data": {"name": "digits"},
  "batch_size": 64,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "method": {"name": "race", "race": {"share": 0.3}},
  "budget": "macs:0.4",
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "settle": {
    "epochs": 4,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "checkpoint": {"keep": 9},
  "mesh": {"data": 1},
}


def config(**changes):
  return copy.deepcopy(BASE) | changes


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("race")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    return loop.train(config(), workdir), workdir


def leaves(workdir):
  step = max(checkpoint.list_steps(workdir / "checkpoints"))
  found, _ = checkpoint.load_leaves(workdir / "checkpoints", step)
  return {path: x.tobytes() for path, x in found.items()}


def test_the_winner_goes_on_and_the_budget_holds(finished):
  results, _ = finished
  last = results["race"]["heats"][-1]["candidates"]
  ranks = {row["path"]: row["rank"] for row in results["layers"]}
  assert ranks == last[0]["ranks"]
  assert last == sorted(last, key=lambda c: c["loss"])
  share = results["final"]["macs"] / results["dense"]["macs"]
  assert 0.36 < share <= 0.4


def test_heats_halve_the_field_and_double_the_steps(finished):
  results, _ = finished
  first, *rest = results["race"]["heats"]
  n, field = first["steps"], len(first["candidates"])
  if rest[0]["steps"] == n:  # neighbours, which join
    field += len(rest.pop(0)["candidates"])
  for factor, heat in zip((2, 4), rest, strict=True):
    field = -(-field // 2)
    assert heat["steps"] == factor * n and len(heat["candidates"]) == field


def test_what_the_race_costs_is_within_its_share_and_counted(finished):
  results, _ = finished
  total, cost = results["train"]["macs_total"], results["race"]
  assert 0 < cost["score_macs"] + cost["macs"] < 0.5 * total
  # The run itself: an epoch of the dense network, the rest at the winner's.
  steps = 5 * (1437 // 64)
  least = 3 * 64 * (steps // 5) * results["dense"]["macs"]
  assert total > least + cost["score_macs"] + cost["macs"]


def test_all_heats_of_a_shape_share_a_program(finished):
  results, _ = finished
  steps = [p for p in results["train"]["programs"] if p.startswith("settle")]
  assert len(steps) <= 4  # three heats, and the winner's own


@pytest.mark.quick(0)
def test_a_stopped_race_begins_anew_to_the_same_numbers(
  finished, tmp_path, monkeypatch
):
  whole, workdir = finished
  make, count = build.make_dispatch, 0

  def hooked(step, steps):
    dispatch = make(step, steps)

    def call(state, data):
      nonlocal count
      count += 1
      if count == 30:  # of 22 in discover
        signal.raise_signal(signal.SIGTERM)
      return dispatch(state, data)

    return call

  with monkeypatch.context() as patch:
    patch.setattr(build, "make_dispatch", hooked)
    with pytest.raises(Interrupted, match="within the race"):
      loop.train(config(), tmp_path)
  results = loop.train(config(), tmp_path)
  assert leaves(tmp_path) == leaves(workdir)
  assert results["race"] == whole["race"]
  assert results["train"]["macs_total"] == whole["train"]["macs_total"]
  steps = [r["step"] for r in metrics.read(tmp_path)]
  assert steps == [r["step"] for r in metrics.read(workdir)]


@pytest.mark.quick(0)
@pytest.mark.parametrize("regrow", [False, True])
def test_ranks_may_rise_above_every_proposal(regrow, tmp_path, monkeypatch):
  propose = racing.propose
  monkeypatch.setattr(
    racing,
    "propose",
    lambda *args: (
      [p for p in propose(*args) if p.name.endswith("r, sum")]
      + [p for p in propose(*args) if p.name == "data, sum"]
    ),
  )
  section = {"share": 0.3, "neighbours": 6, "regrow": regrow}
  method = {"name": "race", "race": section}
  results = loop.train(config(method=method), tmp_path)
  first, *heats = results["race"]["heats"]
  known = [c["ranks"] for c in first["candidates"]]
  assert len(known) == 2
  top = {path: max(r[path] for r in known) for path in known[0]}
  above = [
    c["ranks"][path] > top[path]
    for heat in heats
    for c in heat["candidates"]
    for path in top
  ]
  assert any(above) == regrow
  assert results["final"]["macs"] <= 0.4 * results["dense"]["macs"]


@pytest.mark.quick(0)
def test_a_candidate_trains_as_if_it_were_alone(finished):
  """In the shapes of another profile, and cut afterwards: the same steps."""
  _, workdir = finished
  t = build.make_training(parse(config()))
  discover, tx = t.clock.discover, t.optimizer(t.clock.discover)[1]
  with checkpoint.Checkpoints(workdir / "checkpoints", keep=9) as kept:
    _, extra = kept.shapes(discover)
    shapes, _ = kept.shapes(discover)
    abstract = jax.eval_shape(
      lambda p, s: t.new_state(tx, p, s, {}),
      shapes["params"],
      shapes["batch_stats"],
    )
    state, _ = kept.load(discover, abstract)
  ledger = racing.Ledger.load(extra["ledger"], t.clock)
  score = t.method.race.score(state.params, state.batch_stats, 128)
  ranks = {"fc1": 5, "fc2": 3, "fc3": 4}
  data = t.feed()(discover)
  found = []
  for shape in (ranks, {"fc1": 20, "fc2": 7, "fc3": 10}):
    one = racing.Proposal("one", ranks)
    s = racing._candidate(t, state, score, one, shape, ledger).state
    for _ in range(3):
      s, _ = t.program("settle", discover, 1)(s, data)
    found.append(state_lib.cut_to(tx, s, jax.device_get(s.ranks)))
  a, b = (jax.tree.leaves(s) for s in found)
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert trees.factored(found[0].params)["fc1"]["u"].shape == (64, 5)


def test_a_settle_phase_may_be_shorter_than_its_race(tmp_path):
  c = config()
  c["settle"] = c["settle"] | {"epochs": None, "length": "steps:5"}
  results = loop.train(c, tmp_path)
  assert results["steps"] == 21 and results["race"]["heats"]


@pytest.mark.quick(0)
def test_one_proposal_needs_no_race(tmp_path, capsys):
  results = loop.train(config(budget="macs:1.0"), tmp_path)
  assert results["race"]["heats"] == [] and results["race"]["macs"] == 0
  assert "none is needed" in capsys.readouterr().out


@pytest.mark.quick(0)
def test_a_profile_that_diverges_is_left_behind(tmp_path, monkeypatch, capsys):
  run_round, seen = racing.run_round, []

  def diverges(t, state, feed, ledger, until, *, writer, **rest):
    if "uniform" in writer._name:
      seen.append(None)
      raise racing.TrainingError("loss is nan")
    return run_round(t, state, feed, ledger, until, writer=writer, **rest)

  monkeypatch.setattr(racing, "run_round", diverges)
  results = loop.train(config(), tmp_path)
  assert seen and "uniform has diverged" in capsys.readouterr().out
  names = [c["name"] for h in results["race"]["heats"] for c in h["candidates"]]
  assert "uniform" not in names

  def all_diverge(*args, **options):
    raise racing.TrainingError("loss is nan")

  monkeypatch.setattr(racing, "run_round", all_diverge)
  with pytest.raises(racing.TrainingError, match="every profile"):
    loop.train(config(), tmp_path / "other")


BAD = {
  "no budget": ({"budget": None}, {"budget": None}, "budget: missing"),
  "too small": ({"budget": "macs:0.01"}, {}, "cannot be reached"),
  "above dense": ({"budget": "macs:1.5"}, {}, r"\(0, 1\]"),
  "no latency": ({"budget": "latency_ms:0"}, {}, "milliseconds"),
  "no number": ({"budget": "macs:half"}, {}, "kind:value"),
  "share": ({}, {"race": {"share": 0.0}}, "config.method.race.share"),
  "unknown": ({}, {"race": {"shares": 1}}, "did you mean 'share'"),
  "time": ({}, {"decompose": "start"}, "config.method.decompose"),
  "no layer": ({"rules": ()}, {}, "config.rules: no layer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_race_that_cannot_be_run_is_named_before_training(name, tmp_path):
  changes, pieces, match = BAD[name]
  method = BASE["method"] | pieces
  with pytest.raises(ConfigError, match=match):
    loop.train(config(method=method, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
