"""Lengths of training: every unit, whole runs of fractions, bad input."""

import dataclasses

import pytest

from maestro.schema import ConfigError
from maestro.training import build
from maestro.training.config import clock_of, parse, periods_of
from maestro.training.durations import Clock, Duration

CLOCK = Clock(steps_per_epoch=8, batch_size=128, discover=30, settle=10)
SECTION = {"schedule": {"name": "constant", "learning_rate": 0.1}}
CONFIG = {
  "model": {"name": "mlp"},
  "data": {"name": "digits"},
  "optimizer": {"name": "sgd"},
  "batch_size": 128,
}


def read(text):
  return Duration.parse(text, "config.key")


@pytest.mark.parametrize(
  ("text", "steps"),
  [
    ("epochs:2.5", 20),
    ("steps:7", 7),
    ("examples:1280", 10),
    ("examples:1.28e3", 10),
    ("fraction:0.25", 10),
    ("fraction:1", 40),
    ("examples:1", 1),  # what is not nothing is at least one step
    ("epochs:0", 0),
  ],
)
def test_every_unit_is_turned_into_steps(text, steps):
  assert CLOCK.steps(read(text)) == steps


@pytest.mark.parametrize(
  "text",
  [
    *("", "7", "7 steps", "step:7", "steps:", "steps:x", "steps:-1"),
    *("steps:nan", "epochs:inf", "fraction:1.5"),
  ],
)
def test_what_is_no_length_is_refused_by_its_key(text):
  with pytest.raises(ConfigError, match=r"config\.key"):
    read(text)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.6, 0.99])
@pytest.mark.parametrize("other", ["epochs:10", "steps:77", "examples:1e5"])
def test_a_fraction_is_of_the_whole_run(share, other):
  part = read(f"fraction:{share}")
  start = Clock(8, 128)
  first, second = start.of(part, read(other)), start.of(read(other), part)
  for clock in (first, second):
    assert dataclasses.replace(clock, discover=0, settle=0) == start
  assert (first.discover, first.settle) == (second.settle, second.discover)
  assert first.settle == start.steps(read(other))
  assert abs(first.discover - share * first.total) <= 0.5 / (1 - share)


@pytest.mark.parametrize("parts", [(0.5, 0.5), (1.0, None)])
def test_something_must_say_how_long_a_run_is(parts):
  texts = ["epochs:1" if x is None else f"fraction:{x}" for x in parts]
  with pytest.raises(ConfigError, match=r"discover\.length"):
    Clock(8, 128).of(*map(read, texts))


@pytest.mark.parametrize(
  ("discover", "settle", "word"),
  [
    ("steps:0", "epochs:0", "no training"),
    ("fraction:0.5", "steps:0", "no training"),
    ("steps:1e12", "epochs:1", "lower them"),
    ("steps:1e6", "fraction:0.9999", "lower them"),
  ],
)
def test_a_run_has_a_sensible_number_of_steps(discover, settle, word):
  with pytest.raises(ConfigError, match=word):
    Clock(8, 128).of(read(discover), read(settle))


def test_a_phase_that_is_asked_for_has_a_step():
  clock = Clock(8, 128).of(read("fraction:0.001"), read("steps:10"))
  assert (clock.discover, clock.settle) == (1, 10)


@pytest.mark.parametrize("warmup", ["epochs:0.5", "steps:4"])
def test_a_warm_up_is_not_judged_before_an_epoch_has_a_length(warmup):
  section = {"name": "cosine", "learning_rate": 0.1, "warmup": warmup}
  c = config({"length": "steps:10", "schedule": section}, {"epochs": 1})
  build.check(c)
  assert build.make_training(c).clock.discover == 10
  section["warmup"] = "steps:10"
  with pytest.raises(ConfigError, match=r"schedule\.warmup.*leaves nothing"):
    build.make_training(c)


@pytest.mark.parametrize(
  "key", ["discover.length", "eval_every", "log_every", "checkpoint.every"]
)
def test_an_empty_length_is_refused_by_its_key(key):
  section, _, name = key.rpartition(".")
  given = {"epochs": 1} | ({name: ""} if section == "discover" else {})
  more = {name: ""} if not section else {}
  more |= {"checkpoint": {name: ""}} if section == "checkpoint" else {}
  with pytest.raises(ConfigError, match=rf"config\.{key}: ''"):
    c = config(given, {"epochs": 1}, **more)
    build.check(c)


def config(discover, settle, **more):
  sections = {"discover": SECTION | discover, "settle": SECTION | settle}
  return parse(CONFIG | sections | more)


def test_a_length_takes_the_place_of_epochs():
  c = config({"epochs": 3, "length": "steps:5"}, {"epochs": 2})
  assert clock_of(c, 8) == Clock(8, 128, discover=5, settle=16)


def test_a_phase_without_any_length_is_refused():
  with pytest.raises(ConfigError, match=r"config\.settle\.epochs: missing"):
    config({"epochs": 1}, {})
  with pytest.raises(ConfigError, match="no training"):
    config({"length": "steps:0"}, {"epochs": 0})


def test_periods_are_of_epochs_unless_another_unit_is_given():
  c = config({"epochs": 5, "shrink": True}, {"epochs": 5}, eval_every_epochs=2)
  p = periods_of(c, clock_of(c, 8))
  assert (p.log, p.evaluate, p.save) == (None, 16, 8)
  assert p.shrink == {"discover": 8}
  c = config(
    {"epochs": 5, "shrink": True, "shrink_every": "fraction:0.1"},
    {"epochs": 5},
    eval_every="steps:3",
    log_every="examples:256",
    checkpoint={"every": "epochs:0.5"},
  )
  p = periods_of(c, clock_of(c, 8))
  assert (p.log, p.evaluate, p.save) == (2, 3, 4)
  assert p.shrink == {"discover": 8}


@pytest.mark.parametrize("key", ["eval_every", "log_every"])
def test_a_period_of_nothing_is_refused_by_its_key(key):
  c = config({"epochs": 1}, {"epochs": 1}, **{key: "steps:0"})
  with pytest.raises(ConfigError, match=f"config.{key}"):
    periods_of(c, clock_of(c, 8))
