"""A run in fisher order: the same function, cut with less loss."""

import dataclasses

import numpy as np
import pytest

from maestro import data, lowrank, trees
from maestro.deploy import choose, reorder
from maestro.errors import UserError
from maestro.report import figures
from maestro.training import loop, opened

PHASE = {"schedule": {"name": "constant", "learning_rate": 0.05}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A network that was trained densely, and factored by SVD afterwards."""
  config = {
    "model": {"name": "mlp", "features": [32, 24]},
    "data": {"name": "digits"},
    "batch_size": 64,
    "optimizer": {"name": "sgd", "momentum": 0.9},
    "method": {"name": "svd", "ranks": {"name": "full"}},
    "discover": PHASE | {"epochs": 8},
    "settle": PHASE | {"epochs": 0},
    "mesh": {"data": 1},
  }
  workdir = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, "figures", lambda workdir: None)
    loop.train(config, workdir)
  return opened.open_run(workdir)


@pytest.fixture(scope="module")
def dataset():
  return data.make("digits")


def logits(run, dataset, ranks=None):
  params = run.params if ranks is None else lowrank.mask(run.params, ranks)
  x = dataset.preprocess(dataset.val.inputs)
  return run.model.apply({"params": params}, x)


@pytest.mark.quick(0)
def test_the_function_stays_and_prefixes_lose_less(run, dataset):
  new = reorder.reordered(run, dataset)
  want = np.asarray(logits(run, dataset))
  scale = np.abs(want).max()
  np.testing.assert_allclose(logits(new, dataset), want, atol=1e-5 * scale)
  (tree,) = choose.choose_profiles(run, ["macs:0.3"], rule="uniform")
  errors = [
    np.mean((np.asarray(logits(r, dataset, tree)) - want) ** 2)
    for r in (run, new)
  ]
  assert errors[1] < 0.7 * errors[0]


def test_a_run_is_reordered_before_cuts_unless_it_is_not_wanted(
  run, dataset, capsys
):
  def first(run):
    return np.asarray(next(iter(trees.factored(run.params).values()))["u"])

  assert reorder.before_cuts(run, dataset, False) is run
  for asked in (None, True):
    new = reorder.before_cuts(run, dataset, asked)
    np.testing.assert_array_equal(
      first(new), first(reorder.reordered(run, dataset))
    )
  # What cannot be reordered is left alone, unless it was asked for.
  nested = dataclasses.replace(run, levels={"ranks": {}})
  dense = dataclasses.replace(run, ranks={})
  for other in (nested, dense):
    assert reorder.before_cuts(other, dataset, None) is other
    with pytest.raises(UserError):
      reorder.before_cuts(other, dataset, True)
  assert reorder.before_cuts(run, None, None) is run
  assert "needs training data" in capsys.readouterr().out
  with pytest.raises(UserError, match="needs training data"):
    reorder.before_cuts(run, None, True)


def test_what_cannot_be_reordered_is_told(run, dataset):
  with pytest.raises(UserError, match="needs training data"):
    reorder.reordered(run, None)
  with pytest.raises(UserError, match="no layer of this run is factored"):
    reorder.reordered(dataclasses.replace(run, ranks={}), dataset)
  nested = dataclasses.replace(run, levels={"ranks": {}})
  with pytest.raises(UserError, match="levels of a nested network"):
    reorder.reordered(nested, dataset)
  with pytest.raises(UserError, match="off its chain"):
    choose.choose_profiles(nested, ["macs:0.5"], rule="uniform")
