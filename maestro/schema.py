"""Python signatures as the schema of a config: names, types, ranges.

A range stands beside the type, Annotated[int, Range("[1, inf)")]; numbers are
finite without being told. A parameter that is a dataclass takes a mapping, and
a sequence of dataclasses takes a sequence of mappings.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from maestro.errors import UserError


class ConfigError(UserError):
  """A config key is unknown, missing, of a wrong type or out of range."""


@dataclasses.dataclass(frozen=True)
class Range:
  """An interval of numbers in mathematics' notation, such as "[0, 1)"."""

  text: str

  def __contains__(self, x: float) -> bool:
    low, high = map(float, self.text[1:-1].split(","))
    above = x >= low if self.text[0] == "[" else x > low
    return above and (x <= high if self.text[-1] == "]" else x < high)

  def __str__(self) -> str:
    return self.text


Count = Annotated[int, Range("[1, inf)")]
Natural = Annotated[int, Range("[0, inf)")]
Weight = Annotated[float, Range("[0, inf)")]
Positive = Annotated[float, Range("(0, inf)")]
Rate = Annotated[float, Range("[0, 1)")]
Share = Annotated[float, Range("[0, 1]")]
Ratio = Annotated[float, Range("(0, 1]")]

_HIDDEN = ("self", "parent", "name")  # Flax's own fields of a module


def _matches(value: Any, kind: Any) -> bool:
  """True if `value` fits an annotation, as far as the annotation is simple."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is Annotated:
    return _matches(value, args[0])
  if origin is Literal:
    return any(value is arg or value == arg for arg in args)
  if origin in (typing.Union, types.UnionType):
    return any(_matches(value, arg) for arg in args)
  if kind is Any or kind is inspect.Parameter.empty:
    return True
  if kind is type(None):
    return value is None
  if kind is int:
    return isinstance(value, int) and not isinstance(value, bool)
  if kind is float:
    return isinstance(value, int | float) and not isinstance(value, bool)
  if origin in (Sequence, tuple, list):
    element = args[0] if args else Any
    return isinstance(value, list | tuple) and all(
      _matches(v, element) for v in value
    )
  if dataclasses.is_dataclass(kind):
    return isinstance(value, Mapping | typing.cast(type, kind))
  if origin is Mapping or kind in (Mapping, dict):
    return isinstance(value, Mapping)
  if isinstance(kind, type) and not getattr(kind, "_is_protocol", False):
    return isinstance(value, kind)
  return True


def _show(kind: Any) -> str:
  if typing.get_origin(kind) is Annotated:
    return _show(typing.get_args(kind)[0])
  args = typing.get_args(kind)
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return " | ".join(map(_show, args))
  return kind.__name__ if isinstance(kind, type) else str(kind)


def _convert(value: Any, kind: Any, where: str, allowed: Any = None) -> Any:
  """Checks a value that fits `kind` for its range; builds its dataclasses."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is Annotated:
    return _convert(value, args[0], where, args[1])
  if origin in (typing.Union, types.UnionType):
    fitting = next(arg for arg in args if _matches(value, arg))
    return _convert(value, fitting, where, allowed)
  if origin in (Sequence, tuple, list) and args:
    made = [_convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    same = all(a is b for a, b in zip(made, value, strict=True))
    return value if same else tuple(made)
  if kind in (int, float) or (kind is Any and isinstance(value, float)):
    if not math.isfinite(value):
      raise ConfigError(f"{where}: {value} is no finite number")
    if allowed is not None and value not in allowed:
      raise ConfigError(f"{where}: {value} is out of range, {allowed}")
  if isinstance(value, Mapping) and dataclasses.is_dataclass(kind):
    kind = typing.cast(type, kind)
    return kind(**bind(kind, value, where))
  return value


def check_name(value: Any, known: Iterable[Any], where: str) -> None:
  """Raises ConfigError, with what is close, unless a name is known."""
  names = list(known)
  if value not in names:
    text = [name for name in names if isinstance(name, str)]
    close = difflib.get_close_matches(str(value), text, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{where}: {value!r} is unknown{hint} (one of {names})")


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
    ConfigError: a key is unknown, of the wrong type or out of range, or one is
      missing.
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
    hints = typing.get_type_hints(init, include_extras=True)
  except (NameError, TypeError):
    hints = {}
  values = dict(section)
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
    if names := _names(kind):
      check_name(value, names, f"{where}.{key}")
    elif not _matches(value, kind):
      raise ConfigError(
        f"{where}.{key}: {value!r} is a {type(value).__name__}, expected"
        f" {_show(kind)}"
      )
    values[key] = _convert(value, kind, f"{where}.{key}")
  for name, p in parameters.items():
    if p.default is p.empty and name not in section:
      raise ConfigError(f"{where}.{name}: missing key")
  return values


def _names(kind: Any) -> tuple:
  """The values of a Literal, or of one or None; else ()."""
  if typing.get_origin(kind) is Literal:
    return typing.get_args(kind)
  args = typing.get_args(kind)
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    literals = [a for arg in args for a in _names(arg)]
    if literals and all(_names(a) or a is type(None) for a in args):
      return (*literals, *([None] if type(None) in args else []))
  return ()


def choose(
  table: Mapping[str, Any], section: Mapping[str, Any], where: str
) -> tuple[Any, dict[str, Any]]:
  """Splits {"name": ..., options} into table[name] and the options."""
  if "name" not in section:
    raise ConfigError(f"{where}.name: missing key (one of {sorted(table)})")
  options = dict(section)
  name = options.pop("name")
  check_name(name, sorted(table), f"{where}.name")
  return table[name], options


def make(
  table: Mapping[str, Callable],
  section: Mapping[str, Any],
  where: str,
  given: Sequence[str] = (),
) -> functools.partial:
  """Returns the function that a section names, with the section's options.

  Args:
    table: functions by name.
    section: {"name": ..., options}.
    where: the section's path.
    given: parameters that the caller supplies itself.
  """
  function, options = choose(table, section, where)
  return functools.partial(function, **bind(function, options, where, given))
