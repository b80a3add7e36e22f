"""A budget's text becomes one exact number, wherever it is used."""

import fractions

import numpy as np
import pytest

from maestro.cost.budget import Budget


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_a_limit_is_the_floor_of_what_is_written(digits):
  rng = np.random.default_rng(digits)
  scale = 10**digits
  for number in rng.integers(1, scale, 300):
    text = f"macs:0.{number:0{digits}d}"
    exact = fractions.Fraction(int(number), scale)
    for dense in (scale, 281_640, 555_422_720, 7 * scale + 1, 10**15 + 1):
      limit = Budget.parse(text).limit(dense)
      assert limit == exact * dense // 1
      # As an export names it and `maestro.load` reads it.
      assert Budget.parse(str(Budget.parse(text))).limit(dense) == limit
  assert Budget.parse("macs:1").limit(12345) == 12345
