"""The peers in PyTorch, in a process of their own that is driven by JSON lines.

  python -m benchmarks.torch_peer

The first line is {"network", "factored", "shape", "batch_size", "options",
"threads", "device", "dtype"} and is answered by {"torch", "threads", "params",
"state_bytes"}; each further line {"steps": n} by {"seconds", "cpu_seconds"}.
The process ends with its input. It knows nothing of JAX, so that neither
runtime's threads nor allocator meet the other's.

On a GPU ("cuda") the step is what PyTorch's guides advise without a compiler:
channels last, cuDNN's benchmark mode, bfloat16 by autocast, data on the device.

Factored layers are two modules, as one would write them by hand: a convolution
to R channels without bias and a 1x1 convolution, or two linear maps, at the
full rank R = min(in, out).
"""

import json
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def _conv(
  n_in: int,
  n_out: int,
  size: int,
  *,
  factored: bool,
  stride: int = 1,
  padding: int = 0,
  bias: bool = True,
) -> nn.Module:
  if not factored:
    return nn.Conv2d(n_in, n_out, size, stride, padding, bias=bias)
  rank = min(n_in * size * size, n_out)
  return nn.Sequential(
    nn.Conv2d(n_in, rank, size, stride, padding, bias=False),
    nn.Conv2d(rank, n_out, 1, bias=bias),
  )


def _linear(n_in: int, n_out: int, *, factored: bool) -> nn.Module:
  if not factored:
    return nn.Linear(n_in, n_out)
  rank = min(n_in, n_out)
  return nn.Sequential(
    nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out)
  )


def lenet(*, factored: bool) -> nn.Module:
  """LeNet-5 on 1 x 28 x 28 inputs, ten classes."""
  return nn.Sequential(
    _conv(1, 6, 5, factored=factored),
    nn.ReLU(),
    nn.MaxPool2d(2),
    _conv(6, 16, 5, factored=factored),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    _linear(256, 120, factored=factored),
    nn.ReLU(),
    _linear(120, 84, factored=factored),
    nn.ReLU(),
    _linear(84, 10, factored=factored),
  )


def mlp(*, factored: bool, features: list[int]) -> nn.Module:
  """Linear layers with ReLU between them on 1 x 28 x 28 inputs, ten classes."""
  layers: list[nn.Module] = [nn.Flatten()]
  n_in = 784
  for n_out in features:
    layers += [_linear(n_in, n_out, factored=factored), nn.ReLU()]
    n_in = n_out
  return nn.Sequential(*layers, _linear(n_in, 10, factored=factored))


