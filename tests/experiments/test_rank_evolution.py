"""Tests how the rank-evolution figure reads its runs and counts nestedness."""

import json

import pytest

from experiments import rank_evolution, runs
from maestro.errors import UserError


def _metrics(ranks):
  """Records as a run writes them; records within an epoch have no ranks."""
  records = [{"step": 0, "epoch": 0, "rank/fc": ranks[0]}]
  for epoch, rank in enumerate(ranks[1:], start=1):
    records.append({"step": 10 * epoch - 5, "epoch": epoch, "train/loss": 1.0})
    record = {"step": 10 * epoch, "epoch": epoch, "val/accuracy": 0.9}
    records.append(record | {"rank/fc": rank})
  return [
    r | {"rank/total": r["rank/fc"]} if "rank/fc" in r else r for r in records
  ]


def _workdir(tmp_path, lam, ranks):
  workdir = tmp_path / f"lam{lam}"
  workdir.mkdir()
  lines = [json.dumps(record) + "\n" for record in _metrics(ranks)]
  (workdir / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
  results = {
    "config": {"discover": {"lam": lam}},
    "git": "0",
    "device": "cpu: cpu",
    "jax": "0",
    "seed": 0,
    "wall_seconds": 1.0,
    "dense": {"params": 100, "macs": 100},
    "layers": [{"path": "fc", "rank": ranks[-1], "full_rank": ranks[0]}],
    "final": {"params": 50, "macs": 50, "metrics": {"accuracy": 0.9}},
  }
  runs.write_results(workdir / "results.json", results)
  return workdir


def test_ranks_stand_for_each_epoch():
  ranks = rank_evolution.ranks_by_epoch(_metrics([9, 7, 4]), ["fc"])
  assert ranks == {"fc": [9, 7, 4], "total": [9, 7, 4]}


@pytest.mark.parametrize("keep", [slice(0, 0), slice(2, None), slice(0, 1, 2)])
def test_a_missing_epoch_is_an_error_or_not_there(keep):
  records = [r for r in _metrics([9, 7, 4]) if "rank/fc" in r][keep]
  if [r["epoch"] for r in records] == [0]:
    assert rank_evolution.ranks_by_epoch(records, ["fc"])["fc"] == [9]
  else:
    with pytest.raises(UserError, match="epochs"):
      rank_evolution.ranks_by_epoch(records, ["fc"])


def test_nested_counts_neighbours_of_every_layer():
  finals = [{"a": 5, "b": 4}, {"a": 5, "b": 2}, {"a": 3, "b": 3}]
  assert rank_evolution.nested(finals) == (3, 4, [(2, "b")])


def test_a_run_is_kept_tabulated_and_drawn(tmp_path):
  rows = {1e-4: [9, 9, 8], 3e-4: [9, 8, 5], 1e-3: [9, 6, 6], 3e-3: [9, 3, 1]}
  results = [
    rank_evolution.collect(_workdir(tmp_path, lam, ranks))
    for lam, ranks in rows.items()
  ]
  assert results[1]["ranks"]["fc"] == [9, 8, 5]
  assert results[1]["full_ranks"] == {"fc": 9}
  table = rank_evolution.table(results)
  assert "nested: 2 of 3" in table
  assert "not fc: 5 at 0.0003, 6 at 0.001" in table
  rank_evolution.draw(results).savefig(tmp_path / "figure.png")


@pytest.mark.quick(1)
def test_a_failed_run_names_its_log(tmp_path):
  workdir = tmp_path / "run"
  with pytest.raises(UserError, match=r"run ended with code 2; see its log"):
    runs.run("configs/no_such_config.py", workdir)
  assert "no_such_config" in (workdir / "log.txt").read_text(encoding="utf-8")


def test_results_keep_a_list_on_a_line(tmp_path):
  record = {"a": {"b": [1, 2, 3]}, "c": [[1, 2], [3, 4]]}
  runs.write_results(tmp_path / "new" / "one.json", record)
  text = (tmp_path / "new" / "one.json").read_text(encoding="utf-8")
  assert json.loads(text) == record
  assert '"b": [ 1, 2, 3 ]\n' in text
  with pytest.raises(ValueError, match="JSON compliant"):
    runs.write_results(tmp_path / "nan.json", {"a": float("nan")})
