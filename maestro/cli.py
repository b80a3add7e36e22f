"""Runs a command line: errors of the user become one line, not a traceback."""

import contextlib
import errno
import json
import sys
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import app, flags, logging

from maestro import targets
from maestro.errors import (
  EXIT_ERROR,
  EXIT_INTERRUPTED,
  EXIT_TERMINATED,
  Interrupted,
  UserError,
)
from maestro.exits import exit_early
from maestro.runs import stop

_FULL = (
  *(errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EDQUOT),
  errno.ENAMETOOLONG,
)


def _parse(argv: list[str]) -> list[str]:
  """Parses flags; ml_collections raises what it finds in a config as it is."""
  try:
    flags.FLAGS.set_gnu_getopt()  # flags may stand behind other arguments
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      # What could not be read is told when any part of the config is.
      getattr(flags.FLAGS["config"].value, "lock", None)
  except (AttributeError, KeyError, TypeError) as error:
    # It comes as the repr of a repr: escapes and one or two layers of quotes.
    text = str(error).replace("\\n", " ").replace("\\'", "")
    text = " ".join(text.split()).strip("\"'")
    if "no attribute 'get_config" in text:
      raise UserError(
        "--config: the file has no function get_config; give the path of a"
        " config file, e.g. configs/digits_od.py"
      ) from error
    raise UserError(f"--config: unknown or unfit key: {text}") from error
  except OSError as error:
    raise UserError(
      f"--config: {str(error).strip().splitlines()[-1].strip()}; give the path"
      " of a config file, e.g. configs/digits_od.py, with common.py beside it"
    ) from error
  except flags.Error as error:
    # An error in a config file comes with its traceback; the last line tells.
    lines = str(error).strip().splitlines()
    first = f"{lines[0]} " if len(lines) > 1 else ""
    raise UserError(f"{first}{lines[-1]}") from error
  except ValueError as error:  # raised by the config file itself
    raise UserError(f"--config: {error}") from error
  except Exception as error:  # whatever a config file does
    raise UserError(
      f"--config: the file cannot be run: {type(error).__name__}:"
      f" {' '.join(str(error).split())}"
    ) from error
  if "allow_import" in flags.FLAGS:
    targets.allow(flags.FLAGS.allow_import)
  # absl's app would default to INFO, at which libraries are talkative.
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  return rest


def define_allow_import() -> None:
  """Defines --allow_import, of commands that build what a config describes."""
  flags.DEFINE_list(
    "allow_import",
    [],
    "Modules of your own that config.model.target and config.data.target may"
    " name, e.g. my_package.networks; they are run.",
  )


def config_of(value: Any) -> dict:
  """Returns what a config file gave as a dictionary.

  A method with options may be given in JSON, as flags are text:
  --config.method='{"name": "race", "race": {"share": 0.05}}'.

  Raises:
    UserError: it is no ConfigDict, or the JSON is broken.
  """
  if not isinstance(value, ml_collections.ConfigDict):
    raise UserError(
      f"--config: get_config returned a {type(value).__name__}; it must return"
      " an ml_collections.ConfigDict"
    )
  config = value.to_dict()
  method = config.get("method")
  if isinstance(method, str) and method.lstrip().startswith("{"):
    try:
      config["method"] = json.loads(method)
    except json.JSONDecodeError as error:
      raise UserError(
        f"--config.method: {method!r} is no JSON ({error}); write it as"
        ' \'{"name": "race", "race": {"share": 0.05}}\''
      ) from error
  return config


def run(main: Callable[[list[str]], None]) -> None:
  """Parses the flags, calls main(argv) and exits; never returns.

  Exit codes: 0 done, 2 error of the user, 75 stopped by SIGTERM, 130 by Ctrl-C,
  69 as another process of the run is lost; main may exit with others.
  """
  try:
    if "--help" in sys.argv[1:] or "--helpfull" in sys.argv[1:]:
      with contextlib.suppress(SystemExit):  # absl's code would be 1
        app.run(main)  # prints the main module's docstring and flags
      sys.exit(0)
    with stop.watching():
      sys.exit(main(_parse(sys.argv)))
  except Interrupted as interrupted:
    print(f"{interrupted}. Run the same command again to go on.")
    exit_early(EXIT_TERMINATED)
  except KeyboardInterrupt:
    print("\nstopped by Ctrl-C. Run the same command again to go on.")
    exit_early(EXIT_INTERRUPTED)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    exit_early(error.exit_code)
  except Exception as error:
    if not (isinstance(error, OSError) and error.errno in _FULL):
      # As if nothing had caught it.
      sys.excepthook(type(error), error, error.__traceback__)
      exit_early(1)
    print(
      f"error: cannot write {error.filename or 'a file of the run'}:"
      f" {error.strerror}; free space or choose another --workdir, then run the"
      " same command again",
      file=sys.stderr,
    )
    exit_early(EXIT_ERROR)
