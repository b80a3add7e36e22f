"""Losses of single examples, and what is reported beside them."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Cross entropy in nats: logits [b, c], labels int [b] -> [b]."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  """Squared Euclidean norm of the error: [b, d], [b, d] -> [b].

  Summed over outputs, not averaged: the mean over all entries is smaller by
  the output width, and its learning rates do not carry over.
  """
  error = outputs.astype(jnp.float32) - targets
  return jnp.sum(error * error, axis=tuple(range(1, error.ndim)))


def distillation(
  student: jax.Array, teacher: jax.Array, temperature: float
) -> jax.Array:
  """T^2 KL(softmax(teacher / T) || softmax(student / T)), [b, c] -> [b].

  No gradient flows into the teacher.
  """
  p = jax.nn.log_softmax(
    jax.lax.stop_gradient(teacher).astype(jnp.float32) / temperature
  )
  q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
  return temperature**2 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """1 where the largest logit is the label's: [b, c], int [b] -> [b]."""
  return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


LOSSES = {"cross_entropy": cross_entropy, "squared_error": squared_error}
METRICS = {"cross_entropy": {"accuracy": accuracy}, "squared_error": {}}
