"""What kernels for TPUs read, and that they compile for chips not there."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maestro import ops
from maestro.ops import tpu_kernels
from maestro.ops.tpu_kernels import Blocks
from maestro.parallel.topology import Topology

# ---------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------


def copies(grid, steps, name, actives, *rest):
  """The blocks that are copied: a TPU copies where the index changes."""
  visited = []
  for g, *step in itertools.product(*map(range, steps)):
    index = getattr(grid, name)(g, *step, actives[g] - rest[0], *rest[1:])
    visited.append(tuple(map(int, index)))
  return [index for index, _ in itertools.groupby(visited)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [(0,), (8,), (9,), (20,), (3, 20)])
def test_blocks_beyond_the_rank_are_not_read(ranks, transposed):
  sizes, blocks = Blocks(16, 12, 20, 16), Blocks(8, 4, 8, 8)
  ranks = jnp.asarray(ranks, jnp.int32)
  actives = np.asarray(tpu_kernels.active_blocks(ranks, 20, 8))
  np.testing.assert_array_equal(actives, np.maximum(1, -(-ranks // 8)))
  most, total, groups = actives.max(), actives.sum(), len(actives)

  grid = tpu_kernels.ChainGrid(sizes, blocks, transposed)
  steps = (groups, 2, 3 + 2, most)
  found = {
    name: copies(grid, steps, name, actives, 1)
    for name in ("a", "first", "second", "y", "h")
  }
  rows = 2
  assert len(found["a"]) == groups * rows * 3
  # Of one block, the last of the factors may stay for the next rows.
  assert rows * 3 * total - rows * groups < len(found["first"]) + 1
  assert len(found["first"]) <= rows * 3 * total
  assert len(found["second"]) <= rows * 2 * total
  component = 1 if transposed else 2
  assert {i[component] for i in found["first"]} == set(range(most))
  # Outputs: no block is left and come back to; all of y, of h the active ones.
  for name, count in (("y", groups * rows * 2), ("h", rows * total)):
    assert len(found[name]) == len(set(found[name])) == count

  grid = tpu_kernels.WgradGrid(sizes, blocks, transposed)
  dead = -(-(3 - actives.min()) // most)
  steps = (groups, 3, rows + dead, most)
  found = {
    name: copies(grid, steps, name, actives, 0, most)
    for name in ("a", "c", "out")
  }
  assert len(found["a"]) == groups * 3 * rows
  assert len(found["c"]) <= 3 * rows * total
  assert max(i[2] for i in found["c"]) == most - 1
  assert len(found["out"]) == len(set(found["out"])) == groups * 3 * 3


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("wgrad", [False, True])
def test_blocks_fit_the_memory_and_are_tiles(wgrad, itemsize):
  for sizes in itertools.product((1, 13, 600, 8192), repeat=4):
    sizes = Blocks(*sizes)
    blocks = tpu_kernels.blocks_of(sizes, itemsize, wgrad=wgrad)
    for size, block, tile in zip(
      sizes, blocks, (16, 128, 128, 128), strict=True
    ):
      assert block == size or (block < size and block % tile == 0)
    held = tpu_kernels._held(blocks, sizes.rank, itemsize, wgrad)
    assert held <= tpu_kernels._VMEM


# ---------------------------------------------------------------------------
# Compiled for TPUs
# ---------------------------------------------------------------------------


needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install -e '.[fit]'",
)


@pytest.fixture(params=["v5e:2x2", "v6e:2x2"])
def compile_for(request):
  """Compiles both ways of a product of these sizes, with rows divided or not.

  On a thousand rows a chip and all four chips of a host, or on one.
  """
  topology = Topology.parse(request.param)
  topology.prepare()

  def compiled(shape, dtype, *, chips=1, precision=None, vmapped=False):
    mesh = jax.sharding.Mesh(np.asarray(topology.devices()[:chips]), ("data",))
    rows, whole = (jax.NamedSharding(mesh, jax.P(*a)) for a in (["data"], []))
    n, n_in, full_rank, n_out = shape
    sizes = (n, n_in), (n_in, full_rank), (full_rank, n_out), (n, n_out)
    lead = (3,) if vmapped else ()
    args = [
      *(jax.ShapeDtypeStruct((*lead, *s), dtype) for s in (*sizes, (n_out,))),
      jax.ShapeDtypeStruct(lead, jnp.int32),
    ]

    def run(x, u, v, g, bias, rank):
      kind = {"implementation": "pallas_tpu", "precision": precision}
      y, back = jax.vjp(
        lambda x, u, v, b: ops.lowrank_dot(x, u, v, rank, bias=b, **kind),
        *(x, u, v, bias),
      )
      return y, *back(g)

    run = jax.vmap(run) if vmapped else run
    run = ops.prefer("xla", mesh=mesh, rows=("data",))(run)
    shardings = (rows, whole, whole, rows, whole, whole)
    run = jax.jit(run, in_shardings=shardings)
    lowered = run.trace(*args).lower(lowering_platforms=("tpu",))
    return lowered.compile().as_text()

  return compiled


@needs_compiler
@pytest.mark.parametrize(
  ("shape", "dtype", "options"),
  [
    ((1024, 512, 384, 640), "bfloat16", {}),
    ((256, 128, 256, 128), "float32", {"precision": "highest"}),
    ((1024, 512, 384, 640), "bfloat16", {"chips": 4}),
    ((523, 1031, 300, 1109), "bfloat16", {}),
    ((256, 256, 256, 256), "bfloat16", {"vmapped": True}),
    ((1, 7, 5, 11), "bfloat16", {}),
    ((8192, 8192, 4096, 8192), "bfloat16", {}),
  ],
)
def test_kernels_compile_for_tpus(compile_for, shape, dtype, options):
  text = compile_for(shape, dtype, **options)
  # y and h, dx and dh, du, dv; no product is left to XLA.
  assert text.count('custom_call_target="tpu_custom_call"') == 4
  assert " dot(" not in text and " convolution(" not in text
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    assert f" {kind}(" not in text
  assert (" all-reduce(" in text) == ("chips" in options)
