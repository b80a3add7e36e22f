"""Weights as PyTorch names and lays them out: torchvision's and timm's names.

  here                                  in PyTorch
  Dense    kernel [in, out]             weight [out, in]
  Conv     kernel [*window, in/G, out]  weight [out, in/G, *window]
  factors  u [(G,) *inputs, R]          0.weight [R, in], [G R, in/G, *window]
           v [(G,) R, *outputs]         1.weight [out, R], [out, R, 1, 1]
  norm     scale, bias; mean, var       weight, bias; running_mean, running_var
  images   [b, h, w, c]                 [b, c, h, w]

So factors are two layers in a row. What timm stacks into one weight, the query,
key and value of an attention, are three layers here. Where a network lays an
image out as a vector, the order of its numbers differs, too, and with it the
inputs of the layer behind. Needs no PyTorch: tensors are anything that NumPy
takes.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from maestro import introspect
from maestro.torch_names import WeightsError, names_of
from maestro.trees import LayerSpec, Tree

# ---------------------------------------------------------------------------
# A network's modules
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Module:
  """A module that holds parameters.

  Attributes:
    path: slash-joined, here.
    name: dot-joined, in PyTorch.
    spec: of its kernel; None of a norm.
    names: {leaf: its name in PyTorch} of a module without a kernel.
    shapes: {leaf: shape} of its parameters and statistics.
    channels: of the image that it sees as a vector; 1 if it does not.
  """

  path: str
  name: str
  spec: LayerSpec | None
  names: Mapping[str, str]
  shapes: Mapping[str, tuple[int, ...]]
  channels: int = 1


def _modules(model: Any, inputs: Any) -> Iterator[_Module]:
  """Yields the modules of a network in order of their paths."""
  names = names_of(model)
  shape = names.image(model) if inputs is None else tuple(inputs.shape[1:])
  if shape is None:
    raise WeightsError(
      f"inputs: {type(model).__name__} takes inputs of any shape; give an"
      " example, or jax.ShapeDtypeStruct((1, ...), float)"
    )
  x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  try:
    shapes, layers = shapes_of(model, x), introspect.layers(model, x)
  except (TypeError, ValueError) as error:
    raise WeightsError(
      f"inputs: {type(model).__name__} does not run on {x.shape}: {error}"
    ) from error
  leaves: dict[str, dict[str, tuple[int, ...]]] = {}
  for path, leaf in shapes.items():
    module, _, name = path.partition("/")[2].rpartition("/")
    leaves.setdefault(module, {})[name] = leaf
  flattened, channels = names.flattened(model, shape) or ("", 1)
  for path in sorted(leaves):
    own = {f: names.leaves[f] for f in leaves[path] if not path}
    name = names.of(model, path) if path else ""
    yield _Module(
      path,
      name,
      layers.get(path),
      own or {leaf: f"{name}.{there}" for leaf, there in _NORM.items()},
      leaves[path],
      channels if path == flattened else 1,
    )


def shapes_of(model: Any, x: Any) -> dict[str, tuple[int, ...]]:
  """{"params/..." or "batch_stats/...": shape} of a network that is dense."""
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
  return {path: leaf.shape for path, leaf in flat.items()}


_NORM = {
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def _expected(
  module: _Module, rank: int | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """{leaf: (name, shape) in PyTorch} of a module, dense or at a rank."""
  name, spec = module.name, module.spec
  if spec is None:
    return {
      leaf: (module.names[leaf], shape) for leaf, shape in module.shapes.items()
    }
  groups = max(spec.groups, default=1)
  inputs = (spec.inputs[-1], *spec.inputs[:-1])
  outputs = groups * spec.n_out
  found: dict[str, tuple[str, tuple[int, ...]]] = {}
  if rank is None:
    found["kernel"] = (f"{name}.weight", (outputs, *inputs))
  else:
    ones = (1, 1) if spec.kind == "conv" else ()
    found["u"] = (f"{name}.0.weight", (groups * rank, *inputs))
    found["v"] = (f"{name}.1.weight", (outputs, rank, *ones))
    name = f"{name}.1"
  if "bias" in module.shapes:
    found["bias"] = (f"{name}.bias", (outputs,))
  return found


def _here(x: np.ndarray, leaf: str, module: _Module) -> np.ndarray:
  """Lays out an array of PyTorch's as it is here."""
  spec = module.spec
  if spec is None or leaf == "bias":
    return x
  if leaf in ("u", "v") and spec.groups:  # [G R, ...] -> [G, ..., R]
    x = x.reshape((*spec.groups, -1, *x.shape[1:]))
    x = np.moveaxis(x, (1, 2), (-1, -2))
  else:
    x = np.moveaxis(x, (0, 1), (-1, -2))
  if leaf == "v":
    return x.reshape((*spec.lead, x.shape[-2], *spec.outputs))
  if module.channels > 1:  # rows [c, h w] -> [h w, c]
    rows = x.reshape((module.channels, -1, x.shape[-1]))
    x = rows.swapaxes(0, 1).reshape(x.shape)
  return x


