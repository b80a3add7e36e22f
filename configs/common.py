"""What the configs share: the keys of every run, and the recipes for CIFAR-10.

A config file sets what is its own on `base()` and locks it. It runs this file,
its neighbour, by path: configs are read from any directory, and are no package.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict, config_dict


def variants_of(arg: str, known: Sequence[str], one_of: Sequence[str] = ()):
  """Splits "paper,smoke" into a set of names.

  Args:
    arg: names separated by commas.
    known: the names that there are, beside `one_of`.
    one_of: names of which at most one can be given.

  Raises:
    ValueError: a name is unknown, or two exclude each other.
  """
  names = {name for name in arg.split(",") if name}
  if unknown := names - {*one_of, *known}:
    text = ", ".join((*one_of, *known))
    raise ValueError(f"unknown variants {sorted(unknown)}; known: {text}")
  if len(names & {*one_of}) > 1:
    raise ValueError(f"choose one of the variants {', '.join(one_of)}")
  return names


def base() -> ConfigDict:
  """A config with neither model nor data: discover, then settle, by SGD.

  Lengths are in epochs; `length`, `every` and the like, such as "steps:500" or
  "fraction:0.1", take their place.
  """
  c = ConfigDict()
  c.seed = 0
  c.method = "maestro"  # see maestro/methods/table.py, e.g. "dense"
  c.budget = config_dict.placeholder(str)  # such as "macs:0.25"
  c.loss = "cross_entropy"
  c.label_smoothing = config_dict.placeholder(float)
  c.batch_size = 128
  c.optimizer = ConfigDict(
    {
      "name": "sgd",
      "momentum": 0.9,
      "weight_decay": 0.0,
      "clip_norm": config_dict.placeholder(float),
    }
  )
  c.rules = ({"path": ".*"},)
  c.lasso = "hierarchical"
  c.lasso_cost = config_dict.placeholder(str)
  c.threshold = 1e-5
  c.discover = ConfigDict(
    {
      "epochs": 0,
      "length": config_dict.placeholder(str),
      "schedule": {"name": "constant", "learning_rate": 0.1},
      "lam": 0.0,
      "sampler": {"name": "one_layer", "over": "pairs"},
      "shrink": True,
      "shrink_every": config_dict.placeholder(str),
    }
  )
  c.settle = ConfigDict(
    {
      "epochs": 0,
      "length": config_dict.placeholder(str),
      "schedule": {"name": "constant", "learning_rate": 0.1},
      "lam": 0.0,
      "sampler": {"name": "full"},
      "shrink": False,
      "shrink_every": config_dict.placeholder(str),
    }
  )
  c.truncate = ConfigDict(
    {"max_compilations": 8, "min_saving": 0.25, "multiple_of": 1}
  )
  c.checkpoint = ConfigDict(
    {"every_epochs": 1, "every": config_dict.placeholder(str), "keep": 2}
  )
  c.eval_every_epochs = 1
  c.eval_every = config_dict.placeholder(str)
  c.log_every_steps = config_dict.placeholder(int)
  c.log_every = config_dict.placeholder(str)
  c.init_from = config_dict.placeholder(str)
  c.accumulate = config_dict.placeholder(int)
  c.remat = config_dict.placeholder(str)  # such as "dots"
  c.deterministic = config_dict.placeholder(bool)
  c.ema = config_dict.placeholder(float)
  c.mesh = ConfigDict({"data": -1, "fsdp": 1, "model": 1})
  c.placement = ()
  return c


WAYS = ("race", "nested", "maestro")  # at most one; see `go`


def go(
  c: ConfigDict, variants: set[str], warm_up: int, default: str = "maestro"
) -> None:
  """Trains for a budget (race), for any size (nested) or by a lambda (maestro).

  All in as many epochs.

  Args:
    c: a config of maestro, whose settle phase has a schedule of its own.
    variants: of which those in WAYS and smoke are applied.
    warm_up: epochs of the dense network before race and nested.
    default: of WAYS, if none is asked for.

  Raises:
    ValueError: two are asked for.
  """
  chosen = sorted(variants & {*WAYS}) or [default]
  if len(chosen) > 1:
    raise ValueError(f"choose one of the variants {', '.join(WAYS)}")
  if chosen == ["maestro"]:
    return
  c.method = chosen[0]
  if c.method == "race":
    c.budget = "macs:0.4"
  if "smoke" in variants:
    return
  c.settle.epochs += c.discover.epochs - warm_up
  c.discover.epochs = warm_up


def one_line(c: ConfigDict, peak: float, warmup: str | None = None) -> None:
  """Sets rates that fall from a peak to 0 over both phases, along one line.

  Wherever the first one ends: that is a part of the run, not of its recipe.

  Args:
    c: a config whose phases have their epochs.
    peak: the highest learning rate.
    warmup: how long it rises to it at first, such as "steps:200"; the line then
      begins there, and has a bend where the phases meet.
  """
  left = c.settle.epochs / (c.discover.epochs + c.settle.epochs)
  line = {"name": "linear", "learning_rate": peak}
  c.discover.schedule = ConfigDict(line | {"final_fraction": left})
  if warmup is not None:
    c.discover.schedule.warmup = warmup
  c.settle.schedule = ConfigDict(line | {"learning_rate": peak * left})


RECIPES = ("paper", "gpu", "short")  # at most one; see `cifar10`


def cifar10(variants: set[str]) -> ConfigDict:
  """A config for CIFAR-10, without a model: 180 + 120 epochs, or a recipe.

  Of `variants`, those in RECIPES and smoke are applied; the model's dtype and
  width are the config file's.
  """
  c = base()
  c.model = ConfigDict({"dtype": config_dict.placeholder(str), "width": 64})
  c.data = ConfigDict(
    {
      "name": "cifar10",
      "val_examples": 5000,
      "train_examples": config_dict.placeholder(int),
      "data_dir": config_dict.placeholder(str),
    }
  )
  c.optimizer.nesterov = False
  c.optimizer.weight_decay = 1e-4
  c.threshold = 1e-7
  c.discover.epochs = 180
  c.discover.lam = 16e-6
  c.settle.epochs = 120
  c.settle.schedule.name = "cosine"
  # Cuts pay for their compilation many times in a run of 300 epochs.
  c.truncate = ConfigDict(
    {"max_compilations": 24, "min_saving": 0.1, "multiple_of": 8}
  )
  c.batch_norm_examples = 4096
  c.checkpoint.every_epochs = 5
  c.eval_every_epochs = 5
  if "paper" in variants:
    c.discover.epochs = 300
    c.settle.epochs = 0
    c.discover.schedule = ConfigDict(
      {
        "name": "piecewise",
        "learning_rate": 0.1,
        "boundaries": (0.5, 0.75),
        "factor": 0.1,
      }
    )
    c.data.val_examples = 500  # nothing is chosen; the paper holds none back
  if "gpu" in variants:
    c.model.dtype = "bfloat16"
    c.batch_size = 512
    # 49,500 images are 96 steps: 16 of them go in one dispatch.
    c.data.val_examples = 500
    c.optimizer.nesterov = True
    c.optimizer.weight_decay = 5e-4
    c.discover.epochs = 24
    c.settle.epochs = 16
    # One curve over both phases; it is high while ranks are found.
    c.discover.schedule = ConfigDict(
      {
        "name": "cosine",
        "learning_rate": 0.4,
        "warmup_epochs": 2.0,
        "final_fraction": 0.5,
      }
    )
    c.settle.schedule.learning_rate = 0.2
    c.threshold = 1e-4  # above the floor, see docs/method.md
    # No cut before settling: it saves less than its compilations take.
    c.truncate.min_saving = 1.0
    c.checkpoint.every_epochs = 12
    c.eval_every_epochs = 8
  if "short" in variants:
    c.batch_size = 32
    c.data.train_examples = 3200
    c.data.val_examples = 512
    c.discover.epochs = 3
    c.settle.epochs = 1
    c.discover.schedule.learning_rate = 0.05
    c.settle.schedule = ConfigDict({"name": "constant", "learning_rate": 0.005})
    c.discover.lam = 1e-3
    c.threshold = 1e-3
    c.truncate.max_compilations = 12
    c.truncate.min_saving = 0.3
    c.truncate.multiple_of = 1
    c.batch_norm_examples = 512
    c.checkpoint.every_epochs = 1
    c.eval_every_epochs = 4
    c.log_every_steps = 10
  if "smoke" in variants:
    c.model.width = 8
    c.batch_size = 64
    c.data.train_examples = 512
    c.data.val_examples = 128
    c.batch_norm_examples = 128
    c.discover.epochs = 1
    c.settle.epochs = min(c.settle.epochs, 1)
    if "warmup_epochs" in c.discover.schedule:
      c.discover.schedule.warmup_epochs = 0.0
  return c


def ways(c: ConfigDict, variants: set[str]) -> None:
  """Applies race or nested to a config of `cifar10`.

  Raises:
    ValueError: with paper, which does not settle.
  """
  if variants & {"race", "nested"} and not c.settle.epochs:
    raise ValueError(
      "race and nested train their factors in settle: not with paper"
    )
  epochs = c.discover.epochs + c.settle.epochs
  part = 2 if "nested" in variants else 5
  go(c, variants, warm_up=max(epochs // part, 1))
