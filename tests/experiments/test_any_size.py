"""The any-size comparison: its configs, its table and its figure."""

import pytest

from experiments import any_size
from maestro.methods import nested
from maestro.training import build
from maestro.training.config import clock_of, parse


def result(value, macs=50, levels=(), score="accuracy"):
  return {
    "dense": {"params": 200, "macs": 100},
    "final": {"params": 90, "macs": macs, "metrics": {score: value}},
    "train": {"macs_total": 10 * macs},
    "levels": [
      {"name": f"macs:{x}", "macs": 100 * x, "metrics": {score: x}}
      for x in levels
    ],
  }


JOBS = [
  (name, *job)
  for name, network in any_size.NETWORKS.items()
  for job in any_size.jobs_of(list(network.epochs), network.levels)
]


def rates(network, row, percent):
  """(config, learning rates at parts of the run) of a job."""
  c = parse(any_size.get_config(f"{network},{row},{percent}").to_dict())
  build.check(c)
  assert c.method.budget == (
    None if percent == 100 else f"macs:{percent / 100}"
  )
  clock = clock_of(c, 1000)
  assert clock.total == 1000 * any_size.NETWORKS[network].epochs[row]
  schedule = build._schedule(c, clock)
  at = (0, 0.05, 0.5, 0.79, 0.81)
  return [float(schedule(int(f * clock.total))) for f in at]


@pytest.mark.parametrize(("network", "row", "percent"), JOBS)
def test_rows_share_their_epochs_and_learning_rates(network, row, percent):
  found = rates(network, row, percent)
  if network == "lenet":
    assert found == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.001])
  elif network == "resnet20":  # one line, wherever the phases meet
    assert found == pytest.approx([0.1, 0.095, 0.05, 0.021, 0.019])
  else:  # the same, after a short rise
    peak = {"shakespeare": 8e-3, "multi30k": 2e-3}[network]
    assert 0 < found[0] < 0.05 * peak
    line = [peak * (1 - f) for f in (0.05, 0.5, 0.79, 0.81)]
    assert found[1:] == pytest.approx(line, rel=0.03)


@pytest.mark.parametrize("network", any_size.NETWORKS)
def test_a_chain_has_the_levels_of_its_rivals(network):
  row = next(r for r in any_size.NETWORKS[network].epochs if "nested" in r)
  c = parse(any_size.get_config(f"{network},{row},100").to_dict())
  names = nested.options_of(c.method.nested).names
  levels = [f"macs:{p / 100:g}" for p in any_size.NETWORKS[network].levels]
  assert list(names) == ["macs:1", *levels]


@pytest.mark.parametrize("job", ["lenet,nested10,100", "resnet20,race,28"])
def test_smoke_is_short(job):
  c = parse(any_size.get_config(f"{job},smoke").to_dict())
  assert clock_of(c, 1).total == 2


def test_a_table_and_a_figure_of_some_rows(tmp_path):
  found = {
    ("dense", 100): [result(0.99, 100), result(0.988, 100)],
    ("race", 50): [result(0.97), result(0.95)],
    ("race", 25): [result(0.9, 25), result(0.9, 25)],
    ("nested10", 100): [result(1.0, 100, (1.0, 0.5))] * 2,
  }
  lines = any_size.table(found).splitlines()
  assert lines[0].startswith("| row | 100 % | 50 % | 25 % | training MACs")
  assert "| dense | 98.90 ± 0.14 |  |  | 1.00 | 2 |" in lines
  assert "| race |  | 96.00 ± 1.41 | 90.00 ± 0.00 | 0.75 | 2 |" in lines
  assert "| nested10 | 100.00 ± 0.00 | 50.00 ± 0.00 |  | 1.00 | 2 |" in lines
  any_size.draw(found).savefig(tmp_path / "figure.png")


def test_of_perplexities_the_lowest_is_best():
  found = {
    ("dense", 100): [result(9.0, 100, score="perplexity")],
    ("race", 50): [result(9.5, score="perplexity")],
    ("fixed", 50): [result(99.0, score="perplexity")],
  }
  assert "| race |  | 9.50 | 0.50 | 1 |" in any_size.table(found, "perplexity")
  figure = any_size.draw(found, 5.0, "perplexity")
  (axes,) = figure.axes
  labels = [text.get_text() for text in axes.get_legend().get_texts()]
  assert labels == ["dense", "race", "fixed: uniform ranks (99 at 50 %)"]
  assert axes.get_ylabel() == "test perplexity"


@pytest.mark.parametrize("network", any_size.NETWORKS.values())
def test_kept_results_are_complete(network):
  """Every file that is kept is of a row, and says what made it."""
  for (row, _), runs in any_size.kept(network).items():
    for one in runs:
      assert one["git"] and one["device"] and one["config"]["seed"] >= 0
      method = one["config"]["method"]
      assert row.startswith(method if isinstance(method, str) else "nested")
