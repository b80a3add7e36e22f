"""docs/your_model.md: the code runs, in order, and does what is said."""

import contextlib
import pathlib
import re

import jax
import numpy as np
import pytest

DOC = pathlib.Path(__file__).parents[1] / "docs" / "your_model.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
  names = {}
  with contextlib.chdir(tmp_path_factory.mktemp("docs")):
    for code in BLOCKS:
      exec(compile(code, DOC.name, "exec"), names)
  return names


def test_the_way_in_is_three_lines_and_the_loop_forty():
  way_in, _, loop, _, _ = BLOCKS
  *_, last = way_in.strip().split("\n\n")
  assert last.count("\n") == 2
  assert [line.split(" = ")[0] for line in last.split("\n")] == [
    *("model", "layers", "params")
  ]
  assert len([line for line in loop.splitlines() if line.strip()]) <= 40


def test_the_loop_learns_and_shrinks(names):
  loss = names["loss_of"](names["params"], names["ranks"], *names["data"](99))
  assert loss < 0.7  # of log(4) = 1.39 at random
  macs = names["cost"].macs, names["dense"].macs
  assert 0 < macs[0] < macs[1]


def test_the_small_network_is_the_one_at_its_ranks(names):
  maestro, model, tokens = names["maestro"], names["model"], names["tokens"]
  variables = {"params": names["params"], "ranks": names["ranks"]}
  np.testing.assert_allclose(
    names["logits"], model.apply(variables, tokens), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    names["same"], names["logits"], rtol=1e-4, atol=1e-5
  )
  sizes = [x.size for x in jax.tree.leaves(names["small"])]
  assert names["cost"].params == sum(sizes) < names["dense"].params
  maestro.check_ranks(
    model, {"params": names["params"]}, names["ranks"], tokens
  )


def test_a_model_of_nnx_is_itself_on_factors(names):
  found, net = names["same_graph"], names["net"]
  np.testing.assert_allclose(found, net(names["tokens"]), rtol=1e-4, atol=1e-5)
  held = names["maestro"].full_ranks(names["weights"])
  assert {*held} == {"embed", "attention", "head"}
