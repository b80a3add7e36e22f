"""Whole runs on texts: ranks, resuming, BLEU, and the files of a network."""

import gzip
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maestro
from maestro import data as data_lib
from maestro import lowrank
from maestro.data.dataset import END, START
from maestro.deploy.export import export
from maestro.errors import UserError
from maestro.models.attention import unstack
from maestro.report import figures
from maestro.runs import workdir as workdir_lib
from maestro.training import build, opened, translate
from maestro.training import loop as train
from maestro.training.config import parse
from maestro.training.translate import make_translate

WORDS = {"de": "ein hund mann rot auf", "en": "a dog man red on"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Files of Multi30k's layout, in which word i is always word i."""
  root = tmp_path_factory.mktemp("data")
  where = root / "multi30k"
  where.mkdir()
  rng = np.random.default_rng(0)
  for stem, n in {"train": 96, "val": 10, "test_2016_flickr": 9}.items():
    rows = [rng.integers(0, 5, rng.integers(1, 7)) for _ in range(n)]
    for language, words in WORDS.items():
      words = words.split()
      text = "".join(" ".join(words[i] for i in row) + "\n" for row in rows)
      path = where / f"{stem}.{language}.gz"
      path.write_bytes(gzip.compress(text.encode()))
  return root


def config(root, scan=False):
  return {
    "model": {
      "name": "transformer",
      "layers": 1,
      "width": 16,
      "hidden": 16,
      "heads": 2,
      "dropout": 0.0,
      "norm": "pre",
      "scan": scan,
    },
    "data": {
      "name": "multi30k",
      "data_dir": str(root),
      "max_length": 16,
      "lengths": [8, 16],
    },
    "batch_size": 8,
    "label_smoothing": 0.1,
    "optimizer": {"name": "adamw", "clip_norm": 1.0},
    "rules": [{"path": "(encoder|decoder)/.*(up|down|query)"}],
    "threshold": 0.05,
    "discover": {
      "epochs": 8,
      "schedule": {"name": "constant", "learning_rate": 0.02},
      "lam": 1e-2,
      "sampler": {"name": "one_layer"},
      "shrink": True,
    },
    "settle": {
      "epochs": 8,
      "schedule": {"name": "linear", "learning_rate": 0.02},
    },
    "eval_every_epochs": 8,
    "mesh": {"data": 1},
  }


@pytest.fixture(autouse=True)
def quickly(monkeypatch, jit):
  monkeypatch.setattr(jax, "jit", jit)
  monkeypatch.setattr(figures, "figures", lambda workdir: None)


class Killed(BaseException):
  pass


@pytest.mark.quick(0)
def test_a_translator_learns_resumes_and_ships(folder, tmp_path, monkeypatch):
  pytest.importorskip("sacrebleu", reason="BLEU needs sacrebleu")
  c, one, two = config(folder), tmp_path / "one", tmp_path / "two"
  results = train.train(c, one)
  scores = results["final"]["metrics"]
  assert set(scores) == {"loss", "accuracy", "perplexity", "bleu"}
  np.testing.assert_allclose(scores["perplexity"], np.exp(scores["loss"]))
  # A word for a word: far better than guessing one of five.
  assert scores["accuracy"] > 0.5 and 0 < scores["bleu"] <= 100, scores

  # Killed while it settles, and resumed, it is the same run to the bit.
  original, count = train._save, 0

  def save(*args):
    nonlocal count
    count += 1
    original(*args)
    if count == 10:
      raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(train, "_save", save)
    with pytest.raises(Killed):
      train.train(c, two)
  again = train.train(c, two)
  assert again["final"] == results["final"]
  runs = [opened.open_run(w) for w in (one, two)]
  for a, b in zip(*(jax.tree.leaves(r.params) for r in runs), strict=True):
    np.testing.assert_array_equal(a, b)

  # Evaluated again, and out of its files, it scores the same.
  found = train.evaluate_workdir(one, str(folder))["test"]
  assert found == pytest.approx(scores, rel=1e-5)
  export(runs[0], tmp_path / "out")
  model, variables = maestro.load(tmp_path / "out")
  x = data_lib.make(**c["data"]).test.inputs
  run = runs[0]
  small = lowrank.extract(run.params, run.ranks, run.layers)
  want = run.model.apply({"params": small}, x)
  np.testing.assert_allclose(
    model.apply(variables, x), want, atol=1e-5 * float(jnp.abs(want).max())
  )


@pytest.mark.quick(0)
def test_translations_are_the_best_next_words_of_the_network(
  folder, monkeypatch
):
  c = config(folder)
  dataset = data_lib.make(**c["data"])
  options = dict(c["model"]) | {"num_classes": dataset.num_classes}
  del options["name"]
  model = maestro.models.Transformer(**options)
  x = dataset.test.inputs
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  rng = np.random.default_rng(2)
  variables = jax.tree.map(
    lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), shapes
  )
  # In batches of 4, the last of 1; in the order that was given.
  texts = make_translate(model, dataset, batch_size=4)(variables, dataset.test)
  alone = make_translate(model, dataset, batch_size=9)(variables, dataset.test)
  assert texts == alone and len(texts) == 9
  # A scan of the same blocks says the same.
  stacked = {
    "params": {
      name: {"layers": jax.tree.map(lambda x: x[None], node["layers_0"])}
      if name in ("encoder", "decoder")
      else node
      for name, node in variables["params"].items()
    }
  }
  jax.tree.map(np.testing.assert_array_equal, unstack(stacked), dict(variables))
  scanned = make_translate(model.clone(scan=True), dataset, batch_size=9)
  assert scanned(stacked, dataset.test) == texts
  # A beam of one takes the most probable word each time.
  source, read, words = x[:, 0], np.zeros_like(x[:, 0]), []
  read[:, 0] = START
  apply, ended = jax.jit(model.apply), np.zeros(len(x), bool)
  for at in range(source.shape[1]):
    out = np.asarray(apply(variables, np.stack([source, read], 1)))[:, at]
    words.append(np.where(ended, END, out.argmax(-1)))
    ended |= words[-1] == END
    if at + 1 < source.shape[1]:
      read[:, at + 1] = np.where(ended, 0, words[-1])
  monkeypatch.setattr(translate, "WIDTH", 1)
  texts = make_translate(model, dataset, batch_size=9)(variables, dataset.test)
  words = np.stack(words, axis=1)
  assert texts == [dataset.vocabulary.decode(row) for row in words]
  assert len({*texts}) > 1


