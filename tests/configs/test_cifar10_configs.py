"""The CIFAR-10 configs' variants, and the experiment that runs them."""

import importlib.util
import json
import pathlib
import signal
import sys
import threading
import time

import jax
import pytest

from experiments import cifar10
from maestro import introspect as nn
from maestro import lowrank, trees
from maestro.cost.count import count_cost
from maestro.errors import Interrupted, UserError
from maestro.models import MODELS
from maestro.runs import metrics
from maestro.training import build, schedules
from maestro.training.config import clock_of, parse

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = {
  "resnet_od": (11_173_962, 555_422_720),
  "vgg_od": (20_040_522, 398_136_320),
}
RECIPES = ("", "paper", "gpu", "short")


def get(name, arg=""):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg)


def steps(c):
  examples = c.data.get("train_examples") or 50_000 - c.data["val_examples"]
  return examples // c.batch_size


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_networks_are_those_of_the_paper(name):
  for arg in RECIPES:
    c = parse(get(name, arg).to_dict())
    options = dict(c.model)
    model = MODELS[options.pop("name")](num_classes=10, **options)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    layers = nn.layers(model, x)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    cost = count_cost(layers, params)
    assert (cost.params, cost.macs) == CONFIGS[name]
    # All layers are decomposed, first convolution and classifier included.
    factored = jax.eval_shape(
      lambda p, layers=layers, c=c: lowrank.decompose(p, c.rules, layers),
      params,
    )
    assert set(trees.factored(factored)) == set(layers)


def schedule(c, steps_per_epoch):
  sections = {p: getattr(c, p).schedule for p in ("discover", "settle")}
  return schedules.make(sections, clock_of(c, steps_per_epoch))


@pytest.mark.parametrize("name", CONFIGS)
def test_paper_is_the_papers_recipe(name):
  c = parse(get(name, "paper").to_dict())
  assert (c.batch_size, c.threshold, c.discover.lam) == (128, 1e-7, 16e-6)
  assert (c.discover.epochs, c.settle.epochs) == (300, 0)
  assert c.optimizer["name"] == "sgd" and c.optimizer["momentum"] == 0.9
  assert c.optimizer["weight_decay"] == 1e-4 and not c.optimizer["nesterov"]
  assert c.discover.sampler == {"name": "one_layer", "over": "pairs"}
  rate = schedule(c, 10)
  at = [rate(epoch * 10) for epoch in (0, 149, 151, 224, 226, 299)]
  assert at == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", ["", "gpu", "short"])
def test_what_is_no_paper_settles(name, recipe):
  c = parse(get(name, recipe).to_dict())
  assert c.discover.lam > 0 and c.discover.shrink and c.settle.epochs > 0
  assert c.settle.lam == 0 and not c.settle.shrink
  assert c.settle.sampler == {"name": "full"}


@pytest.mark.parametrize("name", CONFIGS)
def test_gpu_is_in_bfloat16_and_dispatches_whole_groups_of_steps(name):
  c = parse(get(name, "gpu").to_dict())
  assert c.model["dtype"] == "bfloat16" and c.batch_size == 512
  assert c.steps_per_dispatch is None and steps(c) % 16 == 0
  rate = schedule(c, 10)
  joint = 10 * c.discover.epochs
  # One curve: no jump where the phases meet, and it ends at zero.
  assert float(rate(joint - 1)) == pytest.approx(float(rate(joint)), rel=0.01)
  assert float(rate(clock_of(c, 10).total)) < 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_short_makes_at_least_300_steps(name):
  c = parse(get(name, "short").to_dict())
  assert c.batch_size == 32 and c.log_every_steps == 10
  assert steps(c) * c.discover.epochs >= 300
  assert (c.data["train_examples"], c.batch_norm_examples) == (3200, 512)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_smoke_goes_with_every_recipe(name, recipe):
  plain = parse(get(name, recipe).to_dict())
  c = parse(get(name, f"{recipe},smoke").to_dict())
  assert clock_of(c, 1).total <= 2 and clock_of(c, steps(c)).total <= 16
  assert (c.settle.epochs == 0) == (plain.settle.epochs == 0)
  assert c.model["width"] == 8 and c.model["dtype"] == plain.model["dtype"]
  assert c.data["val_examples"] <= 512 and c.batch_norm_examples <= 512
  schedule(c, 8)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_recipes_at_once_are_refused(name):
  with pytest.raises(ValueError, match=r"choose one of .*paper, gpu, short"):
    get(name, "gpu,short")


# --- the experiment ---


def test_every_row_overrides_keys_that_the_config_has():
  assert set(cifar10.ROWS) == set(RECIPES)
  for recipe, rows in cifar10.ROWS.items():
    assert next(iter(rows)) == "dense" and len(rows) >= 2
    for changes in rows.values():
      words = [word for word in changes if not word.startswith("--")]
      for override in filter(lambda word: word not in words, changes):
        key, _, value = override.removeprefix("--config.").partition("=")
        node = get("resnet_od", recipe).to_dict()
        for part in key.split("."):
          node = node[part]
        assert node is None or type(node)(value) is not None


@pytest.mark.parametrize("network", ["resnet", "vgg"])
def test_every_row_of_a_network_is_a_variant_of_its_config(network):
  for recipe in RECIPES:
    rows = cifar10.rows_of(recipe, network)
    assert "dense" in rows
    for changes in rows.values():
      words = [word for word in changes if not word.startswith("--")]
      get(f"{network}_od", ",".join(filter(None, [recipe, *words])))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recipe", ["", "gpu", "short"])
