"""A nested run in a file: every level is the network that was trained."""

import json
import re

import numpy as np
import pytest

import maestro
from maestro import trees
from maestro.cost.budget import BudgetError
from maestro.deploy import export as exporting
from maestro.deploy import levels
from maestro.report import figures
from maestro.training import build, loop, opened

PHASE = {"schedule": {"name": "constant", "learning_rate": 0.05}}
NETWORKS = {
  "mlp": {"name": "mlp", "features": [24]},
  "batch norm": {"name": "resnet18", "width": 4, "stage_sizes": [1]},
}


@pytest.fixture(scope="module", params=NETWORKS)
def run(request, tmp_path_factory):
  config = {
    "model": NETWORKS[request.param],
    "data": {"name": "digits"},
    "batch_size": 128,
    "optimizer": {"name": "sgd", "momentum": 0.9},
    "method": {"name": "nested", "nested": {"levels": [0.9, 0.6, 0.4]}},
    "discover": PHASE | {"epochs": 1},
    "settle": PHASE | {"epochs": 2},
    "batch_norm_examples": 128,
    "mesh": {"data": 1},
  }
  workdir = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    results = loop.train(config, workdir)
  return opened.open_run(workdir), results


@pytest.fixture(scope="module")
def dataset(run):
  return loop.data_lib.make("digits")


OPTIONS = exporting.Options(stablehlo=False, repeats=0)


@pytest.mark.quick(0)
def test_one_file_has_every_level_as_it_was_trained(run, dataset, tmp_path):
  run, results = run
  config = exporting.export(
    run, tmp_path / "any", dataset=dataset, options=OPTIONS
  )
  names = [profile["name"] for profile in config["profiles"]]
  assert names == ["0.9", "0.6", "0.4"]
  x = dataset.preprocess(dataset.val.inputs[:64])
  chain = build.levels.split(run.levels)
  for profile, level, (ranks, stats) in zip(
    config["profiles"], results["levels"], chain, strict=True
  ):
    assert profile["ranks"] == level["ranks"]
    assert profile["metrics"]["test"] == level["metrics"]
    model, variables = maestro.load(
      tmp_path / "any", budget=f"macs:{profile['name']}"
    )
    kwargs = {"train": False} if stats else {}
    found = model.apply(variables, x, **kwargs)
    given = build.levels.variables(run.params, ranks, stats)
    want = run.model.apply(given, x, **kwargs)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
  if stats:
    assert config["statistics"] == "those that each level was trained with"


@pytest.mark.quick(1)
def test_between_two_levels_are_ranks_between_them(run, dataset, tmp_path):
  run, _ = run
  sizes = exporting.choose_sizes(
    run, profiles=["0.6", "0.5"], dataset=dataset, log=print
  )
  own = {str(b): tree for b, tree, _ in levels.trained(run)}
  assert sizes[0].ranks is not None and sizes[1].batch_stats is None
  flat = [
    trees.flatten_ranks(t)
    for t in (own["macs:0.6"], sizes[1].ranks, own["macs:0.4"])
  ]
  for path, high in flat[0].items():
    assert np.all(high >= flat[1][path]) and np.all(
      flat[1][path] >= flat[2][path]
    )
  config = exporting.export(
    run, tmp_path / "two", sizes, dataset=dataset, options=OPTIONS
  )
  for profile in config["profiles"]:
    share = profile["macs"] / config["dense"]["macs"]
    assert share <= float(profile["name"])


@pytest.mark.quick(1)
def test_what_a_chain_does_not_hold_is_refused(run, dataset, tmp_path, capsys):
  run, _ = run
  with pytest.raises(BudgetError, match="below the smallest level"):
    exporting.choose_sizes(run, budget="macs:0.2", dataset=dataset)
  with pytest.raises(BudgetError, match="nested network serves"):
    exporting.choose_sizes(run, budget="latency_ms:1", dataset=dataset)
  with pytest.raises(exporting.ExportError, match="--rule=dp"):
    exporting.choose_sizes(run, budget="macs:0.6", rule="dp", dataset=dataset)
  path = tmp_path / "odd.json"
  layer = next(iter(trees.flatten_ranks(run.ranks)))
  path.write_text(json.dumps({"ranks": {layer: 1}}))
  exporting.choose_sizes(run, ranks=str(path), dataset=dataset, log=print)
  said = capsys.readouterr().out
  assert "on no level of this nested network" in said
  odd, level = (float(x) for x in re.findall(r" (\d+\.\d{4})", said))
  assert odd > level > 0 and "that of macs:0.4" in said
  exporting.choose_sizes(run, ranks=str(path), dataset=None, log=print)
  assert "tens of points" in capsys.readouterr().out
