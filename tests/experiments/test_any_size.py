"""The any-size comparison: its configs, its table and its figure."""

import pytest

from experiments import any_size
from maestro.training import build
from maestro.training.config import clock_of, parse


def result(accuracy, macs=50, levels=()):
  return {
    "dense": {"params": 200, "macs": 100},
    "final": {"params": 90, "macs": macs, "metrics": {"accuracy": accuracy}},
    "train": {"macs_total": 10 * macs},
    "levels": [
      {"name": f"macs:{x}", "macs": 100 * x, "metrics": {"accuracy": x}}
      for x in levels
    ],
  }


@pytest.mark.parametrize(
  ("row", "percent"), any_size.jobs_of(any_size.ROWS, any_size.LEVELS)
)
def test_rows_share_their_epochs_and_learning_rates(row, percent):
  c = parse(any_size.get_config(f"{row},{percent}").to_dict())
  build.check(c)
  clock = clock_of(c, 100)
  assert clock.total == (2000 if row == "nested20" else 1000)
  schedule = build._schedule(c, clock)
  rates = [float(schedule(int(f * clock.total))) for f in (0, 0.05, 0.79, 0.81)]
  assert rates == pytest.approx([0.01, 0.01, 0.01, 0.001])
  assert c.method.budget == (
    None if percent == 100 else f"macs:{percent / 100}"
  )


def test_smoke_is_short():
  c = parse(any_size.get_config("nested10,100,smoke").to_dict())
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


def test_kept_results_are_complete():
  """Every file that is kept is of a row, and says what made it."""
  for (row, _), runs in any_size.kept().items():
    for one in runs:
      assert one["git"] and one["device"] and one["config"]["seed"] >= 0
      assert row.startswith(one["config"]["method"])
