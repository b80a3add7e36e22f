"""Low-rank training methods, each written out as a choice of small pieces.

A method says how a dense kernel becomes factors, when, at which ranks, what is
sampled, penalised and shrunk, and what is trained. The pieces are functions in
`maestro.methods`; the loop knows them and no method. config.method is a name in
`METHODS`, or that name and pieces that differ:

  method: pufferfish
  method: {name: pufferfish, ranks: {name: fraction, fraction: 0.5}}

docs/adding_a_method.md adds one. Defaults are the papers' where docstrings say
so, and otherwise ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from maestro.schema import ConfigError, Weight, bind, choose

# What a piece looks at; where there is none of it in training, it is refused.
FACTORS, KERNELS = {"needs": "factors"}, {"needs": "kernels"}


@dataclasses.dataclass(frozen=True)
class Method:
  """The pieces of a method; sections are {"name": ..., options}.

  Attributes:
    decompose: when the kernels that config.rules select become factors:
      "start"; "settle", at the start of the settle phase, with a fresh
      optimizer; "end", after the last step; None is never.
    decomposer: how, see `methods.DECOMPOSERS`.
    ranks: at which ranks, see `methods.RANK_RULES`, rounded up; at most those
      of the rules.
    budget: "macs:0.5" or "params:0.5" scales all ranks by one factor, to the
      largest ones at which the final network costs at most this fraction of
      the dense one, see `methods.fit_budget`. Applies at decomposition; where
      that is at the start, and ranks are sampled or shrunk, at the end of
      discover. A race takes "bytes:0.5" and "latency_ms:4" too.
    sampler: of ranks in each step, see `sampling.SAMPLERS`; {"name": "phase"}
      is config.discover.sampler and config.settle.sampler; None samples none.
    shrink: how ranks are lowered after each epoch of a phase with `shrink`,
      see `methods.SHRINKERS`; None never.
    penalty: what is added to the loss, see `methods.PENALTIES`.
    proximal: takes the group lasso as an exact step of the optimizer, see
      `maestro.methods.prox`, instead of in the loss.
    lasso_cost: "macs" or "params": groups of the lasso count what a component
      of their layer costs, see `controllers.component_weights`; None is
      config.lasso_cost.
    controller: moves the weight of the lasso in discover so that the cost of
      the ranks comes to `budget`, see `maestro.methods.controllers`; None keeps
      it.
    lam: weight of the penalty (and of the projection's) in both phases; None
      is config.discover.lam and config.settle.lam. Where it is a step after the
      optimizer's, with momentum mu, that has the weight lam / (1 - mu), so that
      lam means the same as in the loss.
    project: every so many steps, dense kernels are cut to the ranks that
      `ranks` and `budget` give then, see `methods.Projection`; None is off.
    race: profiles for the budget are proposed at the start of settle, by
      several scores, and trained side by side for some steps; the best one goes
      on, see `maestro.methods.race`. None decomposes at `ranks`.
    nested: settle trains a chain of levels, nested profiles for several
      budgets, so that one network serves all of them, see
      `maestro.methods.nested`. None trains one size.
    switch: ends discover early, see `methods.SWITCHES`; settle is longer by as
      much. None keeps config.discover.epochs.
    trainable: "all", or "factors", to freeze all parameters but factors once
      there are any.
  """

  name: str
  decompose: Literal["start", "settle", "end"] | None = None
  decomposer: Mapping = dataclasses.field(default_factory=lambda: SVD)
  ranks: Mapping = dataclasses.field(default_factory=lambda: {"name": "full"})
  budget: str | None = None
  sampler: Mapping | None = dataclasses.field(default=None, metadata=FACTORS)
  shrink: str | None = dataclasses.field(default=None, metadata=FACTORS)
  penalty: str | None = dataclasses.field(default=None, metadata=FACTORS)
  proximal: bool = False
  lasso_cost: Literal["macs", "params"] | None = None
  controller: Mapping | None = dataclasses.field(default=None, metadata=FACTORS)
  lam: Weight | None = None
  project: Mapping | None = dataclasses.field(default=None, metadata=KERNELS)
  race: Mapping | None = None
  nested: Mapping | None = None
  switch: Mapping | None = dataclasses.field(default=None, metadata=KERNELS)
  trainable: Literal["all", "factors"] = dataclasses.field(
    default="all", metadata=FACTORS
  )

  @property
  def fits_later(self) -> bool:
    """True if ranks are sampled or shrunk before the budget applies."""
    found = self.sampler is not None or self.shrink is not None
    return found and self.decompose == "start"

  def check_times(self) -> None:
    """Refuses pieces that would do nothing, as kernels are factors or are not.

    Raises:
      ConfigError: names the piece and the remedy.
    """
    never = {
      "factors": (self.decompose in (None, "end"), '"start" or "settle"'),
      "kernels": (self.decompose in (None, "start"), '"settle" or "end"'),
    }
    for field in dataclasses.fields(self):
      needs = field.metadata.get("needs")
      if needs is None or getattr(self, field.name) == field.default:
        continue
      absent, remedy = never[needs]
      if absent:
        raise ConfigError(
          f"config.method.{field.name}: would do nothing, as it looks at"
          f" {needs} and no layer has them while it trains; set"
          f" config.method.decompose (now {self.decompose!r}) to {remedy}"
        )


SVD = {"name": "svd"}
PHASE = {"name": "phase"}
QUARTER = {"name": "fraction", "fraction": 0.25}
METHODS: dict[str, Method] = {
  method.name: method
  for method in (
    Method("dense"),
    # Ours, for a budget: a dense warm-up (discover), profiles proposed by
    # several scores, a race between them, and the rest at the winner's ranks.
    Method(
      "race",
      decompose="settle",
      decomposer={"name": "fisher"},
      race={},
      budget="macs:0.5",
    ),
    # Ours, for any size: a dense warm-up (discover), then joint training along
    # a chain of nested profiles.
    Method("nested", decompose="settle", nested={}),
    # Horvath et al., ICML 2024.
    Method(
      "maestro",
      decompose="start",
      sampler=PHASE,
      shrink="threshold",
      penalty="group_lasso",
    ),
    # The same with the lasso as an exact proximal step: docs/prox.md.
    Method(
      "prox",
      decompose="start",
      sampler=PHASE,
      shrink="zeros",
      penalty="group_lasso",
      proximal=True,
    ),
    # Ours: the same for a budget instead of a lambda. Groups count what their
    # components cost, and the lasso's weight follows the cost.
    Method(
      "lasso",
      decompose="start",
      sampler=PHASE,
      shrink="zeros",
      penalty="group_lasso",
      proximal=True,
      lasso_cost="macs",
      controller={"name": "follow"},
      budget="macs:0.5",
    ),
    # A dense network, truncated after training.
    Method("svd", decompose="end", ranks=QUARTER),
    Method(
      "data_svd",
      decompose="end",
      decomposer={"name": "data", "examples": 512},
      ranks=QUARTER,
    ),
    # The same, for what losing a component does to the loss.
    Method(
      "fisher_svd",
      decompose="end",
      decomposer={"name": "fisher", "examples": 512},
      ranks=QUARTER,
    ),
    # Wang et al., MLSys 2021: a dense warm-up (discover), then a quarter of
    # the rank. Which layers stay dense is config.rules: see resnet_od.py.
    Method("pufferfish", decompose="settle", ranks=QUARTER),
    # Wang et al., MLSys 2023: the warm-up ends, and ranks are what they are,
    # when stable ranks settle; Frobenius decay on the products from then on,
    # instead of config.optimizer.weight_decay: set that to 0.
    Method(
      "cuttlefish",
      decompose="settle",
      ranks={"name": "stable_rank"},
      switch={"name": "stable_ranks", "tolerance": 0.1},
      penalty="frobenius",
      lam=1e-4,
    ),
    # A uniform rank from scratch: two layers, as one would write them by hand.
    Method(
      "fixed", decompose="start", decomposer={"name": "random"}, ranks=QUARTER
    ),
    # Khodak et al., ICLR 2021: spectral initialisation and Frobenius decay.
    # Set config.optimizer.weight_decay to 0, as the decay replaces it.
    Method(
      "spectral_fd",
      decompose="start",
      ranks=QUARTER,
      penalty="frobenius",
      lam=1e-4,
    ),
    # Xu et al., 2020: dense kernels that are truncated again and again.
    Method(
      "trp",
      decompose="end",
      ranks={"name": "energy", "lost": 0.02},
      project={"every_steps": 20},
      lam=3e-4,
    ),
    # After Valipour et al., EACL 2023: adapters of a sampled rank on a frozen
    # base, which is config.init_from, or what discover has trained.
    Method(
      "dylora",
      decompose="settle",
      decomposer={"name": "adapter"},
      ranks=QUARTER,
      sampler={"name": "independent"},
      trainable="factors",
    ),
  )
}


def parse_method(section: Any) -> Method:
  """Turns config.method, a name or a mapping with one, into its pieces.

  Raises:
    ConfigError: an unknown name or piece, or pieces that do not go together.
  """
  if isinstance(section, str):
    section = {"name": section}
  if not isinstance(section, Mapping):
    raise ConfigError(
      f"config.method: {section!r} is neither the name of a method nor a"
      " mapping with one"
    )
  method, options = choose(METHODS, section, "config.method")
  method = dataclasses.replace(method, **bind(Method, options, "config.method"))
  method.check_times()
  return method
