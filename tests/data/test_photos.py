"""Photographs: the part that is seen, and what stands for broken ones."""

import io
import math
import types

import numpy as np
import pytest
from PIL import Image

from maestro.data import DataError, photos


def plane(width, height):
  """A picture whose red is x, and whose green is y, in 256ths of its size."""
  y, x = np.mgrid[:height, :width]
  blue = np.full_like(x, 80)
  channels = (256 * x // width, 256 * y // height, blue)
  return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encode(image, form="JPEG", **options):
  file = io.BytesIO()
  image.save(
    file, form, **({"quality": 97} if form == "JPEG" else {}), **options
  )
  return file.getvalue()


BROKEN = encode(plane(64, 48))[:600]


class Source:
  """Stands for a prepared split of encoded photographs."""

  dataset_info = types.SimpleNamespace(name="few", version="1", splits={})

  def __init__(self, encoded):
    self.encoded = encoded

  def __getitems__(self, rows):
    return [{"image": self.encoded[i], "label": i} for i in rows]


def some(encoded, start=0):
  return photos.Photos(Source(encoded), "few", start, len(encoded) - start)


# --- which part is seen ---


@pytest.mark.quick(4)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(
  ("width", "height", "size"),
  [(97, 61, 32), (400, 300, 32), (1201, 800, 64), (40, 30, 64), (33, 900, 32)],
)
def test_a_part_is_where_its_box_says(form, width, height, size):
  """Also where a JPEG is decoded at a fraction of its size."""
  encoded, random = encode(plane(width, height), form), np.random.default_rng(0)
  for _ in range(20):
    w, h = random.uniform(0.3, 1, 2) * (width, height)
    left, top = random.uniform(0, 1, 2) * (width - w, height - h)
    box = (left, top, left + w, top + h)
    out = photos.crop(encoded, lambda *_, box=box: box, size)
    assert out.shape == (size, size, 3) and out.dtype == np.uint8
    places = (np.arange(size) + 0.5) / size
    inner = slice(size // 8, -size // 8)  # away from what edges repeat
    x = 256 * (left + places * w) / width - 0.5
    y = 256 * (top + places * h) / height - 0.5
    wide, high = 256 / width + 3, 256 / height + 3  # a pixel, and JPEG's own
    assert np.abs(out[inner, inner, 0] - x[None, inner]).max() < wide
    assert np.abs(out[inner, inner, 1] - y[inner, None]).max() < high


def test_an_evaluation_sees_the_middle():
  assert photos.centre(512, 256) == (144, 16, 368, 240)
  assert photos.centre(256, 512) == (16, 144, 240, 368)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 300)])
