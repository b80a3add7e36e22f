"""README.md, config.json and the weights, as tools of model hubs read them."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from maestro.deploy import card, directory, files

CONFIG = {
  "model": {"name": "lenet", "options": {}},
  "data": "mnist",
  "num_classes": 10,
  "input": {
    "shape": [28, 28, 1],
    "dtype": "float32",
    "normalization": {"mean": 0.5, "std": 0.5},
  },
  "source": {
    **{"workdir": "run", "checkpoint": "final", "step": 3, "git": "abc"},
    **{"maestro": "0.1.0", "jax": "0.10.2", "device": "cpu: cpu"},
  },
  "statistics": "none",
  "weights": {},
  "stablehlo": None,
  "dense": {"params": 100, "macs": 200, "bytes": 400, "latency_ms": {}},
  "profiles": [
    {
      "name": name,
      **{"params": 50, "macs": 90, "bytes": 200, "latency_ms": {}},
      "difference": {"masked": 1e-7, "reloaded": 0.0},
      "metrics": {
        "val": {"accuracy": 0.5, "loss": 1.0},
        "test": {"accuracy": 0.25, "loss": 2.0},
      },
    }
    for name in ("0.5", "0.25")
  ],
}


def head(config):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  text = card.make_card(config, 'any: "size"')
  start, content, page = text.split("---\n", 2)
  assert start == "" and page.startswith("\n# any")
  return yaml.safe_load(content)


def test_the_head_is_what_hubs_read():
  found = head(CONFIG)
  assert found["library_name"] == "maestro"
  assert found["pipeline_tag"] == "image-classification"
  assert "jax" in found["tags"]
  index = found["model-index"]
  assert [model["name"] for model in index] == [
    f'any: "size", size {name}' for name in ("0.5", "0.25")
  ]
  for model in index:
    assert [r["dataset"]["split"] for r in model["results"]] == ["val", "test"]
    for result, accuracy in zip(model["results"], (0.5, 0.25), strict=True):
      assert result["task"] == {"type": "image-classification"}
      assert result["dataset"]["name"] == "mnist"
      values = {m["type"]: m["value"] for m in result["metrics"]}
      assert values["accuracy"] == accuracy


def test_the_head_guesses_nothing():
  profiles = [p | {"metrics": {}} for p in CONFIG["profiles"]]
  found = head(CONFIG | {"profiles": profiles})
  assert set(found) == {"library_name", "tags", "pipeline_tag"}
  for change in (
    {"num_classes": None},
    {"input": CONFIG["input"] | {"shape": [17]}},
  ):
    found = head(CONFIG | change)
    assert "pipeline_tag" not in found
    result = found["model-index"][0]["results"][0]
    assert result["task"] == {"type": "other"}


def _with(**metrics):
  """The same with metrics of the test split."""
  return CONFIG | {
    "profiles": [p | {"metrics": {"test": metrics}} for p in CONFIG["profiles"]]
  }


def test_the_head_is_without_what_is_no_number_or_of_no_data():
  index = head(_with(loss=float("nan"), accuracy=0.5))["model-index"]
  assert index[0]["results"][0]["metrics"] == [
    {"type": "accuracy", "name": "accuracy", "value": 0.5}
  ]
  assert "model-index" not in head(_with(loss=float("inf")))
  assert "model-index" not in head(_with(loss=1.0) | {"data": card.OWN_DATA})


def test_metrics_of_texts_have_columns():
  table = card.rows(_with(loss=2.0, perplexity=7.4, bleu=30.2))
  names = ["test bleu", "test perplexity", "test loss"]
  assert [name for name in table[0] if name.startswith("test")] == names
  assert table[2][-3:] == ["30.2000", "7.4000", "2.0000"]


def test_tools_of_a_hub_read_the_card():
  hub = pytest.importorskip(
    "huggingface_hub", reason="huggingface_hub is not installed"
  )
  found = hub.ModelCard(card.make_card(CONFIG, "any"))
  assert found.data.library_name == "maestro"
  results = hub.ModelCard(
    card.make_card(CONFIG | {"profiles": CONFIG["profiles"][:1]}, "any")
  ).data.eval_results
  assert {r.metric_type for r in results} == {"accuracy", "loss"}


def test_labels_name_the_class():
  class Mine:
    pass

  labels = card.labels(Mine())
  assert labels["architectures"] == ["Mine"]
  assert json.loads(json.dumps(labels)) == labels


def test_the_metadata_name_a_framework(tmp_path):
  path = tmp_path / "model.safetensors"
  files.write(path, {"x": np.zeros(2, np.float32)}, directory.METADATA)
  with safe_open(path, "numpy") as file:
    told = file.metadata()
  assert told["format"] in ("pt", "tf", "flax", "mlx")  # all that they know
  assert told["maestro"] == directory.FORMAT
