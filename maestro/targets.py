"""A user's own models and data sets in a config: "package.module:name".

  config.model = {"target": "my_package.networks:Net", "width": 64}

A config may come with a workdir from anywhere, and importing a module runs it.
So only modules that the command line names are imported (`allow`, the flag
--allow_import), whoever wrote the config.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from maestro import schema
from maestro.schema import ConfigError

_allowed: set[str] = set()


def allow(modules: Iterable[str]) -> None:
  """Lets configs of this process name what is in these modules, or below them.

  Args:
    modules: names such as "my_package" or "my_package.networks".
  """
  _allowed.update(modules)


def choose(
  table: Mapping[str, Any], section: Mapping[str, Any], where: str
) -> tuple[Any, dict[str, Any]]:
  """Splits {"name" or "target": ..., options} into a function and its options.

  Args:
    table: what there is by name.
    section: of the config.
    where: its path, as in "config.model".

  Raises:
    ConfigError: the name is unknown; the target's module was not allowed,
      cannot be imported, or does not have it.
  """
  target = section.get("target")
  if target is None:
    return schema.choose(
      table, {k: v for k, v in section.items() if k != "target"}, where
    )
  if section.get("name") is not None:
    raise ConfigError(
      f"{where}: both name={section['name']!r} and target={target!r} are given;"
      " leave one out"
    )
  options = {k: v for k, v in section.items() if k not in ("name", "target")}
  return _find(target, f"{where}.target"), options


def shown(section: Mapping[str, Any], where: str) -> str:
  """How errors name what a section chose: "config.model.name: 'gpt'"."""
  key = "name" if section.get("target") is None else "target"
  return f"{where}.{key}: {section[key]!r}"


def _find(target: Any, where: str) -> Any:
  module, _, name = (
    target.partition(":") if isinstance(target, str) else [""] * 3
  )
  parts = [*module.split("."), name]
  if not all(part.isidentifier() for part in parts):
    raise ConfigError(
      f"{where}: {target!r} must be 'package.module:name', such as"
      " 'my_package.networks:Net'"
    )
  prefixes = {".".join(parts[: i + 1]) for i in range(len(parts) - 1)}
  if not prefixes & _allowed:
    raise ConfigError(
      f"{where}: {target!r} is code of its own, which is run only if the"
      f" command line says so; if you trust it, add --allow_import={module}"
    )
  try:
    found = importlib.import_module(module)
  except Exception as error:  # whatever the module does
    raise ConfigError(
      f"{where}: {module!r} cannot be imported ({type(error).__name__}:"
      f" {' '.join(str(error).split())}); its folder must be the current one,"
      " on PYTHONPATH, or installed"
    ) from error
  if not callable(getattr(found, name, None)):
    close = difflib.get_close_matches(name, vars(found), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{where}: {module!r} has no class {name!r}{hint}")
  return getattr(found, name)
