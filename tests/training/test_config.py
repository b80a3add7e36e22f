"""From a config to typed options: what is wrong is named by its key."""

import copy
from collections.abc import Mapping, Sequence

import pytest

from maestro.errors import UserError
from maestro.lowrank import Rule
from maestro.schema import ConfigError, bind, choose
from maestro.training.config import Config, FullPass, Phase, parse


def function(
  given,
  size: int,
  rate: float = 0.1,
  flag: bool = False,
  name: str | None = None,
  sizes: Sequence[int] = (),
  section: Mapping | None = None,
):
  """Has one parameter of each kind that a config can set."""


def test_a_fitting_section_comes_back_as_keyword_arguments():
  section = {
    "size": 3,
    "rate": 1,
    "flag": True,
    "sizes": [1, 2],
    "section": {"a": 1},
  }
  assert bind(function, section, "config.x", ("given",)) == section


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({}, "config.x.size: missing key"),
    ({"size": 1, "rat": 1.0}, "config.x.rat: unknown key.*'rate'.*known: size"),
    ({"size": 1, "given": 1}, "config.x.given: unknown key"),
    ({"size": 1.0}, "config.x.size: 1.0 is a float, expected int"),
    ({"size": True}, "config.x.size: True is a bool"),
    ({"size": "1"}, "config.x.size: '1' is a str"),
    ({"size": None}, "config.x.size: None is a NoneType"),
    ({"size": 1, "rate": "a"}, "config.x.rate"),
    ({"size": 1, "rate": True}, "config.x.rate"),
    ({"size": 1, "flag": 1}, "config.x.flag"),
    ({"size": 1, "name": 3}, "config.x.name"),
    ({"size": 1, "sizes": 3}, "config.x.sizes"),
    ({"size": 1, "sizes": (1, "a")}, "config.x.sizes"),
    ({"size": 1, "section": 3}, "config.x.section"),
  ],
)
def test_a_section_that_does_not_fit_names_its_key(section, message):
  with pytest.raises(ConfigError, match=message) as error:
    bind(function, section, "config.x", ("given",))
  assert isinstance(error.value, UserError)


def test_an_array_annotation_takes_numbers_and_no_text():
  import jax

  def optimizer(b1: jax.typing.ArrayLike = 0.9):
    return b1

  assert bind(optimizer, {"b1": 0.5}, "config.optimizer") == {"b1": 0.5}
  with pytest.raises(ConfigError, match=r"config.optimizer.b1.*str"):
    bind(optimizer, {"b1": "0.5"}, "config.optimizer")


def test_open_ended_functions_take_any_key():
  assert bind(lambda **kw: kw, {"a": 1}, "config.x") == {"a": 1}


def test_a_name_chooses_from_a_table():
  value, options = choose({"a": 1, "b": 2}, {"name": "b", "x": 3}, "config.y")
  assert (value, options) == (2, {"x": 3})


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({}, "config.y.name: missing key.*'alpha'"),
    ({"name": "alpa"}, "config.y.name: 'alpa' is unknown.*mean 'alpha'"),
    ({"name": "zzz"}, "config.y.name: 'zzz' is unknown.*'alpha', 'beta'"),
    ({"name": 3}, "config.y.name: 3 is unknown"),
    ({"name": None}, "config.y.name: None is unknown"),
  ],
)
def test_an_unknown_name_is_told_what_is_known(section, message):
  with pytest.raises(ConfigError, match=message):
    choose({"alpha": 1, "beta": 2}, section, "config.y")


SCHEDULE = {"name": "constant", "learning_rate": 0.1}
MINIMAL = {
  "model": {"name": "mlp"},
  "data": {"name": "digits"},
  "discover": {"epochs": 2, "schedule": SCHEDULE},
  "settle": {"epochs": 1, "schedule": SCHEDULE},
  "optimizer": {"name": "sgd"},
  "batch_size": 32,
}


def test_a_minimal_config_parses_with_typed_sections():
  c = parse(MINIMAL)
  assert isinstance(c, Config)
  assert isinstance(c.discover, Phase)
  assert c.settle.epochs == 1 and c.full_pass is None


def test_parsing_leaves_the_config_as_it_was():
  before = copy.deepcopy(MINIMAL)
  parse(MINIMAL)
  assert before == MINIMAL


def test_a_full_pass_is_parsed():
  assert parse(MINIMAL | {"full_pass": {"distill": 1}}).full_pass == FullPass(1)


