"""Time of one LeNet training step in every form, as a ratio to plain Flax.

  python -m benchmarks.train_step                  # table and JSON lines
  python -m benchmarks.train_step --batch_size=256 --rounds=30
  python -m benchmarks.train_step --smoke

The peer is the same network in plain `flax.linen` with an optax step. Forms are
timed in turn, round by round, so that a drifting machine hits them alike; each
row is the median over rounds of ten steps, its spread the quartiles. Random
data, as for time the values do not matter.
"""

import json
import pathlib
import statistics
import time

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from maestro import cli, data, losses, lowrank, models, nn, sampling
from maestro.errors import UserError
from maestro.provenance import git_commit
from maestro.sharding import make_mesh
from maestro.step import TrainState, make_dispatch, make_step, zero_metrics

_BATCH = flags.DEFINE_integer("batch_size", 128, "Examples per step.")
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Rounds of ten steps each.")
_SMOKE = flags.DEFINE_bool("smoke", False, "Two rounds, to try it.")
_OUT = flags.DEFINE_string("out", None, "File to append JSON lines to.")

EXAMPLES = 10_000


class PlainLeNet(linen.Module):
  """The peer: LeNet of plain Flax layers, pooled by `linen.max_pool`."""

  @linen.compact
  def __call__(self, x, train: bool = False):
    for i, width in enumerate((6, 16), 1):
      x = linen.Conv(width, (5, 5), padding="VALID", name=f"conv{i}")(x)
      x = linen.max_pool(linen.relu(x), (2, 2), (2, 2))
    x = x.reshape((x.shape[0], -1))
    for i, width in enumerate((120, 84), 1):
      x = linen.relu(linen.Dense(width, name=f"fc{i}")(x))
    return linen.Dense(10, name="fc3")(x)


def _maestro_form(arrays, tx, *, fraction=None, sampler=sampling.full, lam=0.0):
  """Returns (step, state) of our training step; fraction None is dense."""
  model = models.LeNet(num_classes=10)
  x = jnp.zeros((1, 28, 28, 1))
  params = jax.jit(model.init)(jax.random.key(0), x)["params"]
  ranks = {}
  if fraction is not None:
    layers = nn.layers(model, x)
    params = lowrank.decompose(params, [lowrank.Rule()], layers)
    ranks = sampling.fixed(
      jax.random.key(0), lowrank.full_ranks(params), fraction=fraction
    )
    params = lowrank.truncate(params, ranks)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats={},
    opt_state=tx.init(params),
    ranks=ranks,
    key=jax.random.key_data(jax.random.key(1)),
    metrics=zero_metrics("cross_entropy"),
  )
  step = make_step(
    model,
    tx,
    loss="cross_entropy",
    preprocess=lambda x, key=None: x.astype(jnp.float32) / 255,
    sampler=sampler,
    batch_size=_BATCH.value,
    steps_per_epoch=EXAMPLES // _BATCH.value,
    lam=lam,
    lasso="hierarchical",
    full_pass=None,
    mesh=make_mesh(1),
  )
  return make_dispatch(step, 1), state, arrays


def _plain_form(arrays, tx):
  model = PlainLeNet()
  params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
  n = EXAMPLES // _BATCH.value

  def step(state, arrays):
    step, params, opt_state = state
    start = (step % n) * _BATCH.value
    i = jax.lax.dynamic_slice_in_dim(arrays["order"], start, _BATCH.value)
    x = arrays["inputs"][i].astype(jnp.float32) / 255
    y = arrays["targets"][i]

    def loss(params):
      logits = model.apply({"params": params}, x)
      return losses.cross_entropy(logits, y).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (step + 1, params, opt_state), value

  state = (jnp.zeros((), jnp.int32), params, tx.init(params))
  return jax.jit(step, donate_argnums=0), state, arrays


def main(argv: list[str]) -> None:
  """Times all forms and prints the table."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  rng = np.random.default_rng(0)
  arrays = {
    "inputs": jnp.asarray(
      rng.integers(0, 256, (EXAMPLES, 28, 28, 1), dtype=np.uint8)
    ),
    "targets": jnp.asarray(rng.integers(0, 10, EXAMPLES, dtype=np.int32)),
    "order": data.epoch_order(0, 0, EXAMPLES),
  }
  tx = optax.sgd(0.01, momentum=0.9)
  lod = {"sampler": sampling.one_layer}
  forms = {
    "plain Flax, dense": _plain_form(arrays, tx),
    "maestro, dense": _maestro_form(arrays, tx),
    "factored, full rank": _maestro_form(arrays, tx, fraction=1.0),
    "  + sampler": _maestro_form(arrays, tx, fraction=1.0, **lod),
    "  + sampler + lasso": _maestro_form(
      arrays, tx, fraction=1.0, lam=1e-3, **lod
    ),
    "truncated to 50 %": _maestro_form(arrays, tx, fraction=0.5),
    "truncated to 25 %": _maestro_form(arrays, tx, fraction=0.25),
  }
  states = {name: state for name, (_, state, _) in forms.items()}
  times: dict[str, list[float]] = {name: [] for name in forms}
  for turn in range(1 + (2 if _SMOKE.value else _ROUNDS.value)):
    for name, (step, _, arrays) in forms.items():
      started = time.perf_counter()
      for _ in range(10):
        states[name], loss = step(states[name], arrays)
      jax.block_until_ready(loss)
      if turn:  # the first round compiles
        times[name].append((time.perf_counter() - started) * 100)
  device = jax.devices()[0]
  print(
    f"LeNet, batch {_BATCH.value}, float32, {device.device_kind},"
    f" JAX {jax.__version__}"
  )
  print(f"{'form':<22} {'ms':>7} {'quartiles':>15} {'of plain Flax':>14}")
  peer = statistics.median(times["plain Flax, dense"])
  for name, values in times.items():
    low, median, high = np.percentile(values, [25, 50, 75])
    print(
      f"{name:<22} {median:7.2f} {f'{low:.2f} - {high:.2f}':>15}"
      f" {median / peer:13.2f}x"
    )
    if _OUT.value:
      row = {
        "benchmark": "train_step",
        "network": "lenet",
        "batch_size": _BATCH.value,
        "form": name.strip(" +"),
        "ms": median,
        "quartiles_ms": [low, high],
        "ratio_to_plain_flax": median / peer,
        "device": f"{device.platform}: {device.device_kind}",
        "jax": jax.__version__,
        "git": git_commit(),
      }
      with pathlib.Path(_OUT.value).open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
  cli.run(main)
