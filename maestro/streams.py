"""Streams of random numbers by name, so that no draw is made twice.

  key of a stream = fold_in(fold_in(root of the seed, name), index) ...

JAX's split(key, n)[i] is fold_in(key, i): keys that are derived from one parent
by both meet. Here each purpose has a parent of its own. The generator is named,
so that a global option of JAX cannot change what is drawn.
"""

import jax

# Numbers are for ever: a run that resumes must draw as it began.
STREAMS = {
  **{"initial": 0, "steps": 1, "factors": 2, "choice": 3, "statistics": 4},
  **{"calibration": 5, "levels": 6, "batches": 7},
}
_NAMED = 0x6D616573  # where named streams begin; below are orders of epochs


def stream(seed: int | jax.Array, name: str, *indices: int) -> jax.Array:
  """Returns the key of a stream.

  Args:
    seed: of the run.
    name: of STREAMS: "initial" weights; "steps", from which each step derives
      its own; random "factors"; a "choice" of examples; what recalibration of
      batch "statistics" augments with; what "calibration" draws;
      the "levels" of a nested network's steps; the order of "batches" of text.
    *indices: further numbers, such as a batch's.
  """
  key = jax.random.fold_in(_root(seed), _NAMED)
  for i in (STREAMS[name], *indices):
    key = jax.random.fold_in(key, i)
  return key


def order(seed: int | jax.Array, epoch: int | jax.Array) -> jax.Array:
  """Returns the key of an epoch's order of examples."""
  return jax.random.fold_in(_root(seed), epoch)


def _root(seed: int | jax.Array) -> jax.Array:
  return jax.random.key(seed, impl="threefry2x32")