def _there(x: np.ndarray, leaf: str, module: _Module) -> np.ndarray:
  """Inverts `_here`."""
  spec = module.spec
  if spec is None or leaf == "bias":
    return x
  if leaf == "v" and spec.kind == "conv":
    x = x.reshape((*spec.lead, 1, 1, *x.shape[-2:]))
  if leaf != "v" and module.channels > 1:  # rows [h w, c] -> [c, h w]
    rows = x.reshape((-1, module.channels, x.shape[-1]))
    x = rows.swapaxes(0, 1).reshape(x.shape)
  if leaf in ("u", "v") and spec.groups:
    x = np.moveaxis(x, (-1, -2), (1, 2))
    return x.reshape((-1, *x.shape[2:]))
  return np.moveaxis(x, (-1, -2), (0, 1))


# ---------------------------------------------------------------------------
# From and to PyTorch
# ---------------------------------------------------------------------------

_COUNTER = "num_batches_tracked"  # a norm's, which no forward pass reads


def _apart(given: Mapping[str, Any], model: Any) -> dict[str, Any]:
  """Cuts what is stacked in a state dict into the layers that are here."""
  found = dict(given)
  for whole, parts in names_of(model).stacks(model).items():
    for leaf in ("weight", "bias"):
      x = found.get(f"{whole}.{leaf}")
      rows = getattr(x, "shape", ())
      if x is None or not rows or rows[0] % len(parts):
        continue  # it is told with what else does not fit
      n = rows[0] // len(parts)
      del found[f"{whole}.{leaf}"]
      for i, part in enumerate(parts):
        found[f"{part}.{leaf}"] = x[i * n : (i + 1) * n]
  return found


def _together(state: dict[str, np.ndarray], model: Any) -> None:
  """Inverts `_apart` where all parts are dense."""
  for whole, parts in names_of(model).stacks(model).items():
    if all(f"{part}.weight" in state for part in parts):
      for leaf in ("weight", "bias"):
        pieces = [state.pop(f"{part}.{leaf}") for part in parts]
        state[f"{whole}.{leaf}"] = np.concatenate(pieces)


def from_torch(
  state_dict: Mapping[str, Any] | str | os.PathLike,
  model: Any,
  inputs: Any = None,
) -> dict[str, Any]:
  """Returns a network's variables with the weights of PyTorch's.

    model = maestro.models.ResNet50(num_classes=1000)
    variables = maestro.from_torch(torch_model.state_dict(), model)
    logits = model.apply(variables, x)  # x [b, h, w, c]

  Args:
    state_dict: {name: array} with torchvision's names, of a ViT timm's, of
      PyTorch's layout; tensors of torch's or anything with `__array__`. A layer
      may be two in a row, "fc.0.weight" and "fc.1.weight", which become
      factors. Or the path of a safetensors file of such arrays.
    model: a network of `maestro.models`: ResNets (also without the ImageNet
      stem), ResNeXt, MobileNetV2, VGG-19 with batch norm, ViT, LeNet, MLP, or
      a linear one.
    inputs: an example of what it is applied to, [b, h, w, c], or its abstract
      value; None is the size that the network was made for. The MLP and the
      linear networks need it.

  Returns:
    {"params": ...} and, where it has them, {"batch_stats": ...}, in the
    parameters' dtype.

  Raises:
    WeightsError: names are missing or left over, or shapes differ, all listed;
      the network has no names in PyTorch; or the file cannot be read.
  """
  if isinstance(state_dict, str | os.PathLike):
    state_dict = read_file(state_dict)
  elif not isinstance(state_dict, Mapping):
    raise WeightsError(
      f"state_dict: a {type(state_dict).__name__} is no mapping of names to"
      " arrays; give module.state_dict(), or the path of a safetensors file"
    )
  given = {k: x for k, x in state_dict.items() if not k.endswith(_COUNTER)}
  given = _apart(given, model)
  shapes = {k: getattr(x, "shape", None) for k, x in given.items()}
  shapes = {k: None if s is None else tuple(s) for k, s in shapes.items()}
  expected = []
  for module in _modules(model, inputs):
    rank = _rank(module, shapes)
    expected.append((module, _expected(module, rank)))
  wanted = {name: s for _, leaves in expected for name, s in leaves.values()}
  if problems := differences(shapes, wanted):
    raise WeightsError(
      f"state dict does not fit {type(model).__name__}: {'; '.join(problems)}."
      " Give torchvision's names (of a ViT, timm's) and PyTorch's layout,"
      " [out, in] and [out, in / groups, h, w], of a network of the same"
      " options (num_classes, stem, width, ...) and the same inputs="
      + _prefix(set(shapes) - set(wanted), set(wanted) - set(shapes))
    )
  flat: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
  for module, leaves in expected:
    for leaf, (name, _) in leaves.items():
      x = _here(_array(given[name]), leaf, module)
      part = "batch_stats" if leaf in ("mean", "var") else "params"
      path = f"{module.path}/{leaf}".removeprefix("/")
      flat[part][path] = jnp.asarray(x, jnp.float32)
  return {
    part: traverse_util.unflatten_dict(leaves, sep="/")
    for part, leaves in flat.items()
    if leaves
  }


