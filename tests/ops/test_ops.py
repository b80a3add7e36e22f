"""Tests of the low-rank products against NumPy in double precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import ops
from maestro.trees import LowRankError

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 7)).astype(np.float32)
U = rng.standard_normal((7, 5)).astype(np.float32)
V = rng.standard_normal((5, 6)).astype(np.float32)
BIAS = rng.standard_normal(6).astype(np.float32)
IMAGE = rng.standard_normal((2, 5, 6, 4)).astype(np.float32)


def _jax(*arrays):
  return tuple(jnp.asarray(a) for a in arrays)


def _conv_reference(x, kernel, strides, pads, holes, spread, groups):
  """Convolves [batch, h, w, in] in float64, one window at a time."""
  x, kernel = np.float64(x), np.float64(kernel)
  b, h, w, c = x.shape
  wide = np.zeros((b, (h - 1) * holes[0] + 1, (w - 1) * holes[1] + 1, c))
  wide[:, :: holes[0], :: holes[1]] = x
  wide = np.pad(wide, [(0, 0), *pads, (0, 0)])
  kh, kw, c_in, c_out = kernel.shape
  size = [
    (wide.shape[1 + i] - (k - 1) * spread[i] - 1) // strides[i] + 1
    for i, k in enumerate((kh, kw))
  ]
  y = np.zeros((b, *size, c_out))
  for i, j, g in np.ndindex(*size, groups):
    top, left = i * strides[0], j * strides[1]
    rows = top + np.arange(kh) * spread[0]
    columns = left + np.arange(kw) * spread[1]
    window = wide[:, rows][:, :, columns]
    window = window[..., g * c_in : (g + 1) * c_in]
    outs = slice(g * (c_out // groups), (g + 1) * (c_out // groups))
    y[:, i, j, outs] = np.einsum("bhwc,hwco->bo", window, kernel[..., outs])
  return y


def _ranks(rank):
  """The same rank in each form in which it may be given."""
  return [rank, np.int32(rank), jnp.int32(rank)]


@pytest.mark.quick(1)
@pytest.mark.parametrize("rank", [None, 5, 3, 1, 0])
def test_dot_equals_double_precision(rank, close):
  r = 5 if rank is None else rank
  expected = np.float64(X) @ np.float64(U[:, :r]) @ np.float64(V[:r]) + BIAS
  x, u, v, bias = _jax(X, U, V, BIAS)
  for form in [None] if rank is None else _ranks(rank):
    close(ops.lowrank_dot(x, u, v, form, bias=bias), expected)


def test_dot_takes_a_traced_rank_and_clips_it(close, counted):
  x, u, v = _jax(X, U, V)
  traced = counted(ops.lowrank_dot)
  dot = jax.jit(traced)
  for rank, r in ((2, 2), (99, 5), (-3, 0)):
    close(dot(x, u, v, jnp.int32(rank)), ops.lowrank_dot(x, u, v, r))
  assert traced.times == 1


def test_dot_of_a_static_rank_is_smaller():
  def dot(x, u, v):
    return ops.lowrank_dot(x, u, v, 2)

  jaxpr = jax.make_jaxpr(dot)(X[0], U, V)
  products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
  assert [e.outvars[0].aval.shape for e in products] == [(3, 2), (3, 6)]


CONVS = {
  "valid": {"padding": "VALID"},
  "strided": {"padding": ((1, 2), (0, 1)), "strides": (2, 1)},
  "dilated": {"padding": ((1, 1), (2, 0)), "kernel_dilation": (1, 2)},
  "spread": {
    "padding": ((1, 0), (0, 0)),
    "input_dilation": (2, 1),
    "strides": (1, 2),
  },
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS.keys())
def test_conv_equals_double_precision(options, groups, close):
  rng = np.random.default_rng(1)
  u = rng.standard_normal((groups, 2, 3, 4 // groups, 5)).astype(np.float32)
  v = rng.standard_normal((groups, 5, 6 // groups)).astype(np.float32)
  pads = options["padding"]
  one = (1, 1)
  for ranks in ([5, 5], [3, 1], [0, 4], [0, 0]):
    ranks = ranks[:groups]
    kernel = np.concatenate(
      [
        np.float64(u[g][..., :r]) @ np.float64(v[g][:r])
        for g, r in enumerate(ranks)
      ],
      -1,
    )
    expected = BIAS + _conv_reference(
      IMAGE,
      kernel,
      options.get("strides", one),
      [(0, 0)] * 2 if pads == "VALID" else pads,
      options.get("input_dilation", one),
      options.get("kernel_dilation", one),
      groups,
    )
    if groups == 1:
      factors, forms = _jax(u[0], v[0]), _ranks(ranks[0])
    else:
      factors, forms = _jax(u, v), [jnp.array(ranks, jnp.int32)]
      if len(set(ranks)) == 1:
        forms += _ranks(ranks[0])
    x, bias = _jax(IMAGE, BIAS)
    for rank in forms:
      found = ops.lowrank_conv(
        x, *factors, rank, bias=bias, groups=groups, **options
      )
      close(found, expected)


def test_conv_pads_same_by_default(close):
  u = jnp.asarray(rng.standard_normal((3, 3, 4, 5)), jnp.float32)
  x, v = _jax(IMAGE, V)
  expected = _conv_reference(
    IMAGE, np.float64(u) @ V, (1, 1), [(1, 1)] * 2, (1, 1), (1, 1), 1
  )
  close(ops.lowrank_conv(x, u, v), expected)


def test_conv_takes_a_traced_rank_and_clips_it(close, counted):
  u = jnp.asarray(rng.standard_normal((1, 1, 4, 5)), jnp.float32)
  x, v = _jax(IMAGE, V)
  traced = counted(ops.lowrank_conv)
  conv = jax.jit(traced)
  for rank, r in ((2, 2), (99, 5), (-3, 0)):
    close(conv(x, u, v, jnp.int32(rank)), ops.lowrank_conv(x, u, v, r))
  assert traced.times == 1


@pytest.mark.parametrize("rank", [-1, 6, np.int32(6), jnp.int32(-1)])
def test_concrete_rank_out_of_range_raises(rank):
  x, u, v = _jax(X, U, V)
  with pytest.raises(LowRankError, match=r"outside \[0, 5\]"):
    ops.lowrank_dot(x, u, v, rank)
  with pytest.raises(LowRankError, match=r"outside \[0, 5\]"):
    ops.lowrank_conv(x, u[None], v, rank)


def test_unknown_implementation_raises():
  x, u, v = _jax(X, U, V)
  with pytest.raises(ValueError, match="'nothing' is unknown"):
    ops.lowrank_dot(x, u, v, implementation="nothing")
  with pytest.raises(ValueError, match="'nothing' is unknown"):
    ops.lowrank_conv(x, u[None], v, implementation="nothing")


def test_named_implementation_is_the_default(close):
  x, u, v = _jax(X, U, V)
  y = ops.lowrank_dot(x, u, v, 3)
  assert jnp.array_equal(ops.lowrank_dot(x, u, v, 3, implementation="xla"), y)


# The hook of conftest names the argument before the op's own check can.
MISFIT = "Type-check error|shapes do not fit"


@pytest.mark.parametrize(
  ("x", "u", "v"),
  [
    ((3, 6), (7, 5), (5, 6)),
    ((3, 7), (7, 5), (4, 6)),
    ((3, 7), (7, 5, 1), (5, 6)),
  ],
)
def test_dot_refuses_shapes_that_do_not_fit(x, u, v):
  arrays = (jnp.ones(shape) for shape in (x, u, v))
  with pytest.raises((ValueError, TypeError), match=MISFIT):
    ops.lowrank_dot(*arrays)


@pytest.mark.parametrize(
  ("u", "v", "groups"),
  [
    ((2, 2, 3, 5), (5, 6), 1),  # inputs
    ((2, 4, 5), (5, 6), 1),  # a window of one axis
    ((2, 2, 4, 5), (4, 6), 1),  # ranks
    ((2, 2, 4, 5), (5, 6), 2),  # no axis of groups
    ((2, 2, 2, 2, 5), (1, 5, 3), 2),  # groups
    ((2, 2, 2, 4, 5), (2, 5, 3), 2),  # inputs of a group
  ],
)
def test_conv_refuses_shapes_that_do_not_fit(u, v, groups):
  with pytest.raises(ValueError, match="lowrank_conv: shapes do not fit"):
    ops.lowrank_conv(
      jnp.asarray(IMAGE), jnp.ones(u), jnp.ones(v), groups=groups
    )


# ---------------------------------------------------------------------------
# Convolutions that are a product on CPUs
# ---------------------------------------------------------------------------

CONVOLUTIONS = {
  "2x2": ((2, 2), (3, 3), (1, 1), "SAME", (1, 1)),
  "4x4": ((4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
  "1x1 pixel": ((1, 1), (3, 3), (1, 1), "SAME", (1, 1)),
  "window of one": ((9, 7), (1, 1), (1, 1), "VALID", (1, 1)),
  "strided window of one": ((9, 7), (1, 1), (2, 3), "SAME", (1, 1)),
  "strided": ((8, 7), (3, 2), (2, 3), "SAME", (1, 1)),
  "odd padding": ((5, 3), (3, 3), (2, 1), ((0, 2), (1, 0)), (1, 1)),
  "dilated": ((6, 6), (2, 3), (1, 1), ((0, 1), (1, 0)), (3, 2)),
  "negative padding": ((6, 6), (2, 2), (1, 1), ((-1, 0), (0, -2)), (1, 1)),
  "one axis": ((12,), (5,), (1,), "SAME", (2,)),
  "few channels": ((9, 8), (3, 2), (2, 1), "SAME", (1, 1)),
  "three axes": ((2, 3, 2), (2, 2, 3), (1, 1, 1), "SAME", (1, 1, 1)),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_as_a_product_equals_lax(name):
  space, window, strides, padding, dilation = CONVOLUTIONS[name]
  rng = np.random.default_rng(0)
  n_in = 3 if name == "few channels" else 4
  x = rng.normal(size=(3, *space, n_in)).astype(np.float32)
  kernel = rng.normal(size=(*window, n_in, 5)).astype(np.float32)
  n = len(space)
  numbers = jax.lax.ConvDimensionNumbers(
    (0, n + 1, *range(1, n + 1)),
    (n + 1, n, *range(n)),
    (0, n + 1, *range(1, n + 1)),
  )

  def run(convolve):
    def f(x, kernel):
      return convolve(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=(1,) * n,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=1,
        precision=None,
      )

    y, pull = jax.vjp(f, x, kernel)
    return str(jax.make_jaxpr(f)(x, kernel)), (y, *pull(jnp.cos(y)))

  program, found = run(ops.convolution)
  assert "conv_general_dilated" not in program
  _, wanted = run(jax.lax.conv_general_dilated)
  for a, b in zip(found, wanted, strict=True):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_large_grouped_and_accelerators_convolutions_stay_with_xla(
  monkeypatch,
):
  x, kernel = jnp.ones((2, 8, 8, 8)), jnp.ones((3, 3, 8, 8))

  def program(x, kernel, groups=1):
    f = functools.partial(
      ops.convolution,
      strides=(1, 1),
      padding="SAME",
      lhs_dilation=(1, 1),
      rhs_dilation=(1, 1),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
      precision=None,
    )
    return str(jax.make_jaxpr(f)(x, kernel))

  assert "conv_general_dilated" in program(x, kernel)
  small = x[:, :4, :4]
  assert "conv_general_dilated" not in program(small, kernel)
  assert "conv_general_dilated" in program(small, kernel[..., :7])
  assert "conv_general_dilated" not in program(x[:, :2, :2], kernel[..., :7])
  assert "conv_general_dilated" not in program(x[..., :3], kernel[:, :, :3])
  assert "conv_general_dilated" in program(small, kernel[:, :, :4], 2)
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert "conv_general_dilated" in program(small, kernel)


# ---------------------------------------------------------------------------
# Factors above break-even are multiplied out, for enough rows
# ---------------------------------------------------------------------------


def _shapes_of_products(f, *args):
  names = ("dot_general", "conv_general_dilated")
  return {
    e.invars[1].aval.shape
    for e in jax.make_jaxpr(f)(*args).eqns
    if e.primitive.name in names
  }


@pytest.mark.quick(1)
@pytest.mark.parametrize("rank", [None, 7, 5, 2, 0, "traced"])
@pytest.mark.parametrize("kind", ["dot", "conv"])
def test_factors_multiplied_out_give_the_same(kind, rank):
  rng = np.random.default_rng(0)
  shape = (40, 6, 7, 8) if kind == "conv" else (500, 8)
  window = (3, 3) if kind == "conv" else ()
  x, u, v, bias = (
    rng.normal(size=s).astype(np.float32)
    for s in (shape, (*window, 8, 7), (7, 7), (7,))
  )
  r = {"traced": 4, None: 7}.get(rank, rank)
  if rank == "traced":  # what is beyond the rank reaches nothing
    u[..., r:], v[r:] = np.nan, np.nan
  call = ops.lowrank_conv if kind == "conv" else ops.lowrank_dot

  def f(x, u, v, bias, *traced):
    return call(x, u, v, *(traced or (rank,)), bias=bias)

  def two(x, u, v, bias):
    h = call(x, u[..., :r], jnp.eye(r))
    y = h @ v[:r]
    return y + jnp.broadcast_to(bias, y.shape)

  traced = (jnp.int32(r),) if rank == "traced" else ()
  if r < 7 and not traced:
    # Break-even is 8 * 7 / 15 = 3.7, of the convolution 72 * 7 / 79 = 6.4.
    whole = (*window, 8, 7) in _shapes_of_products(f, x, u, v, bias)
    assert whole == (rank == 5 and kind == "dot")
  y, pull = jax.vjp(lambda *a: f(*a, *traced), x, u, v, bias)
  u, v = np.nan_to_num(u), np.nan_to_num(v)
  wanted, pull_wanted = jax.vjp(two, x, u, v, bias)
  g = np.cos(wanted)
  for a, b in zip((y, *pull(g)), (wanted, *pull_wanted(g)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_few_rows_are_not_worth_multiplying_out():
  u, v = jnp.ones((8, 7)), jnp.ones((7, 9))
  few = _shapes_of_products(ops.lowrank_dot, jnp.ones((2, 8)), u, v)
  many = _shapes_of_products(ops.lowrank_dot, jnp.ones((500, 8)), u, v)
  assert (8, 9) not in few and (8, 9) in many


# ---------------------------------------------------------------------------
# Gradients of convolutions with many pixels, on CPUs
# ---------------------------------------------------------------------------

_LARGE = {
  "plain": {},
  "valid": {"padding": "VALID"},
  "strided": {"strides": (2, 2)},
  "uneven": {"strides": (3, 2), "padding": ((2, 0), (1, 3))},
  "one stride": {"strides": (1, 2), "padding": ((2, 0), (1, 3))},
  "dilated": {"rhs_dilation": (2, 1)},
  "cropped": {"padding": ((-1, 2), (0, -2))},
}


def _convolve(x, kernel, convolve, **options):
  n = x.ndim - 2
  options = {"strides": (1,) * n, "padding": "SAME"} | options
  strides, padding = options.pop("strides"), options.pop("padding")
  space = "DHW"[3 - n :]
  return convolve(
    x,
    kernel,
    strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=options.pop("rhs_dilation", None),
    dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    feature_group_count=1,
    precision=None,
  )


def _large_gradients(x, kernel, **options):
  """Checks gradients against XLA's; returns the backward pass as a program."""
  x, kernel = (jnp.asarray(v, jnp.float32) for v in (x, kernel))

  def run(convolve):
    def f(x, k):
      return _convolve(x, k, convolve, **options)

    y, pull = jax.vjp(f, x, kernel)
    return y, pull(jnp.cos(y))

  ours, theirs = run(ops.convolution), run(jax.lax.conv_general_dilated)
  np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
  for a, b in zip(ours[1], theirs[1], strict=True):
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 2e-6 * np.abs(b).max()
  return str(jax.make_jaxpr(lambda: run(ops.convolution)[1][1])())


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", _LARGE.values(), ids=_LARGE)
@pytest.mark.parametrize("window", [(3, 3), (5, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [2, 5])
@pytest.mark.parametrize("blocks", [1, 6])
def test_gradients_of_large_convolutions_are_those_of_xla(
  options, window, channels, blocks, monkeypatch
):
  monkeypatch.setattr(ops.cpu, "_BLOCK", 1 if blocks > 1 else 1 << 30)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((6, 41, 37, channels))
  kernel = rng.standard_normal((*window, channels, 4))
  program = _large_gradients(x, kernel, **options)
  assert ("length=6" in program) == (blocks == 6)


@pytest.mark.quick(1)
@pytest.mark.parametrize("window", [(4,), (3, 1, 2)], ids=str)
def test_gradients_of_large_convolutions_of_other_axes(window, monkeypatch):
  monkeypatch.setattr(ops.cpu, "_BLOCK", 1)
  rng = np.random.default_rng(1)
  space = {1: (70,), 3: (6, 5, 7)}[len(window)]
  x = rng.standard_normal((2, *space, 5))
  _large_gradients(x, rng.standard_normal((*window, 5, 3)))


def test_a_block_is_as_large_as_fits_and_divides_the_batch(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  # Of ones, all summands would be equal, whose sums drift on some CPUs.
  rng = np.random.default_rng(2)
  x, kernel = (rng.standard_normal(n) for n in ((12, 10, 10, 4), (3, 3, 4, 5)))
  one = 12 * 10 * 3 * (4 + 5)  # an image's three copies, padded along one axis
  for fit, blocks in ((5.9, 3), (6, 2), (2.5, 6), (0.5, 12)):
    monkeypatch.setattr(ops.cpu, "_BLOCK", int(fit * one))
    assert f"length={blocks}" in _large_gradients(x, kernel)
  # Devices may split the batch.
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  assert "length=" not in _large_gradients(x, kernel)


def test_large_convolutions_batch_and_keep_half_precision():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.standard_normal((3, 2, 16, 16, 4)), jnp.bfloat16)
  kernel = jnp.asarray(rng.standard_normal((3, 3, 4, 6)), jnp.bfloat16)

  def gradient(x, convolve):
    def loss(k):
      return jnp.sum(_convolve(x, k, convolve).astype(jnp.float32) ** 2)

    return jax.grad(loss)(kernel)

  ours = jax.vmap(lambda x: gradient(x, ops.convolution))(x)
  assert ours.dtype == jnp.bfloat16
  for a, row in zip(ours, x, strict=True):
    b = gradient(row, jax.lax.conv_general_dilated).astype(jnp.float32)
    assert np.abs(a.astype(jnp.float32) - b).max() <= 0.02 * np.abs(b).max()


def test_precise_programs_are_compiled_without_a_search_on_gpus(monkeypatch):
  x = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)

  def square(x):
    return jnp.dot(x, x, precision="highest")

  expected = np.asarray(x, np.float64) @ np.asarray(x, np.float64)
  np.testing.assert_allclose(ops.jit_precise(square)(x), expected, rtol=1e-5)
  given = []

  def jit(function, compiler_options):
    given.append(compiler_options)
    # Refused here if this JAX does not know an option.
    return functools.partial(compiled, compiler_options=compiler_options)

  def compiled(x, compiler_options):
    return original(square, compiler_options=compiler_options)(x)

  original = jax.jit
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "jit", jit)
  y = ops.jit_precise(square)(x)
  assert given == [{"xla_gpu_enable_triton_gemm": False}]
  np.testing.assert_allclose(y, expected, rtol=1e-5)
