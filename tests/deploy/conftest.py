"""Small random networks as runs, and their sizes, for tests of exports."""

import jax
import numpy as np
import pytest

from maestro import introspect, lowrank
from maestro.deploy import export, packing
from maestro.deploy.network import as_run

DIGITS = jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")


@pytest.fixture(scope="session")
def random_run():
  """(model, example) -> a run of random weights, factored at full ranks."""

  def make(model, example=DIGITS):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    dense = jax.tree.map(
      lambda s: rng.standard_normal(s.shape).astype(s.dtype) / 4, shapes
    )
    layers = introspect.layers(model, example)
    params = lowrank.decompose(dense, [lowrank.Rule()], layers)
    return as_run(model, {"params": params}, example)

  return make


@pytest.fixture(scope="session")
def sizes_of():
  """(run, {name: ranks of its layers, in order}) -> sizes to export."""

  def make(run, ranks):
    return [
      export.Size(
        name, packing.rank_tree(dict(zip(run.layers, own, strict=True)))
      )
      for name, own in ranks.items()
    ]

  return make
