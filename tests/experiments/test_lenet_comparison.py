"""The comparison's configs, its table and its figure."""

import pytest

from experiments import lenet_comparison
from experiments.lenet_comparison import METHODS
from maestro.training import build
from maestro.training.config import clock_of, parse


def result(accuracy, macs=50):
  return {
    "dense": {"params": 200, "macs": 100},
    "final": {"params": 90, "macs": macs, "metrics": {"accuracy": accuracy}},
    "train": {"macs_total": 10 * macs},
    "wall_seconds": 7.0,
  }


def test_every_method_has_its_rows_and_they_share_all_but_the_method():
  rows = lenet_comparison.rows(METHODS)
  assert len(rows) == 2 + 2 * (len(METHODS) - 2)
  configs = []
  for name, percent in rows:
    config = lenet_comparison.get_config(f"{name},{percent}").to_dict()
    c = parse(config)
    build.check(c)
    assert c.method.name == name and clock_of(c, 1).total == 10
    budget = None if percent == 100 else f"macs:{percent / 100}"
    assert c.method.budget == budget
    configs.append({k: v for k, v in config.items() if k != "method"})
  assert all(c == configs[0] for c in configs)


def test_smoke_is_short():
  assert (
    clock_of(
      parse(lenet_comparison.get_config("svd,25,smoke").to_dict()), 1
    ).total
    == 2
  )


def test_a_table_and_a_figure_of_some_methods(tmp_path):
  results = {
    ("dense", 100): [result(0.99, 100), result(0.988, 100)],
    ("svd", 50): [result(0.97), result(0.95)],
    ("svd", 25): [result(0.5, 25), result(1.0, 25)],
  }
  table = lenet_comparison.table(results).splitlines()
  assert "| svd | 50 | 96.00 ± 1.41 | 90 | 50.0 | 0.50 | 7 | 2 |" in table
  assert "| dense |  | 98.90 ± 0.14 | 90 | 100.0 | 1.00 | 7 | 2 |" in table
  lenet_comparison.draw(results).savefig(tmp_path / "figure.png")
  one = {("svd", 50): [result(0.97)]}
  assert "| svd | 50 | 97.00 | 90 |" in lenet_comparison.table(one)


@pytest.mark.parametrize("name", lenet_comparison.UNBUDGETED)
def test_what_has_no_budget_is_run_once(name):
  assert lenet_comparison.rows([name]) == [(name, 100)]
