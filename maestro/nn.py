"""Flax layers that run on a kernel, on factors, or on the sum of both.

Each is a subclass of the `flax.linen` layer of the same name and takes the same
arguments. While its parameters hold a `kernel`, it *is* that layer; when they
hold `u` and `v` (see `maestro.decompose`) it multiplies with the factors; with
all three its weight is `kernel + u @ v`. An optional, read-only collection
`ranks` beside `params` holds the rank to run at:

  model.apply({"params": params, "ranks": {"fc": {"rank": 3}}}, x)

A rank is a run-time value: one compilation serves all of them.
"""

import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen import module as flax_module
from flax.linen.linear import canonicalize_padding

from maestro import ops, trees
from maestro.trees import Leaf, LowRankError

# Paths whose rank was read, while `check_ranks` traces a model.
# Whether batch norm is to store the statistics of the batch alone: see
# `introspect.batch_statistics`.
BATCH_ALONE = contextvars.ContextVar("batch_alone", default=False)
_read: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar(
  "ranks_read", default=None
)


def path_of(module: nn.Module) -> str:
  return "/".join(module.path)


def stays_dense(path: str) -> str:
  """Says by which rule a layer is not decomposed."""
  return (
    "keep it dense by a rule before the others:"
    f" Rule({re.escape(path)!r}, decompose=False)"
  )


# Of a rank that lies among its layer's parameters, as `maestro.adapt` puts it
# there: whatever transform passes on the parameters passes it on, too.
RANK = "maestro_rank"


def is_factored(module: nn.Module) -> bool:
  return module.has_variable("params", "u")


def _factors(module: nn.Module) -> tuple[Any, Any, Any]:
  """Reads u, v and the rank (None without a `ranks` collection)."""
  if type(module).param is not nn.Module.param:
    raise LowRankError(
      f"layer {path_of(module)!r}: {type(module).__name__} overrides `param`,"
      f" which factors do not pass through; {stays_dense(path_of(module))}"
    )
  # Not `param`, which would hold truncated factors to the initial shapes.
  u, v = (_parameter(module, name) for name in ("u", "v"))
  if v is None:
    raise LowRankError(
      f"layer {path_of(module)!r} holds `u` but no `v`; factors come in pairs"
    )
  rank = module.get_variable("ranks", "rank")
  if rank is None:
    rank = module.get_variable("params", RANK)
  if rank is None:
    _check_not_lost(module)
    return u, v, None
  if (read := _read.get()) is not None:
    read.add(path_of(module))
  trees.check_rank(rank, u.shape[-1], path_of(module))
  return u, v, rank


def _parameter(module: nn.Module, name: str) -> Any:
  return meta.unbox(module.get_variable("params", name))


def _promoted(module: Any, *arrays: Leaf | None, **options: Any) -> Any:
  """Returns arrays of one dtype, the layer's if it has one."""
  return module.promote_dtype(*arrays, dtype=module.dtype, **options)


def _check_not_lost(module: nn.Module) -> None:
  """Raises if the model was given a rank that does not reach its layer.

  A lifted transform (scan, vmap, RNN) passes on the collections that it names.
  """
  # Flax has no public way from a module within a transform to the one around.
  for outer in flax_module._context.module_stack:
    scope = None if outer is None else outer.scope
    ranks = {} if scope is None else scope.root.variables().get("ranks", {})
    if "rank" in (trees.get(ranks, path_of(module)) or {}):
      raise LowRankError(
        f"layer {path_of(module)!r}: its rank is given, but a transform around"
        " it (scan, vmap, RNN) does not pass `ranks` on, so it would run at"
        ' full rank; name it beside the parameters: variable_axes={"params": 0,'
        ' "ranks": 0} where they are stacked, variable_broadcast=("params",'
        ' "ranks") where they are shared (as in nn.RNN)'
      )


def _bias(module: Any, kernel: bool) -> Any:
  """Bias of a factored layer; the dense part adds it if there is one."""
  if kernel or not module.use_bias:
    return None
  return _parameter(module, "bias")


def _refuse(module: Any, *names: str) -> None:
  for name in names:
    if getattr(module, name) is not None:
      raise LowRankError(
        f"layer {path_of(module)!r}: `{name}` replaces one product by another,"
        " but a factored layer has two; leave it out, or"
        f" {stays_dense(path_of(module))}"
      )


class Dense(nn.Dense):
  """`flax.linen.Dense`, dense or factored: u [in, R], v [R, features]."""

  implementation: str | None = None

  @nn.compact
  def __call__(self, inputs: Leaf) -> jax.Array:
    return dense(self, super().__call__, inputs)


