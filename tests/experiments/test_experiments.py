"""Experiments' own arithmetic: curves at equal accuracy, errors of outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from experiments import data_aware, prox_lasso, runs
from maestro import data as data_lib
from maestro import models
from maestro.data import image


def result(params, accuracy):
  return {
    "dense": {"params": 1000, "macs": 1000},
    "final": {
      "params": params,
      "macs": params,
      "metrics": {"accuracy": accuracy / 100},
    },
  }


def test_parameters_at_an_accuracy_are_read_off_the_curve():
  params, accuracies = [400, 100], [99.0, 98.0]
  assert prox_lasso.params_at(98.0, params, accuracies) == 100
  assert prox_lasso.params_at(97.0, params, accuracies) == 100
  assert prox_lasso.params_at(98.5, params, accuracies) == pytest.approx(200)
  assert prox_lasso.params_at(99.0, params, accuracies) == pytest.approx(400)
  assert prox_lasso.params_at(99.1, params, accuracies) is None


def test_a_dip_does_not_hide_a_smaller_network_of_equal_accuracy():
  found = prox_lasso.params_at(98.0, [100, 200, 300], [98.5, 97.0, 99.0])
  assert found == 100


def test_the_comparison_finds_half_the_parameters_at_equal_accuracy():
  results = {
    ("maestro", "1"): [result(400, 98.9), result(400, 99.1)],
    ("prox", "1"): [result(200, 99.0), result(200, 99.0)],
    ("maestro", "2"): [result(100, 98.0), result(100, 98.0)],
    ("prox", "2"): [result(50, 98.0), result(50, 98.0)],
  }
  assert [one["ratio"] for one in prox_lasso.compare(results)] == [
    pytest.approx(0.5)
  ] * 2
  table = prox_lasso.table(results)
  assert "| maestro | 1 | 99.00 ± 0.14 | 400 ± 0 | 40.0 |" in table
  assert "| 98.00 | 100 | 50 | 0.50 |" in table


def test_what_the_proximal_step_does_not_reach_is_said(tmp_path):
  results = {
    ("maestro", "1"): [result(400, 99.2)],
    ("prox", "1"): [result(200, 99.0)],
  }
  assert "| 99.20 | 400 | not reached |  |" in prox_lasso.table(results)
  prox_lasso.draw(results).savefig(tmp_path / "figure.png")


def test_output_errors_are_those_of_the_products():
  x = np.asarray(jax.random.normal(jax.random.key(0), (64, 12)), np.float64)
  kernel = np.asarray(jax.random.normal(jax.random.key(1), (12, 5)), np.float64)
  left, s, right = np.linalg.svd(kernel, full_matrices=False)
  u = left * s
  errors = data_aware.output_errors(kernel, u, right, x.T @ x / len(x))
  assert len(errors) == 6
  for r, error in enumerate(errors):
    y = x @ (kernel - u[:, :r] @ right[:r])
    expected = np.sum(y**2) / np.sum((x @ kernel) ** 2)
    assert error == pytest.approx(expected, abs=1e-12)


@pytest.mark.quick(0)
def test_lenet_outputs_are_never_worse_for_the_data_they_were_cut_for(tmp_path):
  rng = np.random.default_rng(0)
  splits = [
    data_lib.Split(
      rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8),
      np.zeros(n, np.int32),
    )
    for n in (600, 50, 1)
  ]
  dataset = data_lib.Dataset(
    "noise",
    *splits,
    num_classes=10,
    preprocess=functools.partial(image.standardize, mean=0.13, std=0.31),
  )
  model = models.LeNet(num_classes=10)
  x = jnp.zeros((1, 28, 28, 1))
  params = model.init(jax.random.key(0), x)["params"]
  layers = maestro.layers(model, x)
  found = data_aware.measure(model, params, layers, dataset)
  assert list(found["calibration"]) == list(layers)
  assert not data_aware.exceeding(found["calibration"])
  # Other data than it was made for may prefer the SVD; zero at full rank.
  for errors in found.values():
    for e in errors.values():
      for name in ("svd", "data"):
        assert e[name][0] == pytest.approx(1)
        assert e[name][-1] < 1e-9
  assert "| conv2 | 8 of 16 |" in data_aware.table(found)
  data_aware.draw(found).savefig(tmp_path / "figure.png")


def test_a_worse_rank_is_named():
  errors = {"fc": {"svd": [1.0, 0.5, 0.0], "data": [1.0, 0.6, 0.0]}}
  assert data_aware.exceeding(errors) == ["fc rank 1"]


def test_runs_come_back_in_order_and_the_first_failure_stops(capsys):
  assert runs.run_all(lambda a, b: a - b, [(3, 1), (9, 2)], 2) == [2, 7]
  assert "2 of 2 runs" in capsys.readouterr().out
  rows = runs.run_rows(lambda *job: job, [("a", 1), ("b", 2)], range(2), 2)
  assert rows == {(x, y): [(x, y, 0), (x, y, 1)] for x, y in rows}
  assert list(rows) == [("a", 1), ("b", 2)]
  begun = []

  def fail(i):
    begun.append(i)
    raise runs.RunError(f"run {i}")

  with pytest.raises(runs.RunError, match="run 0"):
    runs.run_all(fail, [(i,) for i in range(50)], 1)
  assert len(begun) < 50
