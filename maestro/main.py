"""Trains a network from a config: python -m maestro.main --config=FILE.

The same command resumes an interrupted run; a finished one says so. SIGTERM
saves the state and exits with code 75.

  python -m maestro.main --config=configs/digits_od.py
  python -m maestro.main --config=configs/lenet_od.py:race \
      --config.budget=macs:0.25
  python -m maestro.main --config=configs/lenet_od.py:smoke --workdir=runs/try
  python -m maestro.main --config=configs/lenet_od.py --config.method=dense \
      --workdir=runs/lenet_dense
  python -m maestro.main --workdir=runs/try --evaluate

Variants of a config follow a colon, separated by commas (:paper,smoke); any key
of it can be set by --config.KEY=VALUE. The workdir gets config.json,
metrics.jsonl, checkpoints/, tensorboard/, results.json and report/, and with
--profile=STEPS profile/.

On many hosts or GPUs, start it once for each process, by a launcher (see
launch/README.md) or with --coordinator, --num_processes and --process_id; the
workdir must be one that all share. SIGTERM to any of them saves and stops all;
if one is lost, the rest end with code 69.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from maestro import cli
from maestro.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, with variants after a colon."
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory of the run; the default is runs/<name of the config>.",
)
_EVALUATE = flags.DEFINE_bool(
  "evaluate",
  False,
  "Evaluate the newest checkpoint of --workdir, without training.",
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Prepared data for --evaluate, if not in TFDS_DATA_DIR."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, for a run of many processes."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes the run has.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this one is, from 0.", lower_bound=0
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Let JAX find the other processes, as on a TPU pod."
)
_JOIN_TIMEOUT = flags.DEFINE_float(
  "join_timeout", 1800.0, "Seconds until all processes must be there.", 1.0
)
_LOST_TIMEOUT = flags.DEFINE_float(
  "lost_timeout", 60.0, "Seconds of silence that mean a lost process.", 1.0
)
_PROFILE = flags.DEFINE_integer(
  "profile",
  None,
  "Steps to trace into the workdir's profile/, for XProf.",
  lower_bound=1,
)
_CACHE = flags.DEFINE_string(
  "compilation_cache",
  None,
  "Directory of compiled programs, which later runs take from it; the default"
  " is JAX_COMPILATION_CACHE_DIR, or none.",
)
cli.define_allow_import()


def default_workdir(config: str) -> pathlib.Path:
  """Turns "configs/lenet_od.py:paper,smoke" into runs/lenet_od_paper,smoke."""
  file, _, variants = config.partition(":")
  name = pathlib.Path(file).stem
  return pathlib.Path("runs") / "_".join([name, *filter(None, [variants])])


def main(argv: list[str]) -> None:
  """Trains, resumes or evaluates, as the flags say."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  if _CONFIG.value is None and not (_EVALUATE.value and _WORKDIR.value):
    raise UserError("--config=FILE is missing, e.g. configs/digits_od.py")
  workdir = _WORKDIR.value
  if workdir == "":
    raise UserError("--workdir= is empty; name a directory, or leave it out")
  if workdir is None:
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = default_workdir(name)
  # Imported here, so that --help and a mistyped flag answer at once.
  from maestro.parallel import processes
  from maestro.runs import compiler

  if _CACHE.value is not None:
    compiler.use_cache(_CACHE.value)
  if _EVALUATE.value and (_COORDINATOR.value or _DISTRIBUTED.value):
    raise UserError(
      "--evaluate: one process does it; leave --coordinator and --distributed"
      " out"
    )
  if _EVALUATE.value:
    from maestro.training.loop import evaluate_workdir

    print(json.dumps(evaluate_workdir(workdir, _DATA_DIR.value), indent=1))
    return
  processes.join(
    processes.Join(
      coordinator=_COORDINATOR.value,
      num_processes=_NUM_PROCESSES.value,
      process_id=_PROCESS_ID.value,
      distributed=_DISTRIBUTED.value,
      join_timeout=_JOIN_TIMEOUT.value,
      lost_timeout=_LOST_TIMEOUT.value,
    )
  )
  with processes.ending():
    from maestro.training.loop import train

    more = {} if _PROFILE.value is None else {"profile": _PROFILE.value}
    train(cli.config_of(_CONFIG.value), workdir, **more)


if __name__ == "__main__":
  cli.run(main)
