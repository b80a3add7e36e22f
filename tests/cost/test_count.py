"""Tests of the counts of parameters, MACs and bytes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro.introspect
import maestro.nn
from maestro import lowrank, trees
from maestro.cost.count import count_cost
from maestro.ops import xla
from maestro.trees import LowRankError


class LeNet(nn.Module):
  """The paper's LeNet, for 28 x 28 digits."""

  @nn.compact
  def __call__(self, x):
    for features in (6, 16):
      x = maestro.nn.Conv(features, (5, 5), padding="VALID")(x)
      x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
    x = x.reshape((x.shape[0], -1))
    for features in (120, 84):
      x = nn.relu(maestro.nn.Dense(features)(x))
    return maestro.nn.Dense(10)(x)


@pytest.fixture(scope="module")
def lenet():
  model = LeNet()
  x = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  return maestro.introspect.layers(model, x), params


def _factored(layers, params):
  return jax.eval_shape(
    lambda p: lowrank.decompose(p, [lowrank.Rule()], layers), params
  )


def _products(jaxpr, times=1):
  """Multiply-accumulates of all products and convolutions of a jaxpr."""
  total = 0
  for equation in jaxpr.eqns:
    inner_times = times
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      terms = math.prod(left[axis] for axis in contracted)
      total += times * terms * math.prod(equation.outvars[0].aval.shape)
    elif equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      spec = equation.params["dimension_numbers"].rhs_spec
      terms = math.prod(kernel) // kernel[spec[0]]
      total += times * terms * math.prod(equation.outvars[0].aval.shape)
    elif equation.primitive.name == "scan":
      inner_times = times * equation.params["length"]
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += _products(inner, inner_times)
  return total


def _traced_macs(case, params):
  jaxpr = jax.make_jaxpr(lambda p: case.model.apply({"params": p}, case.x))
  macs = _products(jaxpr(params).jaxpr)
  assert macs % case.batch == 0
  return macs // case.batch


def test_lenet_costs_what_the_paper_says(lenet):
  cost = count_cost(*lenet)
  assert cost.params == 44_426
  assert cost.macs == 281_640
  assert cost.bytes == 4 * 44_426
  rows = {row.path: (row.params, row.macs) for row in cost.layers}
  assert rows == {
    "Conv_0": (156, 24 * 24 * 25 * 6),
    "Conv_1": (2_416, 8 * 8 * 150 * 16),
    "Dense_0": (30_840, 256 * 120),
    "Dense_1": (10_164, 120 * 84),
    "Dense_2": (850, 84 * 10),
  }
  assert {row.form for row in cost.layers} == {"dense"}
  assert {row.rank for row in cost.layers} == {None}
  assert [row.full_rank for row in cost.layers] == [6, 16, 120, 84, 10]


def test_factored_lenet_by_hand(lenet):
  layers, params = lenet
  factored = _factored(layers, params)
  ranks = trees.unflatten_ranks(
    {"Conv_0": 3, "Conv_1": 0, "Dense_0": 40, "Dense_1": 84, "Dense_2": 1}
  )
  cost = count_cost(layers, factored, ranks)
  rows = {row.path: row for row in cost.layers}
  assert rows["Conv_0"].params == 3 * (25 + 6) + 6
  assert rows["Conv_0"].macs == 24 * 24 * 3 * (25 + 6)
  assert (rows["Conv_1"].params, rows["Conv_1"].macs) == (16, 0)
  assert rows["Dense_0"].macs == 40 * (256 + 120)
  assert rows["Dense_1"].macs == 84 * (120 + 84)
  assert rows["Dense_2"].params == 84 + 10 + 10
  assert {row.form for row in cost.layers} == {"factored"}
  assert [row.rank for row in cost.layers] == [3, 0, 40, 84, 1]
  assert cost.params == sum(row.params for row in cost.layers)
  assert cost.macs == sum(row.macs for row in cost.layers)
  assert cost.bytes == 4 * cost.params


