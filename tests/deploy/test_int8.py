"""int8 weights: every size from one file, its error bounded and told."""

import dataclasses
import pathlib
import re
import shutil

import flax.linen
import jax
import numpy as np
import pytest

import maestro
from maestro import data as data_lib
from maestro import introspect, lowrank, models, nn, trees
from maestro.deploy import artifact, export, int8, packing, rounding, verify
from maestro.deploy import files as safetensors_io
from maestro.deploy.network import as_run

CASES = ("conv_grouped", "embed_tied", "scan")
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "export.md"
QUIET = {"log": lambda line: None}


def test_a_number_is_off_by_half_a_step_at_most():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((5, 3, 40)).astype(np.float32)
  x *= 10.0 ** rng.integers(-20, 20, (5, 3, 1))
  x[1, 2] = 0  # a vanished component
  q, s = int8.quantize(x, [2])
  assert q.dtype == np.int8 and s.shape == (5, 3, 1) and s.dtype == x.dtype
  back = int8.dequantize(q, s)
  assert np.all(np.abs(back - x) <= 0.5001 * s)
  assert np.all(np.max(np.abs(q), axis=2)[s[..., 0] > 0] == 127)  # symmetric
  assert not np.any(back[1, 2])
  again = int8.quantize(back, [2])
  np.testing.assert_array_equal(again[0], q)  # once is enough


def test_numbers_too_small_for_a_scale_become_zero():
  x = np.full((2, 3), 1e-45, np.float32)
  q, s = int8.quantize(x, [1])
  assert not np.any(int8.dequantize(q, s)) and np.all(np.isfinite(s))


def _profiles(case, levels):
  return [
    packing.Profile(
      str(level),
      {
        path: np.asarray(rank).tolist()
        for path, rank in trees.flatten_ranks(case.ranks(level)).items()
      },
      {},
    )
    for level in levels
  ]


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", CASES)
def test_every_prefix_is_the_rounded_network(cases, close, tmp_path, name):
  case = cases[name]
  profiles = _profiles(case, ("full", 2, 1, 0))
  stored = packing.laid_out(case.factored, profiles, case.layers)
  weights = rounding.weighted(stored, case.layers)
  tensors, blocks = packing.pack(
    case.factored, profiles, case.layers, int8=weights
  )
  safetensors_io.write(tmp_path / "x", tensors)
  assert len(weights) == 2 * len(trees.factored(stored)) > 0
  rounded = rounding.rounded(stored, case.layers, weights)
  for profile in profiles:
    record = {"name": profile.name, "ranks": profile.ranks}
    with safetensors_io.Reader(tmp_path / "x") as reader:
      found = packing.unpack(reader, blocks, record, case.layers)
      assert reader.bytes_read <= (tmp_path / "x").stat().st_size
    variables = packing.assemble(*found, record, case.layers)
    # Those of a size are what rounding that size alone gives.
    ranks = packing.rank_tree(
      {p: profile.ranks[p] for p in trees.factored(stored)}
    )
    close(
      variables["params"], lowrank.extract(rounded, ranks, case.layers), 1e-6
    )
    alone = rounding.rounded(
      lowrank.truncate(stored, ranks), case.layers, weights
    )
    close(variables["params"], lowrank.extract(alone, ranks, case.layers), 1e-6)
  int8s = sum(x.size for x in tensors.values() if x.dtype == np.int8)
  assert int8s == sum(weights.values())


MODEL = models.MLP(num_classes=10, features=(48, 32))
RANKS = {"large": (24, 15, 9), "middle": (9, 5, 6), "small": (3, 0, 2)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, random_run, sizes_of):
  root = tmp_path_factory.mktemp("int8")
  run, lines = random_run(MODEL), []
  for name, of_int8 in (("int8", True), ("float32", False)):
    export.export(
      run,
      root / name,
      sizes_of(run, RANKS),
      dataset=data_lib.make("digits"),
      options=export.Options(repeats=0, stablehlo=False, int8=of_int8),
      log=lines.append,
    )
  return root, lines


X = np.random.default_rng(1).standard_normal((64, 8, 8, 1)).astype(np.float32)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", RANKS)
def test_every_size_of_one_file_is_within_a_hundredth(exported, name):
  root, _ = exported
  outputs, found = {}, {}
  for form in ("int8", "float32"):
    loaded = artifact.read(root / form, profile=name, model=MODEL)
    outputs[form] = loaded.model.apply(loaded.variables, X)
    found[form] = loaded
  # On other inputs than those of the export.
  gap = verify.difference(outputs["float32"], outputs["int8"])
  told = found["int8"].profile["difference"]
  assert told["int8"] <= 1e-2 and told["reloaded"] <= 1e-6
  assert gap <= 1.2e-2
  if name != "small":  # of which the middle layer is gone
    assert gap > 1e-4 < told["int8"]
  for key in ("params", "macs", "bytes", "forms"):
    assert found["int8"].profile[key] == found["float32"].profile[key]


def test_int8_takes_a_quarter_of_the_bytes_of_weights(exported):
  root, _ = exported
  stored = {}
  for form in ("int8", "float32"):
    with safetensors_io.Reader(root / form / "model.safetensors") as reader:
      stored[form] = {
        name: reader.span(name)[1] - reader.span(name)[0]
        for name in reader.shapes
      }
  names = artifact.read_config(root / "int8")["weights"]["int8"]
  assert len(names) >= 2
  for name, size in stored["float32"].items():
    if name.removeprefix("params/") in names:
      assert 4 * stored["int8"][name] == size
      assert stored["int8"]["scales/" + name] <= 4 * 24  # for each component
    else:
      assert stored["int8"][name] == size


