"""Exported networks equal the masked ones, in every form; bad input is told."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import types

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import data as data_lib
from maestro import export as export_command
from maestro import introspect, lowrank, nn, trees
from maestro.deploy import artifact, export, packing, stablehlo
from maestro.errors import UserError
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.training import build, config, opened

ROOT = pathlib.Path(__file__).parents[2]
QUIET = {"log": lambda line: None}
FAST = export.Options(repeats=0, stablehlo=False)

# name: (model section, shape of an input, classes)
NETWORKS = {
  "mlp": ({"name": "mlp", "features": (16, 12)}, (5, 4), 6),
  "lenet": ({"name": "lenet"}, (28, 28, 1), 10),
  "linear_map": ({"name": "linear_map", "features": 9}, (17,), None),
  "linear_autoencoder": ({"name": "linear_autoencoder"}, (12,), None),
  "resnet18": ({"name": "resnet18", "width": 8}, (8, 8, 3), 10),
  "resnet34": ({"name": "resnet34", "width": 8}, (8, 8, 3), 10),
  "vgg19": ({"name": "vgg19", "width": 8}, (32, 32, 3), 10),
  "resnet50": (
    {"name": "resnet50", "width": 8, "stage_sizes": (1, 1)},
    (16, 16, 3),
    10,
  ),
  "resnext50_32x4d": (
    {
      "name": "resnext50_32x4d",
      "width": 8,
      "stage_sizes": (1, 1),
      "groups": 2,
    },
    (16, 16, 3),
    10,
  ),
  "mobilenet_v2": (
    {
      "name": "mobilenet_v2",
      "multiplier": 0.25,
      "stages": ((1, 16, 1, 1), (6, 24, 2, 2)),
    },
    (16, 16, 3),
    10,
  ),
}
# These take tens of seconds to compile; `test_to_torch` exports them, too.
SLOW = {"resnet34", "resnet50", "resnext50_32x4d", "mobilenet_v2"}


def _config(model, data, loss):
  return config.parse(
    {
      "seed": 0,
      "method": "maestro",
      "model": model,
      "data": data,
      "loss": loss,
      "batch_size": 32,
      "optimizer": {"name": "sgd", "momentum": 0.9},
      "rules": ({"path": ".*"},),
      "lasso": "hierarchical",
      "threshold": 1e-5,
      "discover": {
        "epochs": 1,
        "schedule": {"name": "constant", "learning_rate": 0.1},
      },
      "settle": {
        "epochs": 0,
        "schedule": {"name": "constant", "learning_rate": 0.1},
      },
    }
  )


def _random(shapes, seed=0):
  """Parameters by NumPy: to compile JAX's generators would take long."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    leaf = path[-1].key
    noise = rng.standard_normal(x.shape).astype(np.float32)
    if leaf in ("kernel", "embedding"):
      return noise / np.sqrt(max(np.prod(x.shape[:-1]), 1)).astype(np.float32)
    if leaf in ("scale", "var"):
      return np.exp(0.3 * noise).astype(np.float32)
    return 0.3 * noise

  return jax.tree_util.tree_map_with_path(draw, shapes)


