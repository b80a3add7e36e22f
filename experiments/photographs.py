"""A synthetic ImageNet, to rehearse with: photographs of 1,000 classes.

  python -m experiments.photographs --out=DIR              # 3,000 and 500
  python -m experiments.photographs --out=DIR --broken=3   # 3 cannot be read
  TFDS_DATA_DIR=DIR python -m maestro.main --config=configs/imagenet_od.py:smoke

Writes DIR/imagenet2012/5.1.0 as tensorflow-datasets prepares the real one, in
array_record format, without TensorFlow: JPEGs of 300 to 640 pixels a side,
about as many bytes each as ImageNet's; one is a PNG, one is CMYK and one is
grey, as there. Each shows waves whose colours, direction and length are its
class's, under noise, so that a network can learn from it. Nothing that it
learns says anything of ImageNet.
"""

import io
import json
import pathlib
import time
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image

from experiments import runs
from maestro import cli
from maestro.errors import UserError

NAME, VERSION, CLASSES = "imagenet2012", "5.1.0", 1000
SIDES = (300, 640)  # of the shorter and the longer one, at most


def photograph(index: int, label: int) -> Image.Image:
  """Draws one: a function of its arguments."""
  random = np.random.default_rng([index, label])
  width, height = (int(n) for n in random.integers(*SIDES, size=2))
  turn, length, hue = label % 10, label // 10 % 10, label // 100
  angle = np.pi * (turn + random.uniform(-0.2, 0.2)) / 10
  y, x = np.mgrid[:height, :width] / 64
  phase = x * np.cos(angle) + y * np.sin(angle)
  wave = np.sin((length + 2) * phase + random.uniform(0, 2 * np.pi))
  colour = 0.5 + 0.5 * np.cos(2 * np.pi * (hue / 10 + np.arange(3) / 3))
  pixels = 128 + 70 * wave[..., None] * colour + 40 * (colour - 0.5)
  pixels += random.normal(0, 12, pixels.shape)
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(index: int, label: int, form: str = "jpeg") -> bytes:
  """Encodes one as "jpeg", "png", "cmyk" or "grey"; "broken" is half a JPEG."""
  image, file = photograph(index, label), io.BytesIO()
  if form in ("cmyk", "grey"):
    image = image.convert({"cmyk": "CMYK", "grey": "L"}[form])
  image.save(file, "PNG" if form == "png" else "JPEG", quality=90)
  content = file.getvalue()
  return content[: len(content) // 2] if form == "broken" else content


def split(count: int, first: int, broken: int) -> Iterator[tuple[bytes, int]]:
  """Yields the photographs of a split and their classes, in random order.

  Args:
    count: how many.
    first: number of the first one, unlike any of another split.
    broken: how many cannot be read, spread over the split.
  """
  order = np.random.default_rng(first).permutation(count)
  forms = {1: "png", 2: "cmyk", 3: "grey"}
  step = count // broken if broken else count + 1
  for i, j in enumerate(order):
    form = forms.get(i, "jpeg")
    if i % step == step - 1 and i // step < broken:
      form = "broken"
    label = int(j) % CLASSES
    yield encoded(first + i, label, form), label


def write(
  root: pathlib.Path, train: int, validation: int, broken: int = 0
) -> pathlib.Path:
  """Writes the set below a folder; returns its directory.

  Raises:
    UserError: it is there already.
  """
  import tensorflow_datasets as tfds
  from array_record.python import array_record_module

  directory = root / NAME / VERSION
  if directory.exists():
    raise UserError(f"--out: {directory} is there already; name another folder")
  unfinished = directory.with_name(f"{VERSION}.incomplete")
  runs.make_folder(unfinished, "--out")
  features = tfds.features.FeaturesDict(
    {
      "file_name": tfds.features.Text(),
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(num_classes=CLASSES),
    }
  )
  features.save_config(unfinished)
  sizes, said = {"train": train, "validation": validation}, time.monotonic()
  for name, count in sizes.items():
    path = unfinished / f"{NAME}-{name}.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    found = split(
      count, 0 if name == "train" else train, broken if name == "train" else 0
    )
    for i, (content, label) in enumerate(found):
      example = {
        "file_name": f"{name}_{i:08d}.JPEG",
        "image": io.BytesIO(content),
        "label": label,
      }
      writer.write(features.serialize_example(features.encode_example(example)))
      if time.monotonic() - said > 5:
        said = time.monotonic()
        print(f"{name}: {i + 1} of {count}", flush=True)
    writer.close()
  info = {
    "name": NAME,
    "version": VERSION,
    "fileFormat": "array_record",
    "splits": [
      {
        "name": name,
        "shardLengths": [str(count)],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      }
      for name, count in sizes.items()
    ],
  }
  (unfinished / "dataset_info.json").write_text(json.dumps(info))
  unfinished.rename(directory)
  return directory


def define_flags() -> None:
  """Defines the command line; not at import, as flags are one global set."""
  flags.DEFINE_string("out", None, "Folder that gets the set.", required=True)
  flags.DEFINE_integer("train", 3000, "Photographs to train on.", 10)
  flags.DEFINE_integer("validation", 500, "Photographs to test on.", 10)
  flags.DEFINE_integer("broken", 0, "Of those to train on, half a file.", 0)
  flags.DEFINE_bool("smoke", False, "40 and 20 photographs.")


def main(argv: list[str]) -> None:
  """Writes the set, and says how to use it."""
  if argv[1:]:
    raise UserError(f"unexpected arguments: {' '.join(argv[1:])}")
  values = flags.FLAGS
  train, validation = values.train, values.validation
  if values.smoke:
    train, validation = 40, 20
  if values.broken > train // 4:
    raise UserError(
      f"--broken: {values.broken} of {train} is too many; a quarter at most"
    )
  root = pathlib.Path(values.out)
  directory = write(root, train, validation, values.broken)
  size = sum(path.stat().st_size for path in directory.iterdir())
  print(
    f"{directory}: {train} and {validation} photographs, {size / 1e6:.0f} MB"
  )
  print(
    f"TFDS_DATA_DIR={root} python -m maestro.main"
    " --config=configs/imagenet_od.py:smoke"
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
