"""Tests that ordered dropout finds NumPy's SVD and PCA, with bars, 5 seeds."""

import functools
import json

import numpy as np
import pytest

from experiments import runs, theory
from maestro import sampling

SEEDS = range(5)


@functools.cache
def result(name):
  case, _ = theory.CASES[name]
  return case(SEEDS)


@functools.cache
def record(name):
  return theory.record(result(name))


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", theory.CASES)
def test_every_seed_meets_the_bars(name):
  bars = [check for check in result(name).checks if check.limit is not None]
  assert bars
  for check in bars:
    assert len(check.values) == len(SEEDS)
    assert check.passed, f"{check.name} {check.bar}: {check.values}"


def test_a_map_is_found_at_each_rank_with_its_singular_values():
  measured = result("svd").measured
  assert measured["error_at_k"].shape == (5, 6)
  assert np.all(measured["error_at_k"] <= 1e-3)
  # Of true rank 3, in falling order: the bars are not met by zeros.
  norms = measured["component_norms"]
  assert np.all(norms[:, :3] > 0.05) and np.all(norms[:, 3:] <= 1e-2)
  np.testing.assert_array_equal(norms[:, :3], -np.sort(-norms[:, :3], axis=1))


def test_autoencoders_span_the_principal_components():
  for name in ("pca", "adaptive_pca"):
    checks = {check.name: check.values for check in result(name).checks}
    assert np.all(checks["cosine with the PCA's space"] > 0.999), name


def test_a_dropped_point_had_a_component_before():
  checks = {c.name: c.values for c in result("adaptive_pca").checks}
  assert np.all(checks["third component before the drop"] > 0.9)
  assert np.all(checks["second component"] > 0.9)


def test_the_svds_order_is_wrong_for_scaled_data():
  measured = result("data_order").measured
  # The optimum leaves out the lightest of the weights 3, 2, 1; the SVD the
  # smallest of the singular values, which have the largest weights.
  optimum = np.broadcast_to([5.0, 1.0, 0.0], (5, 3))
  svd = np.broadcast_to([13.0, 9.0, 0.0], (5, 3))
  ours, plain = (
    measured[key] for key in ("data_error_at_k", "data_error_at_k_of_svd")
  )
  np.testing.assert_allclose(ours, optimum, atol=1e-2)
  np.testing.assert_allclose(plain, svd, atol=1e-6)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["svd", "data_order"])
def test_without_ordered_dropout_there_is_no_order(name):
  case, _ = theory.CASES[name]
  check, *_ = case(SEEDS, sampler=sampling.full).checks
  assert not check.passed
  if name == "svd":
    assert np.all(check.values > 0.05)  # wrong at some rank, for every seed
  else:
    assert np.all(check.values < 0.95)


@pytest.mark.parametrize(
  ("check", "passed"),
  [
    (theory.Check("at the limit", np.array([0.5, 1.0]), 1.0), True),
    (theory.Check("one above", np.array([0.5, 1.1]), 1.0), False),
    (theory.Check("one below", np.array([0.9, 1.1]), 1.0, ">="), False),
    (theory.Check("one other", np.array([3, 2]), 3, "=="), False),
    (theory.Check("diverged", np.array([0.5, np.nan]), 1.0), False),
    (theory.Check("no bar", np.array([np.nan])), None),
  ],
  ids=lambda x: getattr(x, "name", None),
)
def test_a_check_fails_if_any_seed_does(check, passed):
  assert check.passed is passed
  one = {"case": "c", "checks": {check.name: check.record()}}
  assert ("FAIL" in theory.table([one])) is (passed is False)


@pytest.mark.quick(1)
def test_files_hold_what_the_figure_is_drawn_from(tmp_path):
  for name in theory.CASES:
    runs.write_results(tmp_path / f"{name}.json", record(name))
  records = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in tmp_path.glob("*.json")
  }
  assert records == {name: record(name) for name in theory.CASES}
  for one in records.values():
    assert {"config", "git", "device", "jax", "seeds"} <= one.keys()
  theory.draw(records).savefig(tmp_path / "theory.png")