def test_what_it_changes_is_printed_and_kept(exported):
  root, lines = exported
  text = "\n".join(lines) + (root / "int8" / "README.md").read_text()
  config = artifact.read_config(root / "int8")
  n = len(config["weights"]["int8"])
  assert text.count(f"int8: {n} of 6 weights") == 2
  plain = artifact.read_config(root / "float32")
  for profile, other in zip(config["profiles"], plain["profiles"], strict=True):
    assert profile["float32"]["metrics"] == other["metrics"]
    before, after = (p["metrics"]["test"]["accuracy"] for p in (other, profile))
    line = (
      f"{profile['name']}: {profile['difference']['int8']:.1e} between int8 and"
      " float32 weights"
    )
    assert text.count(line) == 2
    assert text.count(f"test accuracy {after:.4f} and {before:.4f}") >= 2


def test_the_reader_of_the_docs_reads_int8(exported, close):
  root, _ = exported
  text = DOCS.read_text().split("## Any size without maestro")[1]
  names = {}
  exec(re.findall(r"```python\n(.*?)```", text, re.S)[0], names)
  for size in RANKS:
    w = names["load"](root / "int8", size)
    model, variables = maestro.load(root / "int8", profile=size, model=MODEL)
    close(w["params/fc1/u"].T, variables["params"]["fc1"]["u"], 1e-6)
    found = names["mlp"](w, X.reshape(len(X), -1), 3)
    close(found, np.asarray(model.apply(variables, X)))


@pytest.mark.quick(1)
def test_layers_that_would_differ_too_much_stay(tmp_path, random_run, sizes_of):
  run = random_run(MODEL)
  tight = export.Options(
    repeats=0, stablehlo=False, int8=True, int8_tolerance=7e-3
  )
  lines = []
  config = export.export(
    run, tmp_path / "out", sizes_of(run, RANKS), options=tight, log=lines.append
  )
  forms = config["weights"]
  assert forms["int8"] and forms["float32"]
  assert sorted(forms["int8"] + forms["float32"]) == [
    f"fc{i}/{leaf}" for i in (1, 2, 3) for leaf in "uv"
  ]
  assert all(p["difference"]["int8"] <= 7e-3 for p in config["profiles"])
  assert "difference would be too large" in "\n".join(lines)
  none = dataclasses.replace(tight, int8_tolerance=0.0)
  config = export.export(
    run, tmp_path / "none", sizes_of(run, RANKS), options=none, **QUIET
  )
  assert config["weights"]["int8"] == []


class Normed(flax.linen.Module):
  """One convolution that is normalised."""

  @flax.linen.compact
  def __call__(self, x, train=False):
    x = nn.Conv(8, (3, 3), name="conv")(x)
    x = flax.linen.BatchNorm(use_running_average=not train, name="norm")(x)
    return nn.Dense(10, name="head")(jax.nn.relu(x).mean((1, 2)))


@pytest.mark.quick(0)
def test_what_was_compared_is_what_is_written(tmp_path):
  model, x = Normed(), jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")
  variables = jax.jit(model.init)(jax.random.key(0), np.ones(x.shape))
  layers = introspect.layers(model, x)
  params = lowrank.decompose(variables["params"], [lowrank.Rule()], layers)
  run = as_run(model, {**variables, "params": params}, x)
  size = export.Size("own", jax.tree.map(lambda r: r // 2, run.ranks))
  read = {}
  for form in ("int8", "float32"):
    options = export.Options(repeats=0, stablehlo=False, int8=form == "int8")
    out, data = tmp_path / form, data_lib.make("digits")
    export.export(run, out, [size], dataset=data, options=options, **QUIET)
    read[form] = artifact.read(out, model=model)
  stats = [read[form].variables["batch_stats"] for form in read]
  assert np.all(np.asarray(stats[1]["norm"]["mean"]) != 0)  # computed anew
  jax.tree.map(np.testing.assert_array_equal, *stats)
  outputs = verify.make_outputs(model, x, n=32)
  found = verify.difference(
    *(outputs(read[form].variables) for form in ("float32", "int8"))
  )
  told = read["int8"].profile["difference"]["int8"]
  assert 1e-4 < found <= 1e-2 and found == pytest.approx(told, rel=1e-3)


@pytest.mark.quick(1)
def test_a_merged_kernel_has_a_scale_for_each_output(
  tmp_path, close, random_run
):
  run = random_run(MODEL)
  size = export.Size("own", run.ranks)  # dense is cheaper everywhere
  options = export.Options(repeats=0, stablehlo=False, int8=True)
  export.export(run, tmp_path / "out", [size], options=options, **QUIET)
  with safetensors_io.Reader(tmp_path / "out" / "model.safetensors") as reader:
    assert reader.shapes["params/fc1/kernel"] == (64, 48)
    assert reader.shapes["scales/params/fc1/kernel"] == (1, 48)
    kernel = reader.read("params/fc1/kernel")
    scales = reader.read("scales/params/fc1/kernel")
  _, variables = maestro.load(tmp_path / "out", model=MODEL)
  close(kernel * scales, variables["params"]["fc1"]["kernel"], 0)


def test_an_altered_scale_is_told(exported, tmp_path):
  copy = shutil.copytree(exported[0] / "int8", tmp_path / "copy")
  path = copy / "model.safetensors"
  with safetensors_io.Reader(path) as reader:
    at = reader.span("scales/params/fc1/u")[0]
  data = bytearray(path.read_bytes())
  data[at] ^= 1
  path.write_bytes(data)
  with pytest.raises(artifact.ArtifactError, match="'scales/params/fc1/u' is"):
    maestro.load(copy, model=MODEL, profile="small")
