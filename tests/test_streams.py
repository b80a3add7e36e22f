"""Named streams: no two purposes of a run draw the same numbers."""

import itertools

import jax
import numpy as np
import pytest

from maestro import streams
from maestro.streams import STREAMS, stream


def data(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_all_streams_of_a_run_differ(seed):
  """Also in the keys that are derived from them, by either way."""
  parents = [stream(seed, name) for name in STREAMS if name != "statistics"]
  parents += [stream(seed, "statistics", k) for k in range(50)]
  parents += [streams.order(seed, epoch) for epoch in range(300)]
  keys = [data(key) for key in parents]
  # Names count on from the same root: what they derive must not meet either.
  for key in parents[:60]:
    keys += [data(k) for k in jax.random.split(key, 3)]
    keys += [data(jax.random.fold_in(key, i)) for i in range(3, 20)]
  assert len(set(keys)) == len(keys)


def test_seeds_differ_and_no_option_changes_a_stream():
  firsts = {data(stream(seed, name)) for seed in range(9) for name in STREAMS}
  assert len(firsts) == 9 * len(STREAMS)
  for name, index in itertools.product(STREAMS, (0, 7)):
    with jax.default_prng_impl("rbg"):
      other = data(stream(3, name, index))
    assert other == data(stream(3, name, index))


def test_an_unknown_stream_is_an_error():
  with pytest.raises(KeyError):
    stream(0, "weights")