def _rank(module: _Module, shapes: Mapping[str, Any]) -> int | None:
  """The rank at which a state dict holds a module; None is dense."""
  first = shapes.get(f"{module.name}.0.weight")
  if module.spec is None or not first or f"{module.name}.weight" in shapes:
    return None
  return first[0] // max(module.spec.groups, default=1)


def _array(x: Any) -> np.ndarray:
  """An array of NumPy's, also of a tensor with a gradient, or in bfloat16."""
  if hasattr(x, "detach"):
    x = x.detach().cpu()
    x = x.float() if str(x.dtype) == "torch.bfloat16" else x
  return np.asarray(x)


def _prefix(left: set[str], missing: set[str]) -> str:
  """Says so if all names are right behind one prefix."""
  ends = [(n, end) for n in left for end in missing if n.endswith(f".{end}")]
  for prefix in {name.removesuffix(end) for name, end in ends}:
    if all(name.startswith(prefix) for name in left):
      return f". All names begin with {prefix!r}: take that away"
  return ""


def differences(
  found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]
) -> list[str]:
  """Compares {name: shape} with what is wanted; [] if they are the same.

  Returns:
    A text each for the missing, the unknown and the misshapen, which name all.
  """
  missing = [f"{n} {list(wanted[n])}" for n in sorted(wanted.keys() - found)]
  unknown = sorted(found.keys() - wanted)
  other = []
  for name in sorted(found.keys() & wanted):
    here, there = wanted[name], found[name]
    if there != here:
      text = "no array" if there is None else str(list(there))
      turned = there is not None and sorted(there) == sorted(here)
      text += ", which is transposed," if turned else ""
      other.append(f"{name} is {text} and must be {list(here)}")
  kinds = {"missing": missing, "unknown": unknown, "of another shape": other}
  return [f"{kind}: {', '.join(x)}" for kind, x in kinds.items() if x]


def to_state_dict(
  model: Any, variables: Mapping[str, Tree], inputs: Any = None
) -> dict[str, np.ndarray]:
  """Inverts `from_torch`: {name: array}, in PyTorch's layout.

  A layer of rank 0, which PyTorch has not, is one component of zeros.

  Args:
    model: as for `from_torch`.
    variables: {"params": ...} and {"batch_stats": ...}; each layer holds a
      kernel, or u and v.
    inputs: as for `from_torch`.

  Raises:
    WeightsError: the network has no names in PyTorch.
  """
  flat: dict[str, dict[str, Any]] = {}
  for tree in variables.values():
    leaves: dict[str, Any] = traverse_util.flatten_dict(tree, sep="/")
    for path, x in leaves.items():
      module, _, leaf = path.rpartition("/")
      flat.setdefault(module, {})[leaf] = np.asarray(x)
  state = {}
  for module in _modules(model, inputs):
    node, rank = dict(flat[module.path]), None
    if module.spec is not None and "u" in node:
      axis = len(module.spec.lead)
      if not node["u"].shape[-1]:
        for leaf, at in (("u", node["u"].ndim - 1), ("v", axis)):
          pads = [(0, int(i == at)) for i in range(node[leaf].ndim)]
          node[leaf] = np.pad(node[leaf], pads)
      rank = node["u"].shape[-1]
    for leaf, (name, _) in _expected(module, rank).items():
      state[name] = np.ascontiguousarray(_there(node[leaf], leaf, module))
  _together(state, model)
  return state


def read_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads all arrays of a safetensors file, {name: array}.

  Raises:
    WeightsError: it is not there, or no such file; pickles are not read.
  """
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    raise WeightsError(
      f"{path}: only .safetensors files are read, as others may run code; write"
      " one by safetensors.torch.save_file(model.state_dict(), path)"
    )
  try:
    return safetensors.numpy.load_file(path)
  except OSError as error:
    raise WeightsError(
      f"cannot read {path}: {error.strerror or error}"
    ) from error
  except (safetensors.SafetensorError, TypeError) as error:
    raise WeightsError(
      f"{path} is no safetensors file of numbers: {error}; write it again"
    ) from error
