"""Python signatures as the schema of a config: names, types, suggestions."""

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maestro.errors import UserError


class ConfigError(UserError):
  """A config key is unknown, missing, of a wrong type or out of range."""


_HIDDEN = ("self", "parent", "name")  # Flax's own fields of a module


def _matches(value: Any, kind: Any) -> bool:
  """True if `value` fits an annotation, as far as the annotation is simple."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return any(_matches(value, arg) for arg in args)
  if kind is Any or kind is inspect.Parameter.empty:
    return True
  if kind is type(None):
    return value is None
  if kind is bool:
    return isinstance(value, bool)
  if kind is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if kind is str:
    return isinstance(value, str)
  if origin in (Sequence, tuple, list):
    element = args[0] if args else Any
    return isinstance(value, list | tuple) and all(
      _matches(v, element) for v in value
    )
  if dataclasses.is_dataclass(kind):
    return isinstance(value, Mapping | kind)
  if origin is Mapping or kind in (Mapping, dict):
    return isinstance(value, Mapping)
  if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
    return isinstance(value, kind)
  return True


def _show(kind: Any) -> str:
  return kind.__name__ if isinstance(kind, type) else str(kind)


def bind(
  function: Callable,
  section: Mapping[str, Any],
  where: str,
  given: Sequence[str] = (),
) -> dict[str, Any]:
  """Checks a section against a signature; returns the keyword arguments.

  Args:
    function: a function or class.
    section: keys and values of the config.
    where: the section's path, as in "config.model".
    given: parameters that the caller supplies itself.

  Raises:
    ConfigError: a key is unknown or of the wrong type, or one is missing.
  """
  parameters = {
    name: p
    for name, p in inspect.signature(function).parameters.items()
    if name not in given and name not in _HIDDEN
  }
  open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
  parameters = {
    name: p
    for name, p in parameters.items()
    if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
  }
  try:
    init = function.__init__ if isinstance(function, type) else function
    hints = typing.get_type_hints(init)
  except (NameError, TypeError):
    hints = {}
  for key, value in section.items():
    if key not in parameters:
      if open_ended:
        continue
      close = difflib.get_close_matches(key, parameters, 1)
      hint = f"; did you mean {close[0]!r}?" if close else ""
      raise ConfigError(
        f"{where}.{key}: unknown key{hint} (known: {', '.join(parameters)})"
      )
    kind = hints.get(key, Any)
    if not _matches(value, kind):
      raise ConfigError(
        f"{where}.{key}: {value!r} is a {type(value).__name__}, expected"
        f" {_show(kind)}"
      )
  for name, p in parameters.items():
    if p.default is p.empty and name not in section:
      raise ConfigError(f"{where}.{name}: missing key")
  return dict(section)


def choose(
  table: Mapping[str, Any], section: Mapping[str, Any], where: str
) -> tuple[Any, dict[str, Any]]:
  """Splits {"name": ..., options} into table[name] and the options."""
  if "name" not in section:
    raise ConfigError(f"{where}.name: missing key (one of {sorted(table)})")
  options = dict(section)
  name = options.pop("name")
  if name not in table:
    close = difflib.get_close_matches(str(name), table, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
      f"{where}.name: {name!r} is unknown{hint} (one of {sorted(table)})"
    )
  return table[name], options
