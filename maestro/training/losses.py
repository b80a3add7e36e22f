"""Losses of single examples, and what is reported beside them.

An example has one target, a label or a vector, or a row of labels, one for
each token, of which those below 0 count for nothing. The loss of a batch, and
what an evaluation reports, are means over all tokens that count, not means of
means.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def cross_entropy(
  logits: jax.Array, labels: jax.Array, smoothing: float = 0.0
) -> jax.Array:
  """Cross entropy in nats: logits [b, ..., c], int labels [b, ...] -> [b].

    sum over labels y of  -(1 - smoothing) log p_y - smoothing mean_c log p_c

  Labels below 0 are left out.
  """
  logits = logits.astype(jnp.float32)
  values = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.maximum(labels, 0) if labels.ndim > 1 else labels
  )
  if smoothing:
    spread = jax.nn.logsumexp(logits, axis=-1) - jnp.mean(logits, axis=-1)
    values = (1 - smoothing) * values + smoothing * spread
  return _sum(values, labels)


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Squared Euclidean norm of the error: [b, d], [b, d] -> [b].

  Summed over outputs, not averaged: the mean over all entries is smaller by
  the output width, and its learning rates do not carry over.
  """
  error = outputs.astype(jnp.float32) - targets
  return jnp.sum(error * error, axis=tuple(range(1, error.ndim)))


def distillation(
  student: jax.Array,
  teacher: jax.Array,
  temperature: float,
  labels: jax.Array | None = None,
) -> jax.Array:
  """T^2 KL(softmax(teacher / T) || softmax(student / T)), [b, ..., c] -> [b].

  Of tokens, summed over those whose label in [b, ...] counts. No gradient flows
  into the teacher.
  """
  p = jax.nn.log_softmax(
    jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature
  )
  q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
  values = temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)
  return values if labels is None else _sum(values, labels)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """How often the largest logit is the label's: as `cross_entropy`, -> [b]."""
  right = jnp.argmax(logits, axis=-1) == labels
  return _sum(right.astype(jnp.float32), labels)


def _sum(values: jax.Array, labels: jax.Array) -> jax.Array:
  """Adds up the values [b, ...] of labels that count, [b]."""
  if labels.ndim == 1:
    return values
  values = jnp.where(labels >= 0, values, 0.0)
  return jnp.sum(values, axis=tuple(range(1, values.ndim)))


def of_tokens(targets: Any) -> bool:
  """Whether targets are rows of labels, [b, ...], arrays or abstract ones."""
  return np.ndim(targets) > 1 and jnp.issubdtype(targets.dtype, jnp.integer)


def counted(targets: Any) -> Any:
  """How many labels of each example count: targets [b, ...] -> int32 [b]."""
  if not of_tokens(targets):
    return jnp.ones(len(targets), jnp.int32)
  return jnp.sum(targets >= 0, axis=tuple(range(1, targets.ndim)))


def weight(targets: jax.Array) -> jax.Array | float:
  """What makes a mean over examples one over labels: examples by labels."""
  if not of_tokens(targets):
    return 1.0
  return len(targets) / jnp.maximum(jnp.sum(counted(targets)), 1)


LOSSES = {"cross_entropy": cross_entropy, "squared_error": squared_error}
METRICS = {"cross_entropy": {"accuracy": accuracy}, "squared_error": {}}
