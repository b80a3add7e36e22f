"""Tests the rules of what may import what, and that every file says why."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("maestro", "configs", "experiments", "benchmarks", "launch", "tests")
FILES = sorted(
  path.relative_to(ROOT) for f in FOLDERS for path in (ROOT / f).rglob("*.py")
)


@functools.cache
def _tree(path):
  return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def _imports(source, package=()):
  """Yields the full name of everything that a module imports."""
  for node in ast.walk(source):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) + 1 - node.level] if node.level else ()
      base = ".".join((*base, *filter(None, [node.module])))
      # `from a import b` may mean the module a.b.
      yield base
      yield from (f"{base}.{alias.name}" for alias in node.names)


def _names(path):
  package = path.parts[:-1]
  return set(_imports(_tree(path), package))


def _uses(names, module):
  return {n for n in names if n == module or n.startswith(f"{module}.")}


def _in(path, *places):
  return any(
    path == pathlib.Path(p) or pathlib.Path(p) in path.parents for p in places
  )


def _refused(path, names):
  """The imports of a file that the architecture forbids, with the reason."""
  bad = {}

  def forbid(modules, why):
    bad.update(dict.fromkeys(modules, why))

  if _in(path, "maestro/trees.py", "maestro/lowrank.py", "maestro/sampling.py"):
    forbid(_uses(names, "flax"), "the method knows only JAX")
  if _in(path, "maestro") and not _in(
    path,
    "maestro/nn.py",
    "maestro/introspect.py",
    "maestro/taps.py",
    "maestro/models",
    "maestro/adapt.py",
    "maestro/nnx_model.py",
  ):
    forbid(_uses(names, "flax.linen"), "Linen stays in nn, models, adapt")
  if _in(path, "maestro/models"):
    ours = _uses(names, "maestro") - {"maestro"}
    for name in ("nn", "models", "errors", "schema"):
      ours -= _uses(names, f"maestro.{name}")
    forbid(ours, "models import only maestro.nn (and errors, schema)")
  if not _in(
    path, "maestro/main.py", "maestro/search.py", "experiments", "tests"
  ):
    forbid(_uses(names, "maestro.training.loop"), "nobody imports the loop")
  if _in(path, "configs"):
    forbid(_uses(names, "maestro"), "configs are data")
  for module in ("pickle", "cloudpickle", "dill", "joblib", "shelve"):
    forbid(_uses(names, module), "loading would run code")
  return bad


# The rooms of maestro/, from the ground up; commands stand above all of them.
ROOMS = (
  *(
    "errors",
    "exits",
    "streams",
    "trees",
    "svd",
    "lowrank",
    "sampling",
    "schema",
    "targets",
    "ops",
  ),
  *(
    "nn",
    "nnx_model",
    "adapt",
    "products",
    "introspect",
    "taps",
    "decoding",
    "models",
    "torch_names",
    "pytorch",
    "data",
    "cost",
    "methods",
    "parallel",
    "runs",
  ),
  *("report", "training", "deploy"),
)
COMMANDS = ("main", "search", "allocate", "export", "chaos", "fit", "goodput")
LIBRARY = [path for path in FILES if _in(path, "maestro")]


def _room(module):
  return module.split(".")[1] if "." in module else ""


def test_every_file_is_in_a_room():
  found = {path.parts[1].removesuffix(".py") for path in LIBRARY}
  assert found == {*ROOMS, *COMMANDS, "cli", "__init__"}


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_imports_only_go_down(path):
  room = path.parts[1].removesuffix(".py")
  if room not in ROOMS or path.name == "__main__.py":  # a command
    return
  above = {*ROOMS[ROOMS.index(room) + 1 :], *COMMANDS, "cli"}
  used = {n for n in _names(path) if n.startswith("maestro.")}
  assert not {n for n in used if _room(n) in above}


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_what_is_private_stays_private(path):
  imported = set()
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.ImportFrom):
      names = {alias.asname or alias.name for alias in node.names}
      assert not {n for n in names if n.startswith("_")}
      if (node.module or "").startswith("maestro"):
        imported |= names
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      private = node.attr.startswith("_") and not node.attr.startswith("__")
      assert not (private and node.value.id in imported), node.attr


def test_every_room_names_the_file_to_open_first():
  for path in LIBRARY:
    if path.name == "__init__.py" and path.parts[1] in (
      *("cost", "methods", "parallel", "runs"),
      *("report", "training", "deploy"),
    ):
      purpose = ast.get_docstring(_tree(path))
      first = re.search(r"Open `(\w+\.py)` first", purpose)
      assert (ROOT / path.parent / first[1]).is_file()


def test_the_files_are_found():
  assert pathlib.Path("maestro/lowrank.py") in FILES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_keep_to_the_architecture(path):
  assert not _refused(path, _names(path))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_begins_with_its_purpose(path):
  source = _tree(path)
  if path.name == "__init__.py" and not source.body:
    return  # an empty package
  assert ast.get_docstring(source)


@pytest.mark.parametrize(
  ("path", "line", "module"),
  [
    ("maestro/lowrank.py", "import flax", "flax"),
    ("maestro/sampling.py", "from flax import struct", "flax.struct"),
    ("maestro/training/step.py", "from flax import linen as nn", "flax.linen"),
    (
      "maestro/training/step.py",
      "import flax.linen.linear",
      "flax.linen.linear",
    ),
    ("maestro/ops/xla.py", "from flax.linen import Dense", "flax.linen"),
    ("maestro/models/vgg.py", "from maestro import ops", "maestro.ops"),
    ("maestro/models/vgg.py", "from ..ops import xla", "maestro.ops"),
    ("maestro/models/vgg.py", "from .. import ops", "maestro.ops"),
    (
      "maestro/export.py",
      "from maestro.training.loop import train",
      "maestro.training.loop",
    ),
    (
      "maestro/export.py",
      "from .training import loop",
      "maestro.training.loop",
    ),
    ("configs/lenet.py", "def f():\n  import maestro", "maestro"),
    ("benchmarks/speed.py", "import pickle", "pickle"),
  ],
)
def test_a_forbidden_import_is_seen(path, line, module):
  path = pathlib.Path(path)
  names = set(_imports(ast.parse(line), path.parts[:-1]))
  assert module in _refused(path, names)


@pytest.mark.parametrize(
  ("path", "line"),
  [
    ("maestro/nn.py", "import flax.linen as nn"),
    ("maestro/training/step.py", "import flax.struct"),
    ("maestro/models/vgg.py", "from maestro import nn"),
    ("maestro/models/vgg.py", "import flax.linen\nimport jax"),
    ("maestro/main.py", "from maestro.training.loop import train"),
    ("experiments/table.py", "from maestro import train"),
    ("maestro/training/step.py", "import maestro.training.loop_data"),
  ],
)
def test_an_allowed_import_is_let_through(path, line):
  path = pathlib.Path(path)
  names = set(_imports(ast.parse(line), path.parts[:-1]))
  assert not _refused(path, names)


def _functions(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_files_and_functions_are_of_a_size_to_be_read(path):
  text = (ROOT / path).read_text(encoding="utf-8")
  assert len(text.splitlines()) <= 500
  for name, lines in _functions(ast.parse(text)):
    assert lines <= 120, name


@pytest.mark.quick(0)
def test_the_quick_suite_and_the_rest_are_all(tmp_path):
  conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
  (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")
  (tmp_path / "test_cases.py").write_text(
    """