def dense(module: nn.Dense, call: Callable, inputs: Leaf) -> jax.Array:
  """Runs a Dense on factors if it holds some, else by `call`, as Flax does."""
  if not is_factored(module):
    return call(inputs)
  _refuse(module, "dot_general", "dot_general_cls")
  u, v, rank = _factors(module)
  summed = module.has_variable("params", "kernel")
  x, u, v, bias = _promoted(module, inputs, u, v, _bias(module, summed))
  y = ops.lowrank_dot(
    x,
    u,
    v,
    rank,
    bias=bias,
    precision=module.precision,
    implementation=_implementation(module),
  )
  return y + call(inputs) if summed else y


def _implementation(module: nn.Module) -> str | None:
  return getattr(module, "implementation", None)


class DenseGeneral(nn.DenseGeneral):
  """`flax.linen.DenseGeneral`: u [*batch, *in, R], v [*batch, R, *features]."""

  implementation: str | None = None

  @nn.compact
  def __call__(self, inputs: Leaf) -> jax.Array:
    return dense_general(self, super().__call__, inputs)


def dense_general(
  module: nn.DenseGeneral, call: Callable, inputs: Leaf
) -> jax.Array:
  """Runs a DenseGeneral on factors if it holds some, else by `call`."""
  if not is_factored(module):
    return call(inputs)
  _refuse(module, "dot_general", "dot_general_cls")
  u, v, rank = _factors(module)
  summed = module.has_variable("params", "kernel")
  x, u, v, bias = _promoted(module, inputs, u, v, _bias(module, summed))
  axis, batch = general_axes(module, inputs.ndim)
  rest = [a for a in range(x.ndim) if a not in axis and a not in batch]
  n = len(batch)
  x = jnp.transpose(x, (*batch, *rest, *axis))
  shape = x.shape[: n + len(rest)]
  outputs = v.shape[n + 1 :]
  n_in, n_out = math.prod(u.shape[n:-1]), math.prod(outputs)
  x = x.reshape((*shape, n_in))
  u = u.reshape((*u.shape[:n], n_in, u.shape[-1]))  # no -1: R may be 0
  v = v.reshape((*v.shape[: n + 1], n_out))

  def dot(x, u, v, rank):
    return ops.lowrank_dot(
      x,
      u,
      v,
      rank,
      precision=module.precision,
      implementation=_implementation(module),
    )

  for _ in batch:
    dot = jax.vmap(dot, in_axes=(0, 0, 0, None if rank is None else 0))
  y = dot(x, u, v, rank).reshape((*shape, *outputs))
  if bias is not None:
    ones = (1,) * len(rest)
    y += bias.reshape((*bias.shape[:n], *ones, *outputs))
  return y + call(inputs) if summed else y


def general_axes(module: nn.DenseGeneral, ndim: int):
  """(contracted axes, batch axes) of a DenseGeneral, non-negative, sorted."""

  def normal(axes: int | Sequence[int]) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    return tuple(sorted(a % ndim for a in axes))

  return normal(module.axis), normal(module.batch_dims)


class Conv(nn.Conv):
  """`flax.linen.Conv`: u [(G,) *window, in / G, R], v [(G,) R, features / G].

  A kernel `mask` cannot be pushed into factors: such a layer multiplies them
  out and masks the product, which is right but saves nothing.

  Dense or factored, it convolves by `maestro.ops.convolution`, which equals
  `lax.conv_general_dilated` up to rounding and is faster on CPUs.
  """

  implementation: str | None = None
  conv_general_dilated: Any = ops.convolution

  @nn.compact
  def __call__(self, inputs: Leaf) -> jax.Array:
    return conv(self, super().__call__, inputs)


def conv(module: nn.Conv, call: Callable, inputs: Leaf) -> jax.Array:
  """Runs a Conv on factors if it holds some, else by `call`, as Flax does."""
  if not is_factored(module):
    return call(inputs)
  _refuse(module, "conv_general_dilated_cls")
  if module.conv_general_dilated is not ops.convolution:
    _refuse(module, "conv_general_dilated")
  u, v, rank = _factors(module)
  summed = module.has_variable("params", "kernel")
  groups = module.feature_group_count
  if module.mask is not None:
    u, v = _masked_product(module, u, v, rank)
    rank, groups = None, 1
    if summed:
      raise LowRankError(
        f"layer {path_of(module)!r}: a mask on kernel + u @ v is not supported"
      )
  x, u, v, bias = _promoted(module, inputs, u, v, _bias(module, summed))
  window = window_of(module)
  n = len(window)
  batch = x.shape[: x.ndim - n - 1]
  x = x.reshape((-1, *x.shape[len(batch) :]))
  dilation = per_axis(module.kernel_dilation, n)
  x, padding = pad_input(x, module.padding, window, dilation)
  y = ops.lowrank_conv(
    x,
    u,
    v,
    rank,
    strides=per_axis(module.strides, n),
    padding=padding,
    input_dilation=per_axis(module.input_dilation, n),
    kernel_dilation=dilation,
    groups=groups,
    bias=bias,
    precision=module.precision,
    implementation=_implementation(module),
  )
  y = y.reshape((*batch, *y.shape[1:]))
  return y + call(inputs) if summed else y