@pytest.mark.quick(0)
def test_without_sacrebleu_a_run_has_all_but_bleu(
  folder, tmp_path, monkeypatch
):
  def missing(*_):
    raise data_lib.DataError("BLEU needs the package 'sacrebleu'")

  monkeypatch.setattr(translate, "require", missing)
  c = config(folder, scan=True)
  c["discover"]["epochs"], c["settle"]["epochs"] = 1, 1
  train.train(c, tmp_path / "run")
  saved = workdir_lib.read_json(tmp_path / "run" / "results.json")
  assert set(saved["final"]["metrics"]) == {"loss", "accuracy", "perplexity"}
  json.dumps(saved, allow_nan=False)

  # The same number of words, but others: a trained network says nonsense.
  other = tmp_path / "other"
  shutil.copytree(folder, other)
  for path in (other / "multi30k").glob("*.en.gz"):
    text = gzip.decompress(path.read_bytes()).replace(b"dog", b"cat")
    path.write_bytes(gzip.compress(text))
  with pytest.raises(UserError, match=r"trained on 'multi30k' with vocabulary"):
    train.evaluate_workdir(tmp_path / "run", str(other))
  # Nor does an interrupted run go on with them.
  (tmp_path / "run" / "results.json").unlink()
  c["data"]["data_dir"] = str(other)
  with pytest.raises(UserError, match=r"data_dir or TFDS_DATA_DIR"):
    train.train(c, tmp_path / "run")


@pytest.mark.parametrize(
  ("model", "data", "why"),
  [
    ("gpt", "multi30k", "does not take inputs"),
    ("lenet", "multi30k", "does not take inputs"),
    ("transformer", "digits", "does not take inputs"),
    ("mlp", "multi30k", r"makes \[\d+\] of an example.* need \[16, \d+\]"),
    ("vit", "multi30k", "does not take inputs"),
  ],
)
def test_networks_that_do_not_fit_the_data_are_named(folder, model, data, why):
  c = config(folder)
  c["model"] = {"name": model}
  if data != "multi30k":
    c["data"] = {"name": data}
  with pytest.raises(UserError, match=rf"config\.model\.name: '{model}' {why}"):
    build.make_training(parse(c))