import pytest

@pytest.mark.quick(2)
@pytest.mark.parametrize("i", range(5))
def test_some(i): pass

@pytest.mark.quick(9)
@pytest.mark.parametrize("i", range(3))
def test_more_than_there_are(i): pass

@pytest.mark.quick(0)
def test_none(): pass

def test_every(): pass

@pytest.mark.slow
def test_slow(): pass
"""
  )

  def collected(*args):
    command = [sys.executable, "-m", "pytest", "--collect-only"]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}"]
    done = subprocess.run(
      [*command, *args],
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    names = [s.split("::")[1] for s in done.stdout.splitlines() if "::" in s]
    assert names, done.stdout + done.stderr
    return [name.removeprefix("test_") for name in names]

  here = str(tmp_path)
  quick = collected(here)
  some = ["some[0]", "some[2]"]
  more = [f"more_than_there_are[{i}]" for i in range(3)]
  assert quick == [*some, *more, "every"]
  rest = ["some[1]", "some[3]", "some[4]", "none"]
  assert collected(here, "--cases=rest") == rest
  assert sorted(collected(here, "--cases=all")) == sorted(quick + rest)
  # What is asked for by name is not left out.
  assert collected(here, "-k", "none") == ["none"]
  assert collected(f"{here}/test_cases.py::test_some[1]") == ["some[1]"]
  assert collected(here, "-m", "slow") == ["slow"]
