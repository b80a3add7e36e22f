"""Tells people about an exported model: a table, and the page README.md.

The page begins with what hubs of models read, and config.json has the keys that
their tools look for (`labels`).
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from maestro.report.tables import markdown_table

OWN_DATA = "data of its own"  # of what no run of maestro has trained


def rows(config: Mapping[str, Any]) -> list[list[str]]:
  """Tabulates the sizes of a network: a head, then one row for each form."""
  dense, profiles = config["dense"], config["profiles"]
  scores = [
    (split, metric)
    for split in ("val", "test")
    for metric in ("accuracy", "bleu", "perplexity", "loss")
    if any(metric in p["metrics"].get(split, {}) for p in profiles)
  ]
  batches = sorted(dense["latency_ms"], key=int)
  head = ["network", "parameters", "% of dense", "MACs", "% of dense"]
  head += [f"{split} {metric}" for split, metric in scores]
  head += [f"ms, batch {batch}" for batch in batches]
  table = [head]

  def add(name: str, form: Mapping[str, Any]) -> None:
    row = [name]
    for kind in ("params", "macs"):
      row += [f"{form[kind]:,}", f"{100 * form[kind] / dense[kind]:.1f}"]
    metrics = form.get("metrics", {})
    for split, metric in scores:
      value = metrics.get(split, {}).get(metric)
      row.append("-" if value is None else f"{value:.4f}")
    row += [f"{form['latency_ms'][batch]:.3g}" for batch in batches]
    table.append(row)

  add("dense", dense)
  if "factored" in config:
    add("factored, not merged", config["factored"])
  for profile in profiles:
    add(f"exported, {profile['name']}", profile)
  return table


def checks(config: Mapping[str, Any]) -> list[str]:
  """Lists the relative differences that were measured, a line each."""
  lines = [*_int8(config)]
  for profile in config["profiles"]:
    found = profile["difference"]
    lines.append(
      f"{profile['name']}: {found['masked']:.1e} from the masked network,"
      f" {found['reloaded']:.1e} from memory to file and back"
    )
  if config["stablehlo"]:
    lines.append(
      f"model.stablehlo: {config['stablehlo']['difference']:.1e} from"
      f" {config['stablehlo']['profile']} in memory"
    )
  for size, record in config.get("onnx", {}).items():
    lines.append(
      f"{record['file']}: {record['difference']:.1e} from {size} in memory"
    )
  return lines


def _int8(config: Mapping[str, Any]) -> Iterator[str]:
  """What int8 weights change of each size, and where they are."""
  forms = config["weights"]
  if forms:
    left = ", ".join(forms["float32"])
    n = len(forms["int8"]) + len(forms["float32"])
    yield f"int8: {len(forms['int8'])} of {n} weights" + (
      f"; as they were, or the difference would be too large: {left}"
      if left
      else ""
    )
  for profile in config["profiles"]:
    if "float32" not in profile:
      continue
    scores = []
    for split, metrics in profile["float32"]["metrics"].items():
      if "accuracy" in metrics:
        new = profile["metrics"][split]["accuracy"]
        scores.append(
          f", {split} accuracy {new:.4f} and {metrics['accuracy']:.4f}"
        )
    yield (
      f"{profile['name']}: {profile['difference']['int8']:.1e} between int8 and"
      f" float32 weights{''.join(scores)}"
    )


def slower(config: Mapping[str, Any]) -> list[str]:
  """Lists where an exported network is slower than the dense one."""
  dense = config["dense"]["latency_ms"]
  return [
    f"exported, {profile['name']}: slower than dense at batch {batch},"
    f" {ms:.3g} ms against {dense[batch]:.3g} ms"
    for profile in config["profiles"]
    for batch, ms in profile["latency_ms"].items()
    if ms > dense[batch]
  ]


def labels(model: Any) -> dict[str, Any]:
  """Returns the keys of config.json by which other tools tell a model."""
  return {
    "library_name": "maestro",
    "model_type": "maestro",
    "architectures": [type(model).__name__],
  }


def _head(config: Mapping[str, Any], name: str) -> list[str]:
  """The page's head in YAML, of which JSON is a part; no field is guessed."""
  tags = ["maestro", "jax", "flax", "low-rank", "model-compression"]
  head: dict[str, Any] = {"library_name": "maestro", "tags": tags}
  task = {}
  if len(config["input"]["shape"]) == 3 and config["num_classes"]:
    head["pipeline_tag"] = "image-classification"
    task = {"type": head["pipeline_tag"]}
  index = []
  for profile in config["profiles"]:
    results = [
      {
        "task": task or {"type": "other"},
        "dataset": {
          "name": config["data"],
          "type": config["data"],
          "split": split,
        },
        "metrics": known,
      }
      for split, metrics in profile["metrics"].items()
      if (
        known := [
          {"type": metric, "name": metric, "value": value}
          for metric, value in metrics.items()
          if isinstance(value, float | int) and math.isfinite(value)
        ]
      )
    ]
    if results and config["data"] != OWN_DATA:
      label = f"{name}, size {profile['name']}"
      index.append({"name": label, "results": results})
  if index:
    head["model-index"] = index
  return ["---", *(f"{k}: {json.dumps(v)}" for k, v in head.items()), "---"]


