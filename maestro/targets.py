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
from maestro.errors import UserError
from maestro.schema import ConfigError

_allowed: set[str] = set()


def allow(modules: Iterable[str]) -> None:
  """Lets configs of this process name what is in these modules, or below them.

  Args:
    modules: names such as "my_package" or "my_package.networks".

  Raises:
    UserError: one is no name of a module.
  """
  for module in modules:
    if not all(part.isidentifier() for part in module.split(".")):
      raise UserError(
        f"--allow_import: {module!r} is no name of a module, such as"
        " my_package.networks"
      )
    _allowed.add(module)


def choose(
  table: Mapping[str, Any], section: Mapping[str, Any], where: str
) -> tuple[Any, dict[str, Any]]:
  """Splits {"name" or "target": ..., options} into a function and its options.

  Beside a name, `target` is an option as any other.

  Args:
    table: what there is by name.
    section: of the config.
    where: its path, as in "config.model".

  Raises:
    ConfigError: the name is unknown; the target's module was not allowed,
      cannot be imported, or does not have it.
  """
  if not is_own(section):
    return schema.choose(table, section, where)
  options = {k: v for k, v in section.items() if k not in ("name", "target")}
  return _find(section["target"], f"{where}.target"), options


def is_own(section: Mapping[str, Any]) -> bool:
  """Whether a section names code of the user's own."""
  return section.get("name") is None and section.get("target") is not None


def shown(section: Mapping[str, Any], where: str) -> str:
  """How errors name what a section chose: "config.model.name: 'gpt'"."""
  key = "target" if is_own(section) else "name"
  return f"{where}.{key}: {chosen(section)!r}"


def chosen(section: Mapping[str, Any]) -> str:
  """The name, or the target, that a section gives."""
  return section["target" if is_own(section) else "name"]


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
  if not _is_allowed(module):
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
  made = getattr(found, name, None)
  if not callable(made):
    close = difflib.get_close_matches(name, vars(found), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{where}: {module!r} has no class {name!r}{hint}")
  # What a module has imported for itself is no part of it: os.system, say.
  home = str(getattr(made, "__module__", ""))
  if not _is_allowed(home):
    raise ConfigError(
      f"{where}: {name!r} is not of {module!r} but of {home!r}; name it as"
      f" '{home}:{name}', with --allow_import={home} if you trust that"
    )
  return made


def _is_allowed(module: str) -> bool:
  parts = module.split(".")
  return any(".".join(parts[: i + 1]) in _allowed for i in range(len(parts)))
