"""What programs take: the parts of their memory, and the search for a batch."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from maestro import data
from maestro.errors import UserError
from maestro.parallel.programs import Memory
from maestro.parallel.topology import Topology
from maestro.training.abstract import Form, abstract
from maestro.training.config import parse
from maestro.training.footprint import (
  Row,
  largest_batch,
  measure,
  measure_evaluation,
)
from maestro.training.state import variables_of

CONFIG = {
  "model": {"name": "mlp", "features": [64]},
  "data": {"name": "digits"},
  "method": "dense",
  "batch_size": 512,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "discover": {
    "epochs": 1,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
  "settle": {
    "epochs": 0,
    "schedule": {"name": "constant", "learning_rate": 0.05},
  },
}
PARAMS = 64 * 64 + 64 + 64 * 10 + 10


def test_data_parallel_devices_exchange_the_bytes_of_gradients():
  c, devices = parse(copy.deepcopy(CONFIG)), Topology.parse("cpu:8").devices()
  row = measure(c, Form("dense", None, True), devices, 1e9)
  assert set(row.collectives) == {"all-reduce"}
  found = row.collectives["all-reduce"]
  scalars = found["count"] - 4  # the loss and its metrics; 4 parameters
  assert 0 < scalars < 5
  assert found["bytes"] == 4 * (PARAMS + scalars)
  # What the program is given is what the parts are.
  given = {name: n for name, n in row.parts.items() if name != "batch"}
  assert row.memory is not None
  assert sum(given.values()) == row.memory.arguments
  assert given["params"] == 4 * PARAMS and given["padding"] == 0
  # The state is donated: all of it lies where the old one did.
  state = sum(given[k] for k in ("params", "optimizer", "other state"))
  assert row.memory.aliased >= 2 * 4 * PARAMS
  assert row.memory.aliased <= state
  assert row.needed == row.memory.peak and row.fits
  # Three products of a batch's part in each layer but the first, which has two.
  macs = 512 // 8 * (2 * 64 * 64 + 3 * 64 * 10)
  assert 2 * macs < (row.flops or 0) < 3 * 2 * macs
  assert len(row.program) == 64


@pytest.mark.quick(1)
@pytest.mark.parametrize("share", [None, 1.0])
def test_an_evaluation_is_the_loops_own_beside_the_state(share):
  method = "dense" if share is None else "maestro"
  c = parse(copy.deepcopy(CONFIG) | {"method": method, "batch_size": 64})
  devices = Topology.parse("cpu:8").devices()
  form = Form("it", share, True)
  found = measure_evaluation(c, form, devices, 1e9)
  assert found.batch_size == 504  # 500, divided over 8
  row = measure(c, form, devices, 1e9)
  # Each device has its part of the 504 images and targets.
  more = 504 // 8 * (64 * 4 + 4)
  assert found.fits and found.needed is not None
  assert found.needed >= row.held - row.parts["padding"] + more
  assert not measure_evaluation(c, form, devices, found.needed - 1).fits
  # A network that is there is evaluated by the same program.
  a = abstract(c, form, devices)
  t, split = a.training, data.make(**c.data).val
  state = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), a.state
  )
  lowered = t.evaluate.lower(variables_of(a.state), t.dataset.val)
  there = t.evaluate.lower(variables_of(state), split)
  assert lowered.as_text() == there.as_text()
  calls = []
  counted = dataclasses.replace(
    t.evaluate,
    add_batch=lambda *args: calls.append(args) or t.evaluate.add_batch(*args),
  )
  counted(variables_of(state), split)
  assert t.evaluate.add_batch.lower(*calls[0]).as_text() == lowered.as_text()


def test_a_compiler_that_gives_up_makes_a_row(monkeypatch):
  told = "RESOURCE_EXHAUSTED: the total memory required (64.00G) exceeds it"
  error = RuntimeError(told)

  def compile_(*args, **kwargs):
    raise error

  monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
  c, devices = parse(copy.deepcopy(CONFIG)), Topology.parse("cpu:8").devices()
  row = measure(c, Form("dense", None, True), devices, 1e9)
  assert (row.needed, row.memory, row.fits) == (64 << 30, None, False)
  assert row.message == told
  found = measure_evaluation(c, Form("dense", None, True), devices, 1e9)
  assert (found.needed, found.fits) == (64 << 30, False)
  error = RuntimeError("INTERNAL: a bug")
  with pytest.raises(RuntimeError, match="INTERNAL"):
    measure(c, Form("dense", None, True), devices, 1e9)


def row_of(size, needed, limit, known=True):
  memory = Memory(needed, 0, 0, 0, 0) if known else None
  return Row(
    *("dense", True, size, 1, memory, needed if known else None),
    fits=needed <= limit,
    parts={},
  )


@pytest.mark.parametrize("first", [16, 64, 512, 4096])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bend", [0, 3])
def test_the_largest_batch_is_found_by_few_compilations(first, known, bend):
  limit, sizes = 100_000, []

  def measured(size):
    sizes.append(size)
    needed = 10_000 + 50 * size + bend * max(size - 1000, 0)
    return row_of(size, needed, limit, known or needed <= limit)

  found = largest_batch(measured, measured(first), limit, unit=16, most=50_000)
  true = 1800 if not bend else (90_000 + 3000) // 53
  assert found.compilations == len(sizes) - 1 <= 6
  assert 0.97 * true < found.batch_size <= true
  assert found.batch_size % 16 == 0 and list(found.tried) == sizes


def test_a_batch_is_at_most_the_training_split():
  measured = lambda size: row_of(size, size, 1e9)  # noqa: E731
  found = largest_batch(measured, measured(64), 1e9, unit=16, most=1077)
  assert (found.batch_size, found.compilations) == (1072, 2)
  assert found.why == "all examples of the training split"


def test_no_batch_fits_where_parameters_do_not():
  measured = lambda size: row_of(size, 1000 + size, 10)  # noqa: E731
  found = largest_batch(measured, measured(64), 10, unit=16, most=1077)
  assert found.batch_size is None and found.compilations == 1
  assert found.why == "32 does not fit"


def test_no_batch_is_tried_where_the_state_alone_is_too_large():
  first = dataclasses.replace(
    row_of(64, 10, 9), parts={"params": 6, "optimizer": 4, "batch": 1}
  )
  found = largest_batch(lambda size: first, first, 9, unit=16, most=1077)
  assert (found.batch_size, found.compilations) == (None, 0)


def test_a_search_ends_where_a_config_refuses_a_batch():
  def measured(size):
    if size > 64:
      raise UserError("config.discover.schedule.warmup: too long")
    return row_of(size, size, 1e9)

  found = largest_batch(measured, measured(64), 1e9, unit=16, most=1077)
  assert found.batch_size == 64 and "warmup" in found.why
