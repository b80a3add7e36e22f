"""Training of the factors alone, on a frozen base."""

import jax
import optax

from maestro import trees


def freeze_base(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Updates the factors of a tree that has any, and nothing else.

  Frozen parameters stay as they are, bit for bit, decay included; gradients are
  clipped by the norm of the factors' own. A tree without factors is updated
  whole.
  """

  def labels(params):
    nodes = trees.factored(params)
    whole = "frozen" if nodes else "trained"
    frozen = jax.tree.map(lambda _: whole, params)
    changes = {
      path: dict(trees.get(frozen, path)) | dict.fromkeys("uv", "trained")
      for path in nodes
    }
    return trees.replace(frozen, changes)

  return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