def make_run(model, facts, section, tmp="run", seed=0):
  """A run that was never trained: random factors, random statistics."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), facts.example)
  layers = introspect.layers(model, facts.example)
  variables = _random(shapes, seed)
  rng = np.random.default_rng(seed)
  changes = {}
  for path, spec in layers.items():
    node = dict(trees.get(variables["params"], path))
    node.pop(spec.weight)
    R = spec.full_rank
    u = rng.standard_normal((*spec.lead, *spec.inputs, R))
    v = rng.standard_normal((*spec.lead, R, *spec.outputs))
    node["u"] = (u / np.sqrt(spec.n_in)).astype(np.float32)
    node["v"] = (v / np.sqrt(R)).astype(np.float32)
    changes[path] = node
  params = trees.replace(variables["params"], changes)
  loss = "cross_entropy" if facts.num_classes else "squared_error"
  return opened.Run(
    workdir=pathlib.Path(tmp),
    config=_config(section, {"name": facts.data}, loss),
    facts=facts,
    model=model,
    layers=layers,
    step=7,
    params=params,
    batch_stats=variables.get("batch_stats", {}),
    ranks=jax.device_get(lowrank.full_ranks(params, layers)),
  )


@pytest.fixture(autouse=True)
def quick(monkeypatch, jit):
  """Compiles quickly to slow code, also within the export."""
  monkeypatch.setattr(jax, "jit", jit)


@pytest.fixture(scope="module")
def runs():
  """Returns get(name) -> an untrained run of that network."""
  made = {}

  def get(name):
    if name not in made:
      section, shape, classes = NETWORKS[name]
      facts = build.Facts(
        data="digits",
        input_shape=shape,
        input_dtype="float32",
        num_classes=classes,
        normalization=None,
        train_examples=100,
      )
      loss = "cross_entropy" if classes else "squared_error"
      c = _config(section, {"name": "digits"}, loss)
      made[name] = make_run(build.make_model(c, facts), facts, section)
    return made[name]

  return get


LEVELS = ("full", "half", "eighth", "zero")


def cut(run, level):
  """Nested rank trees: full, half, an eighth, that with one layer at rank 0."""
  flat = trees.flatten_ranks(run.ranks)
  share = {"full": 1, "half": 2, "eighth": 8, "zero": 8}[level]
  new = {path: -(-r // share) for path, r in flat.items()}
  if level == "zero":
    path = sorted(flat)[len(flat) // 2]
    new[path] = np.zeros_like(flat[path])
  return packing.rank_tree(new)


def relative(found, expected):
  scale = np.max(np.abs(expected)) or 1.0  # a linear map of rank 0 gives 0
  return np.max(np.abs(np.asarray(found) - expected)) / scale


@pytest.mark.quick(0)
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in NETWORKS
  ],
)
def test_all_forms_are_equal(runs, name, jit, tmp_path):
  run = runs(name)
  x = np.random.default_rng(1).standard_normal((3, *run.facts.input_shape))
  x = x.astype(np.float32)
  norms = {"batch_stats": run.batch_stats} if run.batch_stats else {}

  @jit
  def forward(variables, ranks):
    params = lowrank.mask(variables["params"], ranks)
    return run.model.apply({**variables, "params": params}, x)

  # One file with all of them, so that every one but the first is a prefix.
  levels = {level: cut(run, level) for level in LEVELS}
  record = export.export(
    run,
    tmp_path / "any",
    [export.Size(level, ranks) for level, ranks in levels.items()],
    options=export.Options(repeats=0, keep_statistics=True),
    **QUIET,
  )
  cost = {p["name"]: p["params"] for p in record["profiles"]}
  hlo = stablehlo.read(tmp_path / "any" / "model.stablehlo")
  for level, ranks in levels.items():

    @jit
    def forms(params, ranks=ranks):
      truncated = lowrank.truncate(params, ranks)
      return {
        "truncated": truncated,
        "merged": lowrank.merge(truncated, run.layers),
        "extracted": lowrank.extract(params, ranks, run.layers),
      }

    masked = np.asarray(forward({"params": run.params} | norms, ranks))
    model, variables = maestro.load(tmp_path / "any", profile=level)
    assert model == run.model
    sizes = map(jnp.size, jax.tree.leaves(variables["params"]))
    assert sum(sizes) == cost[level]
    found = {
      form: forward({"params": params} | norms, {})
      for form, params in forms(run.params).items()
    }
    found["reloaded"] = forward(variables, {})
    if level == "full":
      found["StableHLO"] = hlo(x)
    for form, y in found.items():
      assert relative(y, masked) <= 1e-4, (level, form)


SMALL = ("mlp", "lenet", "linear_map", "linear_autoencoder")
QUICK = {*((name, level) for name in SMALL for level in LEVELS[1:])}
QUICK.add(("resnet18", "zero"))


@pytest.mark.quick(1)
@pytest.mark.parametrize(
  ("name", "level"),
  [
    (name, level)
    if (name, level) in QUICK
    else pytest.param(name, level, marks=pytest.mark.slow)
    for name in NETWORKS
    for level in LEVELS[1:]
  ],
)
def test_a_single_size_with_its_stablehlo(runs, name, level, jit, tmp_path):
  run = runs(name)
  ranks = cut(run, level)
  record = export.export(
    run,
    tmp_path / "one",
    [export.Size("0.2", ranks, "macs:0.2")],
    options=export.Options(repeats=0, keep_statistics=True),
    **QUIET,
  )
  (profile,) = record["profiles"]
  for difference in profile["difference"].values():
    assert difference <= 1e-4
  loaded = artifact.read(tmp_path / "one")
  assert loaded.bytes_read == loaded.file_bytes
  norms = {"batch_stats": run.batch_stats} if run.batch_stats else {}
  hlo = stablehlo.read(tmp_path / "one" / "model.stablehlo")
  x = np.random.default_rng(1).standard_normal((5, *run.facts.input_shape))
  x = x.astype(np.float32)

  @jit
  def forward(params):
    params = lowrank.mask(params, ranks)
    return run.model.apply({"params": params, **norms}, x)

  masked = np.asarray(forward(run.params))
  assert relative(hlo(x), masked) <= 1e-4
  assert relative(hlo(x[:1]), masked[:1]) <= 1e-4  # any batch size


@pytest.mark.quick(1)
def test_stablehlo_runs_without_maestro(runs, tmp_path):
  run = runs("mlp")
  export.export(
    run,
    tmp_path / "one",
    [export.Size("half", cut(run, "half"))],
    options=export.Options(repeats=0),
    **QUIET,
  )
  x = np.random.default_rng(0).standard_normal((4, 5, 4)).astype(np.float32)
  np.save(tmp_path / "x.npy", x)
  card = (tmp_path / "one" / "README.md").read_text()
  code = card.split("```python\n")[2].split("```")[0]  # as the card says
  script = (
    "import sys, numpy\nx = numpy.load('x.npy')\n"
    f"{code}\n"
    "assert not [m for m in sys.modules if m.partition('.')[0] == 'maestro']\n"
    "numpy.save('y.npy', outputs)\n"
  )
  subprocess.run(
    [sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120
  )
  model, variables = maestro.load(tmp_path / "one")
  y = np.asarray(model.apply(variables, x))
  assert relative(np.load(tmp_path / "y.npy"), y) <= 1e-4


@pytest.mark.quick(1)
def test_the_card_says_how_to_load(runs, tmp_path, monkeypatch):
  run = runs("mlp")
  export.export(run, tmp_path / "one", options=FAST, **QUIET)
  card = (tmp_path / "one" / "README.md").read_text()
  code = card.split("```python\n")[1].split("```")[0]
  monkeypatch.chdir(tmp_path)
  names = {"x": np.ones((2, 5, 4), np.float32)}
  exec(code, names)
  assert names["outputs"].shape == (2, 6)
  for word in ("run", "final (step 7)", "digits", "float32 [n, 5, 4]"):
    assert word in card


@pytest.mark.quick(0)
def test_the_directory_describes_itself(runs, tmp_path):
  run = runs("resnet18")
  options = export.Options(repeats=2, stablehlo=False, keep_statistics=True)
  lines = []
  export.export(
    run,
    tmp_path / "one",
    [export.Size("0.2", cut(run, "eighth"), "macs:0.2")],
    checkpoint="discover",
    options=options,
    log=lines.append,
  )
  config = artifact.verify(tmp_path / "one")
  assert set(config["files"]) == {
    *("model.safetensors", "slices.json", "README.md")
  }
  assert config["model"]["name"] == "resnet18"
  assert config["source"]["checkpoint"] == "discover"
  (profile,) = config["profiles"]
  _, variables = maestro.load(tmp_path / "one")
  assert profile["params"] == sum(
    x.size for x in jax.tree.leaves(variables["params"])
  )
  assert profile["budget"] == "macs:0.2"
  for form in (config["dense"], config["factored"], profile):
    assert form["latency_ms"].keys() == {"1", "64"}
    assert all(ms > 0 for ms in form["latency_ms"].values())
  text = "\n".join(lines)
  assert "from the masked network" in text
  for row in ("dense", "factored, not merged", "exported, 0.2"):
    assert f"\n{row}" in text


# ---------------------------------------------------------------------------
# Data and statistics
# ---------------------------------------------------------------------------


class Normed(flax.linen.Module):
  """An architecture that maestro does not have, with batch norm."""

  @flax.linen.compact
  def __call__(self, x, train=False):
    x = x.reshape((x.shape[0], -1))
    x = nn.Dense(12, name="fc1")(x)
    x = flax.linen.BatchNorm(use_running_average=not train, name="norm")(x)
    return nn.Dense(10, name="fc2")(flax.linen.relu(x))


@pytest.fixture(scope="module")
def digits():
  return data_lib.make("digits")


@pytest.fixture
def normed(digits):
  facts = build.Facts.of(digits)
  return make_run(Normed(), facts, {"name": "mlp"})


@pytest.mark.quick(1)
def test_statistics_are_computed_anew_for_each_size(normed, digits, tmp_path):
  sizes = [export.Size(level, cut(normed, level)) for level in LEVELS[:2]]
  config = export.export(
    normed, tmp_path / "out", sizes, dataset=digits, options=FAST, **QUIET
  )
  with pytest.raises(artifact.ArtifactError, match=r"'Normed'.*pass model="):
    maestro.load(tmp_path / "out")
  found = {}
  for size in sizes:
    _, variables = maestro.load(
      tmp_path / "out", model=Normed(), profile=size.name
    )
    found[size.name] = variables
    # Without dropout or augmentation, each layer's input has these moments.
    params = lowrank.mask(normed.params, size.ranks)
    x = np.asarray(digits.preprocess(digits.train.inputs))
    x = x.reshape((len(x), -1))
    fc1 = jax.tree.map(np.asarray, params["fc1"])
    mean = np.mean(x @ fc1["u"] @ fc1["v"] + fc1["bias"], 0)
    stored = variables["batch_stats"]["norm"]["mean"]
    assert relative(stored, mean) <= 0.02  # a part of the examples
    assert relative(normed.batch_stats["norm"]["mean"], mean) > 0.1
  full, half = (found[size.name] for size in sizes)
  assert (
    relative(
      full["batch_stats"]["norm"]["mean"], half["batch_stats"]["norm"]["mean"]
    )
    > 0.05
  )
  evaluate = build.make_evaluator(
    normed.config, normed.model, digits, make_mesh(MeshShape(data=1))
  )
  for profile in config["profiles"]:
    metrics = evaluate(found[profile["name"]], digits.test)
    assert profile["metrics"]["test"] == pytest.approx(metrics)


@pytest.mark.quick(1)
def test_data_is_needed_for_statistics_alone(normed, runs, tmp_path):
  size = export.Size("half", cut(normed, "half"))
  with pytest.raises(export.ExportError, match="--keep_statistics"):
    export.export(normed, tmp_path / "out", [size], options=FAST, **QUIET)
  assert not (tmp_path / "out").exists()
  options = export.Options(repeats=0, stablehlo=False, keep_statistics=True)
  export.export(normed, tmp_path / "out", [size], options=options, **QUIET)
  _, variables = maestro.load(tmp_path / "out", model=Normed())
  np.testing.assert_array_equal(
    variables["batch_stats"]["norm"]["mean"], normed.batch_stats["norm"]["mean"]
  )
  # Without batch norm, nothing is missing.
  export.export(runs("mlp"), tmp_path / "mlp", options=FAST, **QUIET)


# ---------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------


def test_a_difference_above_the_tolerance_writes_nothing(runs, tmp_path):
  run = runs("mlp")
  options = export.Options(repeats=0, stablehlo=False, tolerance=0.0)
  with pytest.raises(UserError, match=r"masked.*--tolerance=0"):
    export.export(
      run,
      tmp_path / "out",
      [export.Size("x", cut(run, "full"))],
      options=options,
      **QUIET,
    )
  broken = jax.tree.map(np.array, run.params)
  broken["fc1"]["u"][0, 0] = np.nan
  with pytest.raises(UserError, match="inf"):
    export.export(
      dataclasses.replace(run, params=broken),
      tmp_path / "out",
      options=FAST,
      **QUIET,
    )
  assert not list(tmp_path.iterdir())


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("name", ["mlp", "resnet18"])
@pytest.mark.parametrize("rule", ["uniform", "threshold", "energy"])
def test_a_network_of_biases_is_refused_with_what_is_of_use(
  runs, name, kind, rule
):
  run = runs(name)
  budget, said = f"{kind}:1e-6", ""
  while "network of biases" not in said:  # biases have params, but no MACs
    with pytest.raises(UserError) as error:
      export.choose_sizes(run, budget=budget, rule=rule)
    said = str(error.value)
    advised = re.findall(rf"{kind}:\d\.\d+", said)[-1]
    assert advised != budget
    budget = advised
  (size,) = export.choose_sizes(run, budget=budget, rule=rule)
  assert all(trees.flatten_ranks(size.ranks).values())


def test_other_files_are_not_overwritten(runs, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match="not overwritten"):
    export.export(runs("mlp"), tmp_path, options=FAST, **QUIET)


def test_a_tied_weight_factorised_twice_is_refused(digits, tmp_path):
  run = make_run(Normed(), build.Facts.of(digits), {"name": "mlp"})
  params = dict(run.params)
  node = {k: np.ones((4, 4), np.float32) for k in ("u", "v")}
  params |= {"fc1": params["fc1"], "head": node, "tail": node}
  layers = dict(run.layers) | {
    name: maestro.LayerSpec("dense", (4,), (4,)) for name in ("head", "tail")
  }
  ranks = dict(run.ranks) | {
    name: {"rank": np.int32(1)} for name in ("head", "tail")
  }
  run = dataclasses.replace(
    run,
    params=params,
    layers=layers,
    ranks=packing.rank_tree(trees.flatten_ranks(ranks)),
  )
  options = export.Options(repeats=0, stablehlo=False, keep_statistics=True)
  with pytest.raises(packing.PackingError, match=r"'head' and 'tail'.*tied"):
    export.export(run, tmp_path / "out", options=options, **QUIET)


@pytest.mark.parametrize(
  ("asked", "words"),
  [
    ({"budget": "params:0.01"}, "cannot be reached: the smallest is params:0"),
    ({"budget": "macs:1"}, None),
    ({"budget": "half"}, "kind:value"),
    ({"budget": "macs:0.5", "rule": "greedy"}, "needs the data set"),
    ({"profiles": ["0.9", "1.5"]}, r"macs:1.5: must be in \(0, 1\]"),
    ({"budget": "macs:0.5", "profiles": ["0.5"]}, "give one of"),
    ({"ranks": {"fc9": 3}}, "there is no layer 'fc9'"),
    ({"ranks": {"fc1": 99}}, "'fc1': rank 99 is outside"),
    ({"ranks": {"fc1": "x"}}, "'fc1'.*no rank"),
  ],
  ids=str,
)
def test_sizes_that_do_not_fit_are_told(runs, tmp_path, asked, words):
  asked = {"rule": "uniform"} | asked
  if "ranks" in asked:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"ranks": asked["ranks"]}))
    asked["ranks"] = str(path)
  if words is None:
    assert len(export.choose_sizes(runs("mlp"), **asked)) == 1
  else:
    with pytest.raises(UserError, match=words):
      export.choose_sizes(runs("mlp"), **asked)


def test_a_merged_layer_cannot_be_truncated(runs, tmp_path):
  run = runs("mlp")
  params = lowrank.merge(run.params, where=lambda path: path == "fc1")
  ranks = {p: r for p, r in run.ranks.items() if p != "fc1"}
  run = dataclasses.replace(run, params=jax.device_get(params), ranks=ranks)
  path = tmp_path / "small.json"
  path.write_text('{"ranks": {"fc1": 3}}')
  with pytest.raises(UserError, match=r"'fc1' is dense \(merged"):
    export.choose_sizes(run, ranks=str(path))
  path.write_text('{"ranks": {"fc2": 3}}')
  sizes = export.choose_sizes(run, ranks=str(path))
  export.export(run, tmp_path / "out", sizes, options=FAST, **QUIET)
  _, variables = maestro.load(tmp_path / "out", profile="small")
  assert variables["params"]["fc1"]["kernel"].shape == (20, 16)
  assert variables["params"]["fc2"]["u"].shape == (16, 3)


@pytest.mark.quick(1)
def test_the_command_line(runs, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(opened, "open_run", lambda *asked: runs("mlp"))
  monkeypatch.setattr(data_lib, "make", _no_data)
  flags = {name: None for name in ("budget", "ranks", "rule", "data_dir")}
  flags |= {"workdir": "run", "checkpoint": "final", "profiles": []}
  flags |= {"reorder": False}
  flags |= {"out": str(tmp_path / "out"), **dataclasses.asdict(FAST)}

  def command(**values):
    values = types.SimpleNamespace(**flags | values)
    monkeypatch.setattr(export_command.flags, "FLAGS", values)
    export_command.main(["maestro.export"])
    return capsys.readouterr().out

  out = command(profiles=["0.3", "0.9", "0.6"], rule="uniform")
  assert "without the data set: no data here" in out
  loaded = artifact.read(tmp_path / "out", budget="macs:0.7")
  assert [p["name"] for p in loaded.config["profiles"]] == ["0.9", "0.6", "0.3"]
  for profile in loaded.config["profiles"]:
    assert (
      profile["macs"] <= float(profile["name"]) * loaded.config["dense"]["macs"]
    )
  assert loaded.profile["name"] == "0.6"
  command(budget="params:0.5", rule="energy")  # replaces it
  loaded = artifact.read(tmp_path / "out", profile="params:0.5")
  assert loaded.profile["params"] <= 0.5 * loaded.config["dense"]["params"]
  with pytest.raises(UserError, match="--out"):
    command(out=None)
  with pytest.raises(UserError, match="--reorder needs training data"):
    command(reorder=True)


def _no_data(**section):
  raise data_lib.DataError("no data here")


@pytest.mark.quick(1)
def test_errors_are_one_line(tmp_path):
  result = subprocess.run(
    [sys.executable, "-m", "maestro.export", "--workdir=absent", "--out=x"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert result.returncode == 2
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1
  assert "absent" in result.stderr
