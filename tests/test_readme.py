"""README and CI: the code runs, the commands are there and agree."""

import pathlib
import re

import numpy as np

import maestro
from maestro import trees

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs_and_gives_the_smaller_network():
  code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
  names = {}
  exec(compile(code, "README.md", "exec"), names)
  model, x, small = names["model"], names["x"], names["small"]
  assert names["logits"].shape == (8, 10)
  assert model.apply({"params": small}, x).shape == (8, 10)


def test_the_example_fits_on_a_first_screen():
  code = re.findall(r"```python\n(.*?)```", README, re.S)[0]
  assert len([line for line in code.splitlines() if line.strip()]) <= 12


def test_your_own_model_runs_on_factors_in_twelve_lines():
  found = re.findall(r"```python\n(.*?)```", README, re.S)
  (code,) = [code for code in found if "maestro.factored" in code]
  assert len([line for line in code.splitlines() if line.strip()]) <= 12
  names = {}
  exec(compile(code, "README.md", "exec"), names)
  params, layers = names["params"], names["layers"]
  assert all("u" in trees.get(params, path) for path in layers)
  merged = maestro.merge(params, layers)
  want = names["Classifier"]().apply({"params": merged}, names["tokens"])
  np.testing.assert_allclose(names["logits"], want, rtol=1e-5, atol=1e-6)


def test_there_is_one_test_command_and_ci_runs_it():
  commands = re.findall(r"^python3 -m venv .*pytest.*$", README, re.M)
  assert len(commands) == 1
  assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_requirements_are_those_of_the_package():
  text = (ROOT / "pyproject.toml").read_text()
  (block,) = re.findall(r"\ndependencies = \[(.*?)\]\n", text, re.S)
  wanted = {line.split(";")[0].strip() for line in re.findall('"(.*?)"', block)}
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  listed = {
    line.split(";")[0].strip()
    for line in lines
    if line.strip() and not line.startswith("#")
  }
  assert listed == wanted


def test_every_config_and_module_command_in_the_readme_exists():
  for name in re.findall(r"configs/(\w+)\.py", README):
    assert name == "NAME" or (ROOT / "configs" / f"{name}.py").exists()
  command = r"python -m ((?:maestro|experiments)[\w.]*)"
  for module in set(re.findall(command, README)):
    if module.endswith(".NAME"):
      continue
    path = ROOT / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__main__.py")
    assert any(file.exists() for file in files), module
