"""A run without data and devices: its programs are the loop's own."""

import copy
import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from maestro.ops.cpu import convolution, tracing_for
from maestro.parallel import programs
from maestro.parallel.topology import Topology
from maestro.training import build, loop
from maestro.training.abstract import abstract, forms
from maestro.training.config import parse

CONFIG = {
  "model": {"name": "mlp", "features": [64]},
  "data": {"name": "digits"},
  "method": "pufferfish",
  "batch_size": 512,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "shrink": True,
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
}
DENSE = 64 * 64 + 64 + 64 * 10 + 10
FULL = 64 * (64 + 64) + 64 + 10 * (64 + 10) + 10


def config(**changes):
  return parse(copy.deepcopy(CONFIG) | changes)


def devices():
  return Topology.parse("cpu:8").devices()


def form(c, share):
  return next(f for f in forms(c) if f.share == share)


class Dispatched(Exception):  # noqa: N818
  """What the loop has come to its first dispatch with."""


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("method", "share", "compiles"),
  [("dense", None, True), ("pufferfish", 0.25, False), ("lasso", 1.0, False)],
)
def test_the_program_is_the_one_that_the_loop_dispatches(
  method, share, compiles, tmp_path, monkeypatch
):
  """What goes to the compiler is equal to the letter.

  So is what comes from it, without metadata and the tables of source lines.
  """
  raw = copy.deepcopy(CONFIG) | {"method": method}
  if method == "lasso":
    raw["budget"] = "macs:0.5"
  if method == "pufferfish":
    raw["discover"]["epochs"] = 0
  make = build.make_training

  def recording(*args):
    t = make(*args)

    def program(*args):
      def call(state, data):
        raise Dispatched(t.program(*args).lower(state, data))

      return call

    return dataclasses.replace(t, program=program)

  with monkeypatch.context() as patch:
    patch.setattr(build, "make_training", recording)
    with pytest.raises(Dispatched) as stop:
      loop.train(raw, tmp_path)
  c, (dispatched,) = parse(raw), stop.value.args
  own = form(c, share)
  assert own.trained
  lowered = abstract(c, own, devices()).lower()
  assert lowered.as_text() == dispatched.as_text()
  if compiles:
    found = [
      programs.fingerprint(x.compile().as_text()) for x in (lowered, dispatched)
    ]
    print(f"{method}: {found[0]}")
    assert found[0] == found[1]


@pytest.mark.parametrize(
  ("mesh", "dense", "full"),
  [
    ({"data": 8}, DENSE, FULL),
    # Of what has 4,096 numbers, each device has an eighth.
    (
      {"data": 1, "fsdp": 8},
      DENSE - 64 * 64 * 7 // 8,
      FULL - 2 * 64 * 64 * 7 // 8,
    ),
    # Sides of layers; biases of 10 and the classifier's output do not divide.
    ({"data": 4, "model": 2}, DENSE // 2, 4096 + 32 + 320 + 50 + 5),
  ],
  ids=str,
)
def test_bytes_of_parameters_are_those_of_a_device(mesh, dense, full):
  c = config(mesh={"data": 1} | mesh)
  for share, numbers in ((None, dense), (1.0, full)):
    a = abstract(c, form(c, share), devices())
    assert programs.bytes_of(a.state.params) == 4 * numbers
    # Momentum, and the count of steps for the schedule.
    assert programs.bytes_of(a.state.opt_state) == 4 * numbers + 4
    split = 1077 * (64 * 4 + 4 + 4)  # inputs, targets and order of digits
    assert programs.bytes_of(a.data) == split
    parts = a.training.mesh.shape["data"] * a.training.mesh.shape["fsdp"]
    assert a.batch_bytes == 512 // parts * (64 * 4 + 4)


@pytest.mark.parametrize(
  ("method", "trained"),
  [
    ("dense", ["dense"]),
    ("svd", ["dense"]),
    ("maestro", ["factored, 1 of the ranks"]),
    ("race", ["dense", "factored, 1 of the ranks"]),
    ("nested", ["dense", "factored, 1 of the ranks"]),
    ("fixed", ["factored, 0.25 of the ranks"]),
  ],
)
def test_a_method_trains_its_forms(method, trained):
  c = config(method=method)
  assert [f.name for f in forms(c) if f.trained] == trained
  assert [f.share for f in forms(c)] == [None, 1.0, 0.5, 0.25]


def test_levels_of_a_nested_network_are_cut_in_the_step():
  c = config(method="nested")
  flops = []
  for share in (1.0, 0.25):
    a = abstract(c, form(c, share), devices())
    assert programs.bytes_of(a.state.params) == 4 * FULL
    flops.append(a.lower().cost_analysis()["flops"])
  assert flops[1] < 0.6 * flops[0]


def test_convolutions_are_traced_for_their_platform():
  x, kernel = jnp.zeros([2, 8, 8, 4]), jnp.zeros([1, 1, 4, 4])
  numbers = ("NHWC", "HWIO", "NHWC")

  def traced():
    def product(x, kernel):
      return convolution(
        *(x, kernel, (1, 1), "SAME"),
        lhs_dilation=None,
        rhs_dilation=None,
        dimension_numbers=numbers,
        feature_group_count=1,
      )

    return str(jax.make_jaxpr(product)(x, kernel))

  assert "conv_general_dilated" not in traced()
  with tracing_for("tpu"):
    assert "conv_general_dilated" in traced()


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install -e '.[fit]'",
)
def test_a_step_compiles_for_tpus(monkeypatch):
  topology = Topology.parse("v5e:2x2")
  topology.prepare()
  a = abstract(config(mesh={"fsdp": 4}), forms(config())[0], topology.devices())
  assert (a.platform, a.steps) == ("tpu", 2)
  compiled = a.lower().compile()
  memory = programs.Memory.of(compiled)
  assert memory.arguments >= programs.bytes_of((a.state, a.data))
  found = programs.collectives(compiled.as_text())
  assert ("all-gather", (64, 64)) in {(c.kind, c.shape) for c in found}