def make_card(config: Mapping[str, Any], name: str) -> str:
  """Writes README.md of an exported directory called `name`."""
  source, inputs = config["source"], config["input"]
  shape = ", ".join(["n", *map(str, inputs["shape"])])
  scale = inputs["normalization"]
  if scale:
    values = ", ".join(f"{k} {v}" for k, v in scale.items())
    inputs_text = f"from pixels in [0, 1]: (pixel - mean) / std, {values}"
  else:
    inputs_text = "as the data set has them"
  profiles = config["profiles"]
  many = len(profiles) > 1
  outside = config["model"]["options"] is None
  argument = ", model=MODEL" if outside else ""
  lines = [
    *_head(config, name),
    "",
    f"# {name}: {config['model']['name']}",
    "",
    f"Cut out of the run `{source['workdir']}`, checkpoint"
    f" {source['checkpoint']} (step {source['step']}), trained on"
    f" {config['data']}.",
    f"Made by maestro {source['maestro']}, source {source['git']}, JAX"
    f" {source['jax']}.",
    "",
    "## Cost",
    "",
    markdown_table(rows(config)),
    "",
    "MACs are of one example; percentages are of the dense network. Metrics"
    " are fractions (accuracy), out of 100 (BLEU) and per example (loss; per"
    " token for texts, as perplexity is).",
  ]
  if config["dense"]["latency_ms"]:
    lines.append(
      f"Latency: median of a forward pass on {source['device']}; the forms took"
      " turns."
    )
    lines += ["", *(f"- {line}" for line in slower(config)), ""]
  lines.append(f"Batch-norm statistics: {config['statistics']}.")
  lines += ["", "Largest relative differences of outputs:", ""]
  lines += [f"- {line}" for line in checks(config)]
  lines += [
    "",
    "## Use",
    "",
    f"Inputs: {inputs['dtype']} [{shape}], {inputs_text}.",
    "",
    "```python",
    "import maestro",
    f'model, variables = maestro.load("{name}"{argument})',
    "outputs = model.apply(variables, x)",
    "```",
  ]
  if many:
    names = ", ".join(p["name"] for p in profiles)
    lines += [
      "",
      f"The file holds several sizes: {names}. Without an argument, `load`"
      f" takes the largest; `profile={profiles[-1]['name']}` or"
      ' `budget="macs:0.5"` reads only the bytes of a smaller one.',
    ]
  if config["stablehlo"]:
    hlo = config["stablehlo"]
    lines += [
      "",
      f"Without maestro, on JAX {hlo['minimum_jax']} or newer"
      f" ({', '.join(hlo['platforms'])};"
      f" the network {hlo['profile']!r}, any batch size):",
      "",
      "```python",
      "import hashlib",
      "from jax import export",
      f'data = open("{name}/model.stablehlo", "rb").read()',
      f'digest = "{config["files"]["model.stablehlo"]["sha256"]}"',
      "assert hashlib.sha256(data).hexdigest() == digest",
      "outputs = export.deserialize(bytearray(data)).call(x)",
      "```",
    ]
  return "\n".join(lines) + "\n"