def test_random_parts_follow_their_law(width, height):
  """Against areas and aspects that are drawn until they fit, all at once."""
  random, n = np.random.default_rng(0), 20_000
  boxes = np.array([photos.random_box(random, width, height) for _ in range(n)])
  left, top, right, bottom = boxes.T
  assert left.min() >= 0 and top.min() >= 0
  assert right.max() <= width and bottom.max() <= height
  w, h = right - left, bottom - top
  other = np.random.default_rng(1)
  area = width * height * other.uniform(0.08, 1, 100_000)
  aspect = np.exp(other.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
  a, b = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
  fits = (a <= width) & (b <= height)
  share = lambda x: x / (width * height)  # noqa: E731
  assert share(w * h).mean() == pytest.approx(share((a * b)[fits]).mean(), 0.02)
  assert share(w * h).std() == pytest.approx(
    share((a * b)[fits]).std(), abs=0.01
  )
  found, expected = np.log(w / h), np.log((a / b)[fits])
  assert found.mean() == pytest.approx(expected.mean(), abs=0.01)
  assert found.std() == pytest.approx(expected.std(), rel=0.03)
  # Anywhere, alike.
  loose = (w < width) & (h < height)
  at = left[loose] / (width - w[loose]), top[loose] / (height - h[loose])
  for places in at:
    assert places.mean() == pytest.approx(0.5, abs=0.02)
    assert places.min() == 0 and places.max() == 1


@pytest.mark.parametrize(("width", "height"), [(2000, 30), (30, 2000)])
def test_of_what_no_part_fits_the_middle_is_taken(width, height):
  found = photos.random_box(np.random.default_rng(0), width, height)
  left, top, right, bottom = found
  assert (left + right, top + bottom) == (width, height)
  assert math.isclose(
    (right - left) / (bottom - top), 4 / 3 if width > height else 3 / 4
  )


def test_every_second_photograph_is_mirrored_and_a_seed_says_which():
  encoded = encode(plane(64, 64))
  draws = [photos.augmented(encoded, 16, (5, i)) for i in range(200)]
  mirrored = [x[8, 0, 0] > x[8, -1, 0] for x in draws]
  assert 70 < sum(mirrored) < 130
  np.testing.assert_array_equal(draws[3], photos.augmented(encoded, 16, (5, 3)))
  others = [photos.augmented(encoded, 16, (6, i)) for i in range(200)]
  differ = [np.any(x != y) for x, y in zip(draws, others, strict=True)]
  assert sum(differ) > 190 and np.any(draws[0] != draws[1])


# --- what can be decoded ---

FORMS = {
  "grey": (plane(60, 40).convert("L"), "JPEG"),
  "cmyk": (plane(60, 40).convert("CMYK"), "JPEG"),
  "png": (plane(60, 40), "PNG"),
  "transparent": (plane(60, 40).convert("RGBA"), "PNG"),
  "palette": (plane(60, 40).convert("P"), "PNG"),
  "one bit": (plane(60, 40).convert("1"), "PNG"),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_become_rgb(form):
  image, kind = FORMS[form]
  out = photos.crop(encode(image, kind), photos.centre, 16)
  expected = image.convert("RGB").resize(
    (16, 16), Image.Resampling.BILINEAR, box=photos.centre(60, 40)
  )
  assert out.shape == (16, 16, 3)
  assert np.abs(out.astype(int) - np.asarray(expected).astype(int)).max() < 12


NOTHING = {
  "half": BROKEN,
  "empty": b"",
  "text": b"not found",
  "header": BROKEN[:20],
  "png": encode(plane(64, 48), "PNG")[:120],
}


@pytest.mark.parametrize("kind", NOTHING)
def test_the_next_one_stands_for_what_cannot_be_decoded(kind):
  encoded = [encode(plane(64, 48)) for _ in range(6)]
  encoded[2] = encoded[3] = encoded[5] = NOTHING[kind]
  read = photos.Augmented(some(encoded), 16)
  out = read(np.array([0, 2, 5]), np.array([7, 8, 9]), 1)
  assert out["targets"].tolist() == [0, 4, 0] and out["replaced"] == 2
  np.testing.assert_array_equal(
    out["inputs"][1], photos.augmented(encoded[4], 16, (1, 8))
  )


def test_if_nothing_can_be_decoded_it_is_said():
  read = photos.Augmented(some([BROKEN] * 5), 16)
  with pytest.raises(DataError, match=r"none of 100 .* of few"):
    read(np.array([1]), np.array([0]), 0)


def test_what_is_evaluated_on_is_grey_if_unreadable(caplog):
  encoded = [encode(plane(64, 48)) for _ in range(6)]
  encoded[3] = BROKEN
  pixels = photos.Pixels(some(encoded, 1), 16)
  labels = photos.Labels(some(encoded, 1))
  assert pixels.shape == (5, 16, 16, 3) and pixels.ndim == 4
  found = [pixels[0:5], pixels[np.array([2, 0])], pixels[2:3]]
  assert pixels.unreadable == {2}
  assert [r.message for r in caplog.records if "photograph 3" in r.message]
  assert len(caplog.records) == 1  # told once
  assert np.all(found[0][2] == 128) and np.all(found[2] == 128)
  np.testing.assert_array_equal(found[0][[2, 0]], found[1])
  np.testing.assert_array_equal(
    found[0][1], photos.crop(encoded[2], photos.centre, 16)
  )
  assert labels[1:3].tolist() == [2, 3]
  assert labels[np.array([4, 0])].tolist() == [5, 1]


def test_a_split_is_never_read_whole_by_accident():
  few = some([encode(plane(8, 8))] * 3)
  for rows in (photos.Pixels(few, 8), photos.Labels(few)):
    with pytest.raises(TypeError, match="whole"):
      np.asarray(rows)
    assert len(rows) == 3
