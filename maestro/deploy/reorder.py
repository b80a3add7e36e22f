"""Brings a trained run's components into fisher order before it is cut."""

import dataclasses

import jax

from maestro import data as data_lib
from maestro import lowrank, streams, trees
from maestro.errors import UserError
from maestro.introspect import mode
from maestro.methods import fisher
from maestro.parallel.mesh import MeshShape, make_mesh
from maestro.training import build, opened

_EXAMPLES = 512  # training images from which moments are taken


def before_cuts(
  run: opened.Run, dataset: data_lib.Dataset | None, asked: bool | None
) -> opened.Run:
  """Returns the run that is to be cut, in fisher order where that can be had.

  Args:
    run: from `opened.open_run`.
    dataset: of the run; None if it is not there.
    asked: --reorder; None reorders a run that has factors, unless it is nested
      or has no data.

  Raises:
    UserError: it was asked for, and cannot be done.
  """
  if asked is None:
    asked = bool(run.ranks) and not run.levels
    if asked and dataset is None:
      print("components keep their order: to reorder them needs training data")
      return run
  return reordered(run, dataset) if asked else run


def reordered(run: opened.Run, dataset: data_lib.Dataset | None) -> opened.Run:
  """Returns a run of the same function whose components are in fisher order.

  What training has not ordered, as after an SVD, is ordered by what losing it
  does to the loss; see `maestro.methods.fisher`. With batch norm, statistics of
  the run's own ranks are computed first.

  Args:
    run: from `opened.open_run`.
    dataset: of the run.

  Raises:
    UserError: the data set is not there, no layer is factored, or the run is
      nested, whose levels are prefixes in the order that it has.
  """
  if dataset is None:
    raise UserError(
      "--reorder needs training data, which is not there; prepare it, or leave"
      " the order as it is by --noreorder"
    )
  if run.levels:
    raise UserError(
      "--reorder: the levels of a nested network are prefixes in its own order;"
      " leave it out"
    )
  if not run.ranks:
    raise UserError("--reorder: no layer of this run is factored")
  params = lowrank.mask(run.params, run.ranks)
  variables = {"params": params}
  if run.batch_stats:
    recalibrate = build.make_recalibrator(
      run.config, run.model, dataset, make_mesh(MeshShape(data=1))
    )
    variables = recalibrate(variables | {"batch_stats": run.batch_stats})
  moments = fisher.moments(
    run.model,
    variables,
    build.batches(dataset, _EXAMPLES),
    {path: run.layers[path] for path in trees.factored(params, run.layers)},
    key=streams.stream(run.config.seed, "calibration"),
    centred=run.facts.num_classes is not None,
    **mode(run.model, train=False),
  )
  new = fisher.reorder(params, run.ranks, run.layers, moments)
  return dataclasses.replace(run, params=jax.device_get(new))