class Block(nn.Module):
  """Basic block: conv 3x3, conv 3x3, and a 1x1 shortcut where shapes change."""

  def __init__(self, n_in: int, n_out: int, stride: int, *, factored: bool):
    """Makes the layers."""
    super().__init__()
    self.conv1 = _conv(
      n_in, n_out, 3, stride=stride, padding=1, bias=False, factored=factored
    )
    self.norm1 = nn.BatchNorm2d(n_out)
    self.conv2 = _conv(
      n_out, n_out, 3, padding=1, bias=False, factored=factored
    )
    self.norm2 = nn.BatchNorm2d(n_out)
    self.shortcut = nn.Identity()
    if stride > 1 or n_in != n_out:
      self.shortcut = nn.Sequential(
        _conv(n_in, n_out, 1, stride=stride, bias=False, factored=factored),
        nn.BatchNorm2d(n_out),
      )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Maps [b, n_in, h, w] to [b, n_out, h / stride, w / stride]."""
    y = functional.relu(self.norm1(self.conv1(x)))
    return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(*, factored: bool, width: int = 64) -> nn.Module:
  """ResNet-18 with a 3x3 stem on 3 x 32 x 32 inputs, ten classes."""
  stem = _conv(3, width, 3, padding=1, bias=False, factored=factored)
  layers = [stem, nn.BatchNorm2d(width), nn.ReLU()]
  n_in = width
  for i in range(4):
    n_out = width * 2**i
    for j in range(2):
      stride = 2 if i > 0 and j == 0 else 1
      layers.append(Block(n_in, n_out, stride, factored=factored))
      n_in = n_out
  layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
  return nn.Sequential(*layers, _linear(n_in, 10, factored=factored))


def vgg19(*, factored: bool, width: int = 64) -> nn.Module:
  """VGG-19 with batch norm and one classifier layer on 3 x 32 x 32 inputs."""
  layers: list[nn.Module] = []
  n_in = 3
  for convolutions, multiple in ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8)):
    n_out = width * multiple
    for _ in range(convolutions):
      layers.append(_conv(n_in, n_out, 3, padding=1, factored=factored))
      layers += [nn.BatchNorm2d(n_out), nn.ReLU()]
      n_in = n_out
    layers.append(nn.MaxPool2d(2))
  return nn.Sequential(
    *layers, nn.Flatten(), _linear(n_in, 10, factored=factored)
  )


NETWORKS = {
  "lenet": lenet,
  "mlp": mlp,
  "resnet18": resnet18,
  "vgg19": vgg19,
}


class Peer:
  """A network, its optimizer and random data.

  Attributes:
    facts: what is told about them, see the module's docstring.
  """

  def __init__(
    self,
    *,
    network: str,
    factored: bool,
    shape: list[int],
    batch_size: int,
    options: dict[str, Any],
    threads: int,
    device: str = "cpu",
    dtype: str = "float32",
  ):
    """Makes the network, with `options`; `shape` is that of one image, HWC."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    self.device, self.dtype = device, dtype
    # NCHW is the faster order on CPUs, in memory as well.
    self.layout = (
      torch.contiguous_format if device == "cpu" else torch.channels_last
    )
    model = NETWORKS[network](factored=factored, **options).train()
    self.model = model.to(device=device, memory_format=self.layout)
    self.optimizer = torch.optim.SGD(
      self.model.parameters(), lr=1e-3, momentum=0.9
    )
    height, width_, channels = shape
    # Four batches in uint8, gathered and scaled in the step, as ours are.
    self.inputs = torch.randint(
      0, 256, (4 * batch_size, channels, height, width_), dtype=torch.uint8
    ).to(device=device, memory_format=self.layout)
    self.targets = torch.randint(0, 10, (4 * batch_size,)).to(device)
    self.order = torch.randperm(4 * batch_size).to(device)
    self.batch_size = batch_size
    self.steps = 0
    params = list(self.model.parameters())
    buffers = list(self.model.buffers())
    self.facts = {
      "torch": torch.__version__,
      "threads": torch.get_num_threads(),
      "params": sum(p.numel() for p in params),
      "state_bytes": sum(
        t.numel() * t.element_size() for t in (*params, *params, *buffers)
      ),  # the parameters again as the optimizer's momentum
    }

  def step(self) -> None:
    """Does one step of training."""
    start = self.steps % 4 * self.batch_size
    i = self.order[start : start + self.batch_size]
    x = self.inputs[i].to(torch.float32, memory_format=self.layout) / 255
    self.optimizer.zero_grad()
    half = self.dtype == "bfloat16"
    with torch.autocast(self.device, torch.bfloat16, enabled=half):
      logits = self.model(x)
    loss = functional.cross_entropy(logits.float(), self.targets[i])
    loss.backward()
    self.optimizer.step()
    self.steps += 1

  def _wait(self) -> None:
    if self.device == "cuda":
      torch.cuda.synchronize()

  def time(self, steps: int) -> dict[str, float]:
    """Says what so many steps take, by the clock and of the CPU."""
    self._wait()
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(steps):
      self.step()
    self._wait()
    return {
      "seconds": time.perf_counter() - started,
      "cpu_seconds": time.process_time() - cpu_started,
    }


def main() -> None:
  """Answers the lines of its input, see the module's docstring."""
  peer = Peer(**json.loads(sys.stdin.readline()))
  print(json.dumps(peer.facts), flush=True)
  for line in sys.stdin:
    print(json.dumps(peer.time(**json.loads(line))), flush=True)


if __name__ == "__main__":
  main()
