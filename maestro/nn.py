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
from collections.abc import Iterator, Sequence
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
_read: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar(
  "ranks_read", default=None
)


def path_of(module: nn.Module) -> str:
  return "/".join(module.path)


def _is_factored(module: nn.Module) -> bool:
  return module.has_variable("params", "u")


def _factors(module: nn.Module) -> tuple[Any, Any, Any]:
  """Reads u, v and the rank (None without a `ranks` collection)."""
  if type(module).param is not nn.Module.param:
    raise LowRankError(
      f"layer {path_of(module)!r}: {type(module).__name__} overrides `param`,"
      " which factors do not pass through; keep the layer dense by a rule with"
      " decompose=False"
    )
  # Not `param`, which would hold truncated factors to the initial shapes.
  u, v = (_parameter(module, name) for name in ("u", "v"))
  if v is None:
    raise LowRankError(
      f"layer {path_of(module)!r} holds `u` but no `v`; factors come in pairs"
    )
  rank = module.get_variable("ranks", "rank")
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
        " but a factored layer has two; leave it out or keep the layer dense"
      )


class Dense(nn.Dense):
  """`flax.linen.Dense`, dense or factored: u [in, R], v [R, features]."""

  implementation: str | None = None

  @nn.compact
  def __call__(self, inputs: Leaf) -> jax.Array:
    if not _is_factored(self):
      return super().__call__(inputs)
    _refuse(self, "dot_general", "dot_general_cls")
    u, v, rank = _factors(self)
    dense = self.has_variable("params", "kernel")
    x, u, v, bias = _promoted(self, inputs, u, v, _bias(self, dense))
    y = ops.lowrank_dot(
      x,
      u,
      v,
      rank,
      bias=bias,
      precision=self.precision,
      implementation=self.implementation,
    )
    return y + super().__call__(inputs) if dense else y


class DenseGeneral(nn.DenseGeneral):
  """`flax.linen.DenseGeneral`: u [*batch, *in, R], v [*batch, R, *features]."""

  implementation: str | None = None

  @nn.compact
  def __call__(self, inputs: Leaf) -> jax.Array:
    if not _is_factored(self):
      return super().__call__(inputs)
    _refuse(self, "dot_general", "dot_general_cls")
    u, v, rank = _factors(self)
    dense = self.has_variable("params", "kernel")
    x, u, v, bias = _promoted(self, inputs, u, v, _bias(self, dense))
    axis, batch = general_axes(self, inputs.ndim)
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
        precision=self.precision,
        implementation=self.implementation,
      )

    for _ in batch:
      dot = jax.vmap(dot, in_axes=(0, 0, 0, None if rank is None else 0))
    y = dot(x, u, v, rank).reshape((*shape, *outputs))
    if bias is not None:
      ones = (1,) * len(rest)
      y += bias.reshape((*bias.shape[:n], *ones, *outputs))
    return y + super().__call__(inputs) if dense else y


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
    if not _is_factored(self):
      return super().__call__(inputs)
    _refuse(self, "conv_general_dilated_cls")
    if self.conv_general_dilated is not ops.convolution:
      _refuse(self, "conv_general_dilated")
    u, v, rank = _factors(self)
    dense = self.has_variable("params", "kernel")
    groups = self.feature_group_count
    if self.mask is not None:
      u, v = self._masked_product(u, v, rank)
      rank, groups = None, 1
      if dense:
        raise LowRankError(
          f"layer {path_of(self)!r}: a mask on kernel + u @ v is not supported"
        )
    x, u, v, bias = _promoted(self, inputs, u, v, _bias(self, dense))
    window = window_of(self)
    n = len(window)
    batch = x.shape[: x.ndim - n - 1]
    x = x.reshape((-1, *x.shape[len(batch) :]))
    dilation = per_axis(self.kernel_dilation, n)
    x, padding = pad_input(x, self.padding, window, dilation)
    y = ops.lowrank_conv(
      x,
      u,
      v,
      rank,
      strides=per_axis(self.strides, n),
      padding=padding,
      input_dilation=per_axis(self.input_dilation, n),
      kernel_dilation=dilation,
      groups=groups,
      bias=bias,
      precision=self.precision,
      implementation=self.implementation,
    )
    y = y.reshape((*batch, *y.shape[1:]))
    return y + super().__call__(inputs) if dense else y

  def _masked_product(self, u, v, rank):
    """Returns factors (masked kernel, identity) of an ungrouped layer."""
    if self.feature_group_count > 1:
      raise LowRankError(
        f"layer {path_of(self)!r}: a mask on a grouped, factored convolution is"
        " not supported; keep the layer dense (Rule(..., decompose=False))"
      )
    if rank is not None:
      u = trees.mask_factor(u, "u", rank)
      v = trees.mask_factor(v, "v", rank)
    kernel = jnp.dot(u, v, precision=self.precision) * jnp.asarray(self.mask)
    return kernel, jnp.eye(self.features, dtype=kernel.dtype)


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

  # Flax's Embed makes its table in `setup`, where only `param` can be used.
  # Here the table is looked up when needed, so that factors can replace it.
  def setup(self):
    if not _is_factored(self) or self.has_variable("params", "embedding"):
      super().setup()

  def _masked_factors(self):
    u, v, rank = _factors(self)
    if rank is not None:
      u = trees.mask_factor(u, "u", rank)
      v = trees.mask_factor(v, "v", rank)
    return u, v

  def __call__(self, inputs: Leaf) -> jax.Array:
    if not _is_factored(self):
      return super().__call__(inputs)
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
      raise ValueError("Input type must be an integer or unsigned integer.")
    u, v = self._masked_factors()
    u, v = _promoted(self, u, v, inexact=False)
    if self.num_embeddings == 1:
      rows = jnp.broadcast_to(u, (*inputs.shape, u.shape[-1]))
    else:
      rows = jnp.take(u, inputs, axis=0)
    y = jnp.dot(rows, v)
    if self.has_variable("params", "embedding"):
      y += super().__call__(inputs)
    return y

  def attend(self, query: Leaf) -> jax.Array:
    if not _is_factored(self):
      return super().attend(query)
    u, v = self._masked_factors()
    x, u, v = _promoted(self, query, u, v)
    y = jnp.dot(jnp.dot(x, v.T), u.T)
    if self.has_variable("params", "embedding"):
      y += super().attend(query)
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
