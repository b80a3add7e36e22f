"""What is to be known of an accelerator that is lent for minutes, in one go.

  python -m benchmarks.device --minutes=12 --out=DIR
  python -m benchmarks.device --parts=check,step --out=DIR
  python -m benchmarks.device --smoke --minutes=5        # to rehearse it

Parts, in this order, each a command of its own whose output is shown:

  target    what a compiler needs to know of the device, for compiling without
            it: target.bin (not on CPUs)
  check     all forms of a truncated ResNet-18 agree here: check/
  step      ResNet-18's training step, dense, factored, cut and PyTorch's:
            step.jsonl
  library   the dense and the cut step once more, their products by the GPU's
            library alone, without XLA's search: step_library.jsonl
  products  low-rank products against dense ones: products.jsonl
  cifar     rows of `experiments.cifar10 --variant=gpu --at_once`: cifar/

A part that has ended is not done again: done.jsonl lists them. Lines of results
are written as they come, so that nothing is lost where the time ends. At the
limit a part is stopped by SIGTERM, and the exit code is 75.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping

from absl import flags

from experiments.runs import make_folder
from maestro import cli
from maestro.errors import Interrupted, UserError

# What parts are given beside the environment.
_MORE = {"library": {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}}
_GRACE = 20.0  # seconds that a stopped part may take
_TARGET = """
import sys, jax
from jax.experimental import topologies
device = jax.devices()[0]
print(device.platform, device.device_kind, jax.__version__)
if device.platform != "cpu":
  found = topologies.get_attached_topology()
  open(sys.argv[1], "wb").write(found.serialize())
"""


def commands(out: pathlib.Path, smoke: bool, minutes: float) -> dict[str, list]:
  """The parts' commands, after `python`; `minutes` are those of cifar."""
  small = ["--smoke"] if smoke else []
  check = out / "check"
  step = ["--networks=resnet18", "--dtype=bfloat16", "--batch_size=512"]
  step += ["--rounds=5"]
  forms = ["--forms=dense,truncated25,torch_dense,factored"]
  forms += [f"--out={out / 'step.jsonl'}"]
  library = ["--forms=dense,truncated25"]
  library += [f"--out={out / 'step_library.jsonl'}"]
  cifar = ["--variant=gpu", "--at_once", f"--limit_minutes={minutes:.2f}"]
  cifar += [f"--workdir={out / 'runs'}", f"--out={out / 'cifar'}"]
  experiment = ["-m", "experiments.cifar10"]
  products = [f"--out={out / 'products.jsonl'}"]
  return {
    "target": ["-c", _TARGET, str(out / "target.bin")],
    "check": [*experiment, "--check_only", f"--out={check}", *small],
    "step": ["-m", "benchmarks.train_step", *step, *forms, *small],
    "library": ["-m", "benchmarks.train_step", *step, *library, *small],
    "products": ["-m", "benchmarks.products", *products, *small],
    "cifar": [*experiment, *cifar, *small],
  }


def finished(out: pathlib.Path) -> set[str]:
  """The parts that have ended well, from done.jsonl."""
  path = out / "done.jsonl"
  if not path.exists():
    return set()
  return {json.loads(line)["part"] for line in path.read_text().splitlines()}


def run(
  command: list[str], seconds: float, more: Mapping[str, str]
) -> int | None:
  """Runs a part, with `more` environment; None if it had to be stopped."""
  env = {**os.environ, **more}
  process = subprocess.Popen([sys.executable, *command], env=env)
  try:
    return process.wait(timeout=max(seconds, 1.0))
  except subprocess.TimeoutExpired:
    return None
  finally:  # this one may have been told to stop, too
    if process.poll() is None:
      process.terminate()
      try:
        process.wait(timeout=_GRACE)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(argv: list[str]) -> None:
  """Runs what is missing of the parts until the time is over."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  out = pathlib.Path(values.out)
  known = list(commands(out, values.smoke, 0.0))
  if unknown := [part for part in values.parts if part not in known]:
    raise UserError(f"--parts: {unknown} unknown; known: {', '.join(known)}")
  if values.minutes <= 0:
    raise UserError("--minutes: must be above 0")
  make_folder(out / "check", "--out")
  end = time.monotonic() + 60 * values.minutes - _GRACE
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))
  failed = []
  for part in known:
    if part not in values.parts or part in finished(out):
      continue
    left = end - time.monotonic()
    if left <= 0:
      raise Interrupted(f"no time is left for {part}; the same command goes on")
    command = commands(out, values.smoke, left / 60)[part]
    checked = out / "check" / "device_check.json"
    if part == "cifar" and checked.exists():  # which would do it again
      (out / "runs").mkdir(exist_ok=True)
      shutil.copy(checked, out / "runs")
    print(f"\n== {part}: {left / 60:.1f} minutes are left", flush=True)
    began = time.monotonic()
    grace = _GRACE if part == "cifar" else 0.0  # it stops by itself
    code = run(command, left + grace, _MORE.get(part, {}))
    took = time.monotonic() - began
    if code == 0:
      with (out / "done.jsonl").open("a") as file:
        file.write(json.dumps({"part": part, "seconds": round(took, 1)}) + "\n")
    elif code in (None, 75):
      raise Interrupted(f"{part} is not finished; the same command goes on")
    else:  # the next ones may work all the same
      failed.append(part)
    print(f"== {part}: {took:.0f} s", flush=True)
  shutil.rmtree(out / "compiled", ignore_errors=True)
  if failed:
    raise UserError(f"failed, see above: {', '.join(failed)}")


def define_flags() -> None:
  """Defines the command's flags."""
  parts = ["target", "check", "step", "library", "products", "cifar"]
  flags.DEFINE_list("parts", parts, "Some of the parts.")
  flags.DEFINE_float("minutes", 12.0, "Stop within so many minutes.")
  flags.DEFINE_string("out", "runs/device", "Folder of all that is kept.")
  flags.DEFINE_bool("smoke", False, "Everything small, to rehearse it.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
