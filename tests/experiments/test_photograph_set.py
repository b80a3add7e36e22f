"""The synthetic ImageNet: what it holds, and what its command refuses."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import photographs
from maestro.errors import UserError


def test_a_photograph_is_a_function_of_its_number_and_class():
  one, same = (photographs.encoded(3, 41) for _ in range(2))
  assert one == same
  assert one != photographs.encoded(4, 41) and one != photographs.encoded(3, 42)
  width, height = photographs.photograph(3, 41).size
  assert min(width, height) >= 300 and max(width, height) < 640


def test_classes_look_different_and_their_photographs_alike():
  """Mean colours, as the simplest of networks sees them."""

  def colour(index, label):
    pixels = np.asarray(photographs.photograph(index, label), float)
    return pixels.reshape(-1, 3).std(axis=0)

  of = {label: [colour(i, label) for i in (1, 2)] for label in (0, 350, 600)}
  within = max(np.abs(a - b).max() for a, b in of.values())
  first = [a for a, _ in of.values()]
  between = min(np.abs(first[i] - first[j]).max() for i, j in ((0, 1), (1, 2)))
  assert between > 3 * within


def test_a_split_has_other_forms_and_as_many_broken_ones_as_asked():
  found = list(photographs.split(20, 0, broken=3))
  assert len({label for _, label in found}) == 20
  modes, broken = [], 0
  for content, _ in found:
    image = Image.open(io.BytesIO(content))
    modes.append((image.format, image.mode))
    try:
      image.load()
    except OSError:
      broken += 1
  assert broken == 3
  assert {("PNG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L")} < {*modes}


def test_what_is_there_is_not_written_over(tmp_path):
  photographs.write(tmp_path, 10, 10)
  with pytest.raises(UserError, match="is there already"):
    photographs.write(tmp_path, 10, 10)


@pytest.mark.parametrize(
  ("flags", "text"),
  [
    (["--broken=30", "--train=40"], "--broken: 30 of 40 is too many"),
    (["more"], "unexpected arguments: more"),
  ],
)
def test_bad_flags_are_told(flags, text, tmp_path):
  command = [sys.executable, "-m", "experiments.photographs"]
  done = subprocess.run(
    [*command, f"--out={tmp_path}", *flags], capture_output=True, text=True
  )
  assert done.returncode == 2 and text in done.stderr
  assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
