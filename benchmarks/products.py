"""Low-rank products in a stack of square layers, against dense ones.

  python -m benchmarks.products                       # on an accelerator
  python -m benchmarks.products --sizes=1024 --rows=64 --dtype=float32
  python -m benchmarks.products --smoke

Each form is a program of --depth layers `relu(x @ w)`, every layer with weights
of its own, so that no cache holds them from one to the next. "forward" is the
last layer's output, "training" the gradients by all weights and the input.

  dense        w [d, d]
  static       u [d, r] and v [r, d]: a model that was cut to rank r
  mask         u [d, R], v [R, d], R = d / --stored, at a rank r that is known
               only as the program runs, as of a model whose ranks are sampled:
               `ops.lowrank_dot`, implementation "xla", at the full cost
  switch       the same by implementation "switch", whose cost follows the rank;
               also at r = R

Floor: the time of the needed operations at the device's own measured ceiling of
products, or of the needed bytes at that of copies, whichever is longer (each
weight, layer input and, in training, gradient once). A dense layer does
2 B d d operations forward, a factored one 4 B d r, and three times as many in
training. Times are medians over rounds in which all forms take turns. --out
appends a JSON line a program as they come.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.train_step import Form, append, interleave, machine
from maestro import cli, ops
from maestro.errors import UserError
from maestro.report.tables import text_table


def _compiled(function: Callable, *args: Any) -> Form:
  """Compiles a function into a form; a call waits for its end."""
  began = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  facts = {"compile_seconds": time.perf_counter() - began}

  def run(calls: int) -> tuple[float, float]:
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
      out = compiled(*args)
    jax.block_until_ready(out)
    return time.perf_counter() - started, time.process_time() - cpu

  return Form(run, 1, facts)


def ceilings(dtype: str, size: int, copied: int) -> dict[str, float]:
  """Measures what the device can do at best.

  Args:
    dtype: of the product.
    size: of a square product, in rows.
    copied: bytes of an array that is copied.

  Returns:
    {"flops": of the product, a second, "bandwidth": bytes read and written a
    second}.
  """
  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(k, (size, size), dtype) for k in keys)
  x = jax.random.normal(keys[0], (copied // 4,), jnp.float32)
  forms = {
    "product": _compiled(jnp.matmul, a, b),
    # Not a plain copy, which a compiler would leave out.
    "copy": _compiled(jnp.negative, x),
  }
  # Of a device that is awake: the best round, after the first have warmed it.
  times, _, _ = interleave(forms, 10, 0.2)
  ms = {name: float(np.min(values)) for name, values in times.items()}
  return {
    "flops": 2 * size**3 / (1e-3 * ms["product"]),
    "bandwidth": 2 * x.nbytes / (1e-3 * ms["copy"]),
  }


# ---------------------------------------------------------------------------
# Forms
# ---------------------------------------------------------------------------


def _dense(x: jax.Array, weights: Any) -> jax.Array:
  for w in weights:
    x = jax.nn.relu(x @ w)
  return x


def _static(x: jax.Array, weights: Any) -> jax.Array:
  for u, v in weights:
    x = jax.nn.relu((x @ u) @ v)
  return x


def _runtime(implementation: str) -> Callable:
  """Layers of a rank that is an argument of the program."""

  def forward(x: jax.Array, weights: Any, rank: jax.Array) -> jax.Array:
    for u, v in weights:
      y = ops.lowrank_dot(x, u, v, rank, implementation=implementation)
      x = jax.nn.relu(y)
    return x

  return forward


def _training(forward: Callable) -> Callable:
  """The gradients of a mean by the input and all weights."""

  def loss(x, weights, *rest):
    return jnp.mean(forward(x, weights, *rest).astype(jnp.float32))

  return jax.grad(loss, argnums=(0, 1))


def _weights(size: int, rank: int | None, depth: int, dtype: str) -> list:
  keys = jax.random.split(jax.random.key(1), 2 * depth)
  scale = size**-0.5
  if rank is None:
    return [
      scale * jax.random.normal(k, (size, size), dtype) for k in keys[:depth]
    ]
  return [
    (
      scale * jax.random.normal(keys[2 * i], (size, rank), dtype),
      rank**-0.5 * jax.random.normal(keys[2 * i + 1], (rank, size), dtype),
    )
    for i in range(depth)
  ]


def floor_ms(
  rows: int,
  size: int,
  rank: int | None,
  width: int,
  training: bool,
  limits: Mapping[str, float],
) -> float:
  """The least time of one layer, in ms; see the module's docstring.

  Args:
    rows: B.
    size: d, inputs and outputs of the layer.
    rank: r; None is dense.
    width: bytes of a number.
    training: both directions.
    limits: see `ceilings`.
  """
  weights = size * size if rank is None else 2 * size * rank
  operations = 2 * rows * weights
  numbers = 2 * rows * size + weights
  if training:
    operations *= 3
    # Input and output; their gradients, the output's read twice; the weights
    # twice, and their gradients.
    numbers = 2 * rows * size + 3 * rows * size + 3 * weights
  return 1e3 * max(
    operations / limits["flops"], width * numbers / limits["bandwidth"]
  )


def measure(
  rows: int,
  size: int,
  *,
  depth: int,
  shares: list[int],
  stored: int,
  dtype: str,
  rounds: int,
  limits: Mapping[str, float],
  seconds: float,
) -> list[dict[str, Any]]:
  """Measures all forms at one size; `shares` are n of ranks d / n.

  Factors of forms whose rank is known late have rank d / `stored`.
  """
  x = jax.random.normal(jax.random.key(2), (rows, size), dtype)
  ranks = {n: max(size // n, 1) for n in shares}
  found = []
  for training in (False, True):
    wrap = _training if training else (lambda f: f)
    dense = _weights(size, None, depth, dtype)
    forms = {"dense": _compiled(wrap(_dense), x, dense)}
    wanted: dict[str, int | None] = {"dense": None}
    for n, rank in ranks.items():
      factors = _weights(size, rank, depth, dtype)
      name = f"static d/{n}"
      forms[name], wanted[name] = _compiled(wrap(_static), x, factors), rank
    largest = max(size // stored, 1)
    factors = _weights(size, largest, depth, dtype)
    for kind, implementation in (("mask", "xla"), ("switch", "switch")):
      for n, rank in {**ranks, stored: largest}.items():
        if rank > largest or (kind == "mask" and n != stored):
          continue  # a mask costs the same at any rank
        name = f"{kind} d/{n} of d/{stored}"
        program = wrap(_runtime(implementation))
        forms[name] = _compiled(program, x, factors, jnp.int32(rank))
        wanted[name] = rank
    times, _, _ = interleave(forms, rounds, seconds)
    for form, ms in times.items():
      rank = wanted[form]
      floor = floor_ms(
        rows, size, rank, jnp.dtype(dtype).itemsize, training, limits
      )
      each = float(np.median(ms)) / depth
      found.append(
        {
          "benchmark": "products",
          "pass": "training" if training else "forward",
          "rows": rows,
          "size": size,
          "depth": depth,
          "dtype": dtype,
          "form": form,
          "rank": rank,
          "us": 1e3 * each,
          "floor_us": 1e3 * floor,
          "over_floor": each / floor,
          "ratio_to_dense": float(np.median(ms / times["dense"])),
          "ratio_to_mask": float(
            np.median(ms / times[f"mask d/{stored} of d/{stored}"])
          ),
          "compile_seconds": forms[form].facts["compile_seconds"],
        }
        | {f"ceiling_{key}": value for key, value in limits.items()}
        | machine()
      )
  return found


def table(found: list[dict[str, Any]]) -> str:
  """Lays the rows out as text."""
  cells = [
    ["B", "d", "pass", "form", "us a layer", "/ floor", "/ dense", "/ mask"]
  ]
  cells += [
    [
      f"{row['rows']}",
      f"{row['size']}",
      row["pass"],
      row["form"],
      f"{row['us']:.1f}",
      f"{row['over_floor']:.2f}",
      f"{row['ratio_to_dense']:.2f}",
      f"{row['ratio_to_mask']:.2f}",
    ]
    for row in found
  ]
  return text_table(cells)


def main(argv: list[str]) -> None:
  """Measures every pair of --rows and --sizes, and prints a table each."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  try:
    batches, sizes, shares = (
      [int(text) for text in values[key].value]
      for key in ("rows", "sizes", "shares")
    )
  except ValueError as e:
    raise UserError(f"--rows, --sizes, --shares: {e}") from None
  counts = [values.rounds, values.depth, values.stored]
  if min([*batches, *sizes, *shares, *counts]) < 1:
    raise UserError(
      "--rows, --sizes, --shares, --rounds, --depth, --stored: from 1 on"
    )
  run = functools.partial(
    measure,
    depth=values.depth,
    shares=shares,
    stored=values.stored,
    dtype=values.dtype,
    rounds=values.rounds,
    seconds=0.05,
  )
  side, copied = 8192, 1 << 32
  if values.smoke:
    batches, sizes, shares = [8], [32], [2, 8]
    run = functools.partial(run, depth=2, shares=shares, rounds=1, seconds=0.0)
    side, copied = 64, 1 << 16
  elif jax.default_backend() == "cpu":
    side, copied = 1024, 1 << 28
  if values.out:
    append([], values.out)
  limits = ceilings(values.dtype, side, copied)
  print(
    f"{jax.devices()[0].device_kind}: products in {values.dtype}"
    f" {limits['flops'] / 1e12:.2f} TFLOP/s, copies"
    f" {limits['bandwidth'] / 1e12:.2f} TB/s",
    flush=True,
  )
  for size in sizes:
    for rows in batches:
      found = run(rows, size, limits=limits)
      if values.out:
        append(found, values.out)
      print(f"\n{table(found)}", flush=True)


def define_flags() -> None:
  """Defines the command's flags."""
  flags.DEFINE_list("sizes", ["1024", "4096"], "d: inputs and outputs.")
  flags.DEFINE_list("rows", ["1024", "8192"], "B: rows of the input.")
  flags.DEFINE_list("shares", ["4", "8", "32"], "n of the ranks d/n.")
  flags.DEFINE_integer("stored", 2, "n of the stored rank d/n.")
  flags.DEFINE_integer("depth", 8, "Layers of a program.")
  flags.DEFINE_integer("rounds", 7, "Times each form is timed.")
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of all.")
  flags.DEFINE_bool("smoke", False, "One small size, once, to try it.")
  flags.DEFINE_string("out", None, "File to append JSON lines to.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