def _masked_product(module: nn.Conv, u, v, rank):
  """Returns factors (masked kernel, identity) of an ungrouped layer."""
  if module.feature_group_count > 1:
    raise LowRankError(
      f"layer {path_of(module)!r}: a mask on a grouped, factored convolution is"
      f" not supported; {stays_dense(path_of(module))}"
    )
  if rank is not None:
    u = trees.mask_factor(u, "u", rank)
    v = trees.mask_factor(v, "v", rank)
  kernel = jnp.dot(u, v, precision=module.precision) * jnp.asarray(module.mask)
  return kernel, jnp.eye(module.features, dtype=kernel.dtype)


def window_of(module: nn.Conv) -> tuple[int, ...]:
  size = module.kernel_size
  return (size,) if isinstance(size, int) else tuple(size)


def per_axis(value: int | Sequence[int] | None, n: int) -> tuple[int, ...]:
  """One number for each of n spatial axes, as Flax lets them be given."""
  value = 1 if value is None else value
  return (value,) * n if isinstance(value, int) else tuple(value)


def pad_input(x, padding, window, dilation):
  """Applies the paddings that Flax has and lax has not."""
  padding = canonicalize_padding(padding, len(window))
  spans = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
  if padding in ("CIRCULAR", "REFLECT"):
    pads = [(0, 0), *((s // 2, s - s // 2) for s in spans), (0, 0)]
    mode = "wrap" if padding == "CIRCULAR" else "reflect"
    return jnp.pad(x, pads, mode=mode), "VALID"
  if padding == "CAUSAL":
    if len(window) != 1:
      raise ValueError("Causal padding is only implemented for 1D convolutions")
    return jnp.pad(x, [(0, 0), (spans[0], 0), (0, 0)]), "VALID"
  return x, padding


class Embed(nn.Embed):
  """`flax.linen.Embed`, dense or factored: u [num, R], v [R, features]."""

  implementation: str | None = None

  def setup(self):
    embed_setup(self, super().setup)

  def __call__(self, inputs: Leaf) -> jax.Array:
    return embed(self, super().__call__, inputs)

  def attend(self, query: Leaf) -> jax.Array:
    return attend(self, super().attend, query)


def embed_setup(module: nn.Embed, call: Callable) -> None:
  """Makes the table by `call`, unless factors replace it.

  Flax's Embed makes its table in `setup`, where only `param` can be used. Here
  the table is looked up when needed, so that factors can replace it.
  """
  if not is_factored(module) or module.has_variable("params", "embedding"):
    call()


def _masked_factors(module: nn.Embed):
  u, v, rank = _factors(module)
  if rank is not None:
    u = trees.mask_factor(u, "u", rank)
    v = trees.mask_factor(v, "v", rank)
  return u, v


def embed(module: nn.Embed, call: Callable, inputs: Leaf) -> jax.Array:
  """Looks rows up in factors if an Embed holds some, else by `call`."""
  if not is_factored(module):
    return call(inputs)
  if not jnp.issubdtype(inputs.dtype, jnp.integer):
    raise ValueError("Input type must be an integer or unsigned integer.")
  u, v = _masked_factors(module)
  u, v = _promoted(module, u, v, inexact=False)
  if module.num_embeddings == 1:
    rows = jnp.broadcast_to(u, (*inputs.shape, u.shape[-1]))
  else:
    rows = jnp.take(u, inputs, axis=0)
  y = jnp.dot(rows, v)
  if module.has_variable("params", "embedding"):
    y += call(inputs)
  return y


def attend(module: nn.Embed, call: Callable, query: Leaf) -> jax.Array:
  """Multiplies with the table of an Embed, or its factors, transposed."""
  if not is_factored(module):
    return call(query)
  u, v = _masked_factors(module)
  x, u, v = _promoted(module, query, u, v)
  y = jnp.dot(jnp.dot(x, v.T), u.T)
  if module.has_variable("params", "embedding"):
    y += call(query)
  return y


def max_pool(x: jax.Array, window: int) -> jax.Array:
  """Takes the maximum over disjoint windows: [b, h, w, c] -> h, w / window.

  The same values as `flax.linen.max_pool` with equal window and strides, as
  element-wise maxima of strided views: XLA's gradients of a windowed maximum
  and of a reduction over two axes are several times slower on CPUs. Rows and
  columns that do not fill a window are dropped, as with "VALID" padding.
  """
  b, h, w, c = x.shape
  h, w = h // window, w // window
  x = x[:, : h * window, : w * window]
  x = x.reshape((b, h, window, w, window, c))
  rows = functools.reduce(jnp.maximum, [x[:, :, i] for i in range(window)])
  return functools.reduce(
    jnp.maximum, [rows[:, :, :, i] for i in range(window)]
  )


@contextlib.contextmanager
def recording() -> Iterator[set[str]]:
  paths: set[str] = set()
  token = _read.set(paths)
  try:
    yield paths
  finally:
    _read.reset(token)
