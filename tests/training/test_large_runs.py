"""What large runs expect of the loop: micro-batches, averages, less memory."""

import copy

import jax
import pytest

from maestro.errors import UserError
from maestro.report import figures
from maestro.training import build
from maestro.training.config import parse

BASE = {
  "model": {"name": "mlp", "features": [16]},
  "data": {"name": "digits"},
  "batch_size": 128,
  "optimizer": {"name": "sgd", "momentum": 0.9},
  "threshold": 0.3,
  "discover": {
    "epochs": 2,
    "schedule": {"name": "constant", "learning_rate": 0.05},
    "lam": 2e-2,
    "sampler": {"name": "one_layer"},
    "shrink": True,
  },
  "settle": {
    "epochs": 1,
    "schedule": {"name": "cosine", "learning_rate": 0.05},
  },
  "truncate": {"min_saving": 0.1, "max_compilations": 8, "multiple_of": 2},
  "checkpoint": {"every_epochs": 1, "keep": 9},
  "mesh": {"data": 1},
}


def config(**changes):
  """BASE with some sections replaced."""
  return copy.deepcopy(BASE) | changes


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(figures, "figures", lambda workdir: None)
  monkeypatch.setattr(jax, "jit", jit)


# ---------------------------------------------------------------------------
# Micro-batches
# ---------------------------------------------------------------------------


def test_micro_batches_that_devices_cannot_share_are_refused():
  given = config(accumulate=32, mesh={"data": 8})
  with pytest.raises(UserError, match=r"config\.accumulate.*of 4.*=256"):
    build.make_training(parse(given))
