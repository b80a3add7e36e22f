"""A controller of the penalty's weight in the loop."""

import jax
import numpy as np

from maestro import trees
from maestro.parallel.mesh import replicate
from maestro.training.build import Training
from maestro.training.results import Ledger
from maestro.training.state import TrainState


def begin(t: Training, state: TrainState) -> TrainState:
  """Gives a state its first weight, 0, if the method has a controller."""
  controller = t.method.controller
  if controller is None:
    return state
  return _with(t, state, 0.0, controller.options.force)


def update(t: Training, state: TrainState, ledger: Ledger) -> TrainState:
  """Sets the weight as the cost of the ranks that are left asks for."""
  controller = t.method.controller
  if controller is None or not state.controls:
    return state
  moved = controller.update(
    float(state.controls["force"]),
    trees.flatten_ranks(jax.device_get(state.ranks)),
    int(state.step) / ledger.discover_steps,
  )
  return _with(t, state, *moved)


def record(state: TrainState) -> dict[str, float]:
  """What metrics say of it."""
  return {"lam": float(state.controls["lam"])} if state.controls else {}


def _with(t: Training, state: TrainState, lam: float, force: float):
  controls = {"lam": np.float32(lam), "force": np.float32(force)}
  return state.replace(controls=replicate(controls, t.mesh))