@pytest.mark.parametrize("key", MINIMAL)
def test_a_missing_key_is_named(key):
  section = {k: v for k, v in MINIMAL.items() if k != key}
  with pytest.raises(ConfigError, match=f"config.{key}: missing key"):
    parse(section)


PHASE = MINIMAL["discover"]


@pytest.mark.parametrize(
  ("changes", "key"),
  [
    ({"batchsize": 1}, "batchsize"),
    ({"batch_size": 0}, "batch_size"),
    ({"batch_size": "32"}, "batch_size"),
    ({"seed": -1}, "seed"),
    ({"threshold": -0.1}, "threshold"),
    ({"eval_every_epochs": 0}, "eval_every_epochs"),
    ({"log_every_steps": 0}, "log_every_steps"),
    ({"steps_per_dispatch": 0}, "steps_per_dispatch"),
    ({"accumulate": 0}, "accumulate"),
    ({"remat": "dot"}, "remat: 'dot' is unknown.*'dots'"),
    ({"ema": 1.0}, "ema: 1.0 is out of range"),
    ({"ema": 0.0}, "ema: 0.0 is out of range"),
    ({"ema": 0.9, "method": "nested"}, r"ema: 0.9.* levels .* None"),
    ({"accumulate": 5}, r"accumulate: 5 .*batch_size=32; 4 do"),
    ({"accumulate": 64}, r"accumulate: 64 .*batch_size=32; 32 do"),
    ({"method": "maestra"}, "method"),
    ({"lasso": "l2"}, "lasso"),
    ({"discover": 3}, "discover"),
    ({"discover": PHASE | {"epochs": -1}}, "discover.epochs"),
    ({"discover": PHASE | {"lam": -1.0}}, "discover.lam"),
    ({"discover": PHASE | {"lam": float("nan")}}, "discover.lam"),
    ({"discover": PHASE | {"lam": float("inf")}}, "discover.lam"),
    ({"discover": PHASE | {"shrnk": True}}, "discover.shrnk"),
    ({"discover": {"epochs": 1}}, "discover.schedule"),
    (
      {"discover": PHASE | {"epochs": 0}, "settle": PHASE | {"epochs": 0}},
      "discover.epochs",
    ),
    ({"truncate": {"multiple_of": 0}}, "truncate.multiple_of"),
    ({"truncate": {"max_compilations": 4}}, "truncate.max_compilations"),
    ({"checkpoint": {"keep": 0}}, "checkpoint"),
    ({"checkpoint": {"every_epochs": 0}}, "checkpoint"),
    ({"full_pass": {"distill": 1.5}}, "full_pass"),
    ({"full_pass": {"temperature": 0.0}}, "full_pass"),
    ({"full_pass": {}, "loss": "squared_error"}, "full_pass.distill"),
    ({"rules": 3}, "rules"),
    ({"model": "mlp"}, "model"),
  ],
)
def test_a_value_out_of_range_names_its_key(changes, key):
  with pytest.raises(ConfigError, match=f"config.{key}"):
    parse(MINIMAL | changes)


def test_a_section_of_none_is_refused_with_its_key():
  with pytest.raises(ConfigError, match=r"config.discover"):
    parse(MINIMAL | {"discover": None})


def test_rules_are_parsed_in_order():
  sections = [{"path": "a", "decompose": False}, {"rank": 3}]
  found = parse(MINIMAL | {"rules": sections}).rules
  assert found == (Rule("a", decompose=False), Rule(rank=3))


@pytest.mark.parametrize(
  ("section", "key"),
  [({"paths": "a"}, "paths.*path"), ({"rank": "3"}, "rank")],
)
def test_a_bad_rule_is_named_by_its_index(section, key):
  with pytest.raises(ConfigError, match=rf"config.rules\[1\].{key}"):
    parse(MINIMAL | {"rules": [{"path": "a"}, section]})


def test_keys_of_older_runs_that_are_absent_may_be_none():
  old = parse(MINIMAL)
  assert (old.accumulate, old.remat, old.ema) == (1, "none", None)
  unset = dict.fromkeys(("accumulate", "remat", "ema"))
  assert parse(MINIMAL | unset) == old


def test_devices_of_older_runs_are_a_mesh_and_not_both():
  old = MINIMAL | {"num_devices": 3}
  assert parse(old).mesh.data == 3
  with pytest.raises(ConfigError, match=r"config\.num_devices: config\.mesh"):
    parse(old | {"mesh": {"data": 2}})