def test_race_and_nested_share_the_epochs_of_a_recipe(name, recipe):
  whole = get(name, recipe)
  total = whole.discover.epochs + whole.settle.epochs
  for way in ("race", "nested"):
    c = get(name, ",".join(filter(None, [recipe, way])))
    assert c.method == way and (c.budget is None) == (way == "nested")
    assert c.discover.epochs + c.settle.epochs == total
    build.check(parse(c.to_dict()))


@pytest.mark.parametrize("name", CONFIGS)
def test_race_and_nested_exclude_each_other_and_the_paper(name):
  with pytest.raises(ValueError, match=r"choose one of .*race, nested"):
    get(name, "race,nested")
  with pytest.raises(ValueError, match="not with paper"):
    get(name, "race,paper")


def test_published_rows_say_what_is_not_available():
  text = cifar10.published_table("resnet")
  assert "94.19" in text and "4.08" in text and "not available" in text
  assert "not run here" in text


@pytest.fixture
def workdir(tmp_path):
  records = [
    {"step": 0, "epoch": 0, "rank/fc": 8, "rank/total": 8, "cost/macs": 9},
    {"step": 2, "epoch": 1, "train/loss": 1.23456789, "learning_rate": 0.1},
    {
      "step": 4,
      "epoch": 1,
      "train/loss": None,
      "val/accuracy": 0.5,
      "rank/fc": 3,
      "rank/total": 3,
      "examples_per_second": 7.0,
    },
  ]
  path = tmp_path / "lam1" / metrics.FILE
  path.parent.mkdir()
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path.parent


def test_curves_keep_what_is_drawn(workdir):
  found = cifar10.curves(workdir)
  assert found["rank/total"] == {"step": [0, 4], "value": [8, 3]}
  assert found["train/loss"] == {"step": [2], "value": [1.2346]}
  assert found["val/accuracy"] == {"step": [4], "value": [0.5]}
  assert found["examples_per_second"]["value"] == [7.0]
  assert "learning_rate" not in found


def test_an_unfinished_row_keeps_its_curves_and_no_results(workdir, tmp_path):
  cifar10._keep(workdir, tmp_path)
  kept = json.loads((tmp_path / "lam1_curves.json").read_text())
  assert kept == cifar10.curves(workdir)
  assert not (tmp_path / "lam1.json").exists()
  (workdir / "results.json").write_text("{}")
  cifar10._keep(workdir, tmp_path)
  assert (tmp_path / "lam1.json").read_text() == "{}"


def test_the_figure_needs_no_finished_row(workdir, tmp_path):
  cifar10.draw({"lam1": cifar10.curves(workdir)}, {}).savefig(
    tmp_path / "curves.png"
  )
  assert (tmp_path / "curves.png").stat().st_size > 0


SLEEP = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.quick(1)
def test_the_clock_stops_a_run_that_then_saves(tmp_path):
  clock = cifar10.Clock(minutes=4 / 60)  # at half of it, 2 s
  started = time.monotonic()
  with (tmp_path / "log").open("w") as log:
    assert clock.call([sys.executable, "-c", SLEEP], log, {}) == 75
  assert 1.5 < time.monotonic() - started < 30
  assert clock.over


def test_the_clock_lets_a_run_end_and_can_be_asked_to_stop():
  clock = cifar10.Clock(None)
  assert (
    clock.call([sys.executable, "-c", "raise SystemExit(3)"], None, {}) == 3
  )
  assert not clock.over
  clock.ask(signal.SIGTERM, None)
  assert clock.over


def test_rows_at_once_run_together_and_each_tells_its_end(
  monkeypatch, tmp_path
):
  meet = threading.Barrier(3, timeout=30)
  ended = []

  def train(workdir, changes, clock):
    meet.wait()  # nobody goes on before all are here
    ended.append(workdir.name)
    if changes:
      raise changes[0]

  monkeypatch.setattr(cifar10, "_train", train)
  clock = cifar10.Clock(None)
  jobs = {tmp_path / name: [] for name in ("dense", "nested", "race")}
  cifar10._train_at_once(jobs, clock)
  assert sorted(ended) == ["dense", "nested", "race"]
  stopped, failed = Interrupted("nested is not finished"), UserError("race")
  jobs[tmp_path / "nested"] = [stopped]
  with pytest.raises(Interrupted, match="nested is not finished"):
    cifar10._train_at_once(jobs, clock)
  jobs[tmp_path / "race"] = [failed]  # which the same command does not mend
  with pytest.raises(UserError, match="race"):
    cifar10._train_at_once(jobs, clock)


def test_a_long_limit_leaves_a_minute_to_save():
  left = cifar10.Clock(minutes=9).stop_at - time.monotonic()
  assert 470 < left <= 480


@pytest.mark.quick(2)
@pytest.mark.parametrize("arg", ["", "race", "short", "race,short", "smoke"])
def test_resnet20_is_for_cpus_and_its_rate_is_one_line(arg):
  c = parse(get("resnet20_od", arg).to_dict())
  build.check(c)
  options = dict(c.model)
  model = MODELS[options.pop("name")](num_classes=10, **options)
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
  params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  cost = count_cost(nn.layers(model, x), params)
  assert (cost.params == 272_474) == (arg != "smoke")
  assert c.method.name == ("race" if "race" in arg else "nested")
  assert c.method.budget == ("macs:0.5" if "race" in arg else None)
  total = c.discover.epochs + c.settle.epochs
  assert total == {"smoke": 2}.get(arg, 8 if "short" in arg else 12)
  rate = schedule(c, 10)
  found = [float(rate(step)) for step in range(10 * total)]
  expected = [0.1 * (1 - step / (10 * total)) for step in range(10 * total)]
  assert found == pytest.approx(expected, abs=1e-6)
