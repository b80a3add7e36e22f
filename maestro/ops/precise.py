"""Programs of float32 products at the highest precision, for every device."""

from collections.abc import Callable
from typing import Any

import jax

# XLA's search among kernels of its own compiles dozens of candidates for each
# product: on an H200 the 72 float32 products of ResNet-18's moments were not
# compiled after five minutes of sixteen cores. A GPU's library of products has
# nothing to compile.
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def jit_precise(function: Callable[..., Any]) -> Callable[..., Any]:
  """`jax.jit` for a function whose time is in products of precision "highest".

  Cannot be called within another traced function.
  """
  options = _OPTIONS.get(jax.default_backend())
  return jax.jit(function, compiler_options=options)