@pytest.mark.quick(3)
def test_counts_are_the_sizes_of_the_truncated_leaves(case):
  rng = np.random.default_rng(0)
  levels = [case.full, case.ranks(0), case.ranks(1)]
  levels += [
    jax.tree.map(
      lambda r: np.asarray(rng.integers(0, np.asarray(r) + 1), np.int32),
      case.full,
    )
    for _ in range(4)
  ]
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.factored)
  for ranks in levels:
    for params, size in ((case.factored, 4), (half, 2)):
      small = jax.eval_shape(
        lambda p, ranks=ranks: lowrank.truncate(p, ranks), params
      )
      n = sum(math.prod(x.shape) for x in jax.tree.leaves(small))
      cost = count_cost(case.layers, params, ranks)
      assert cost.params == n
      assert cost.bytes == size * n
      # What is stored costs the same as the ranks by which it was cut.
      stored = count_cost(case.layers, small)
      assert (stored.params, stored.macs) == (cost.params, cost.macs)
      for row in cost.layers:
        node = trees.get(small, row.path)
        n = sum(math.prod(x.shape) for x in jax.tree.leaves(node))
        assert (row.params, row.bytes) == (n, size * n)


@pytest.mark.quick(5)
def test_counts_take_abstract_parameters(case):
  abstract = jax.eval_shape(lambda p: p, case.factored)
  ranks = case.ranks("half")
  assert count_cost(case.layers, abstract, ranks) == count_cost(
    case.layers, case.factored, ranks
  )


@pytest.mark.parametrize("level", ["dense", "full", "half", 1])
def test_macs_are_those_of_the_traced_program(case, level, monkeypatch):
  # The two products that factors stand for, also where one would be cheaper.
  monkeypatch.setattr(xla, "multiply_out", lambda *_: False)
  if level == "dense":
    params, cost = case.dense, count_cost(case.layers, case.dense)
  else:
    ranks = case.ranks(level)
    params = jax.eval_shape(lambda p: lowrank.truncate(p, ranks), case.factored)
    cost = count_cost(case.layers, case.factored, ranks)
  assert cost.macs == _traced_macs(case, params)
  assert cost.macs > 0 or (case.name, level) == ("embed", "dense")


def test_macs_are_half_the_flops_that_xla_counts(cases):
  case = cases["dense"]
  apply = jax.jit(lambda k: jnp.dot(case.x, k))
  flops = apply.lower(case.dense["kernel"]).compile().cost_analysis()["flops"]
  assert count_cost(case.layers, case.dense).macs * case.batch == flops / 2


def test_positions_of_a_sequence_count(cases):
  case = cases["dense"]
  assert count_cost(case.layers, case.dense).macs == 3 * 9 * 6


def test_embeddings_are_looked_up_for_nothing(cases):
  case = cases["embed"]
  cost = count_cost(case.layers, case.dense)
  assert (cost.params, cost.macs) == (9 * 6, 0)
  # Factored, a look-up of 5 tokens multiplies 5 rows with v.
  cost = count_cost(case.layers, case.factored, {"rank": 2})
  assert (cost.params, cost.macs) == (2 * (9 + 6), 5 * 2 * 6)


def test_tied_embedding_counts_its_logits(cases):
  case = cases["embed_tied"]
  assert count_cost(case.layers, case.dense).macs == 5 * 9 * 6


def test_stacked_and_grouped_layers_cost_their_largest_rank(cases):
  case = cases["scan_remat_grouped"]
  ranks = np.array([[0, 1], [2, 0], [1, 1]], np.int32)
  tree = {"blocks": {"Conv_0": {"rank": ranks}}}
  (row,) = count_cost(case.layers, case.factored, tree).layers
  n_in, n_out = 2 * 2 * 3, 3
  assert row.params == 3 * 2 * 2 * (n_in + n_out) + 3 * 6
  assert row.macs == 16 * 3 * 2 * 2 * (n_in + n_out)
  assert row.rank == ranks.tolist()
  assert row.full_rank == 3


def test_kernel_with_factors_costs_both(cases):
  case = cases["dense"]
  both = case.dense | {k: case.factored[k] for k in ("u", "v")}
  cost = count_cost(case.layers, both, {"rank": 2})
  assert cost.params == 9 * 6 + 2 * (9 + 6) + 6
  assert cost.macs == 3 * (9 * 6 + 2 * (9 + 6))


def test_totals_include_what_no_layer_lists(cases):
  case = cases["network"]
  cost = count_cost(case.layers, case.dense)
  norm = sum(x.size for x in jax.tree.leaves(case.dense["norm"]))
  assert cost.params == norm + sum(row.params for row in cost.layers)


def test_rank_out_of_range_raises(cases):
  case = cases["remat"]
  with pytest.raises(LowRankError, match=r"'last'.*outside \[0, 5\]"):
    count_cost(case.layers, case.factored, {"last": {"rank": 6}})


def test_rank_of_an_unknown_layer_raises(cases):
  case = cases["remat"]
  with pytest.raises(LowRankError, match="'lost'"):
    count_cost(case.layers, case.factored, {"lost": {"rank": 1}})
