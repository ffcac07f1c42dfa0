"""Measures the BatchNorm refresh: seconds against a plain forward pass, and its error against all samples at once.

    python tests/benchmarks/refresh.py [--device cuda] [--rounds 5] [--batches 4] [--samples 16] [--size 224]

The networks are a ResNet-50 (25.6 million parameters, 53 BatchNorm layers) at the given batch size and at 2, and a
perceptron with BatchNorm1d, on random inputs. In each round the plain forward pass in evaluation mode, `ckpt_avg` with
either estimator, `torch.optim.swa_utils.update_bn` and, where it is installed, fvcore's `update_bn_stats` pass over the
same batches in turn; the medians are shown. A first round warms up and does not count.

The errors are those of the running statistics that each leaves, the worst channel: of the mean in standard deviations,
of the variance in variances. True are those of a float64 copy of the network that normalises by the batch as in
training, over all values together; for the first layer, of all samples at once.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import heading, row, table

from ckpt_avg import refresh_batch_norm

try:
    from fvcore.nn.precise_bn import update_bn_stats
except ImportError:
    update_bn_stats = None

Batches = list[Tensor]
Program = Callable[[nn.Module, Batches], object]
Truth = dict[str, tuple[Tensor, Tensor]]
STATISTICS = ("running_mean", "running_var")


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a shortcut (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(given, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.shortcut = nn.Sequential()
        if given != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(given, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, values: Tensor) -> Tensor:
        return (self.body(values) + self.shortcut(values)).relu_()


def resnet_50() -> nn.Module:
    blocks: list[nn.Module] = []
    given = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            blocks.append(Bottleneck(given, width, stride if index == 0 else 1))
            given = 4 * width
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, 1000))
    model = nn.Sequential(*stem, *blocks, *head)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if (round(parameters / 1e6, 1), len(batch_norms(model))) != (25.6, 53):
        raise AssertionError(f"no ResNet-50: {parameters:,} parameters, {len(batch_norms(model))} BatchNorm layers")
    return model


def perceptron() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@torch.no_grad()
def plain_forward(model: nn.Module, batches: Batches) -> None:
    model.eval()
    for batch in batches:
        model(batch)


def fvcore_precise_bn(model: nn.Module, batches: Batches) -> None:
    model.train()
    update_bn_stats(model, batches, len(batches))


FORWARD = "plain forward pass"
PROGRAMS: dict[str, Program] = {
    FORWARD: plain_forward,
    "ckpt-avg, pooled": refresh_batch_norm,
    "ckpt-avg, batch-mean": lambda model, batches: refresh_batch_norm(model, batches, estimator="batch-mean"),
    "torch `update_bn`": lambda model, batches: torch.optim.swa_utils.update_bn(batches, model),
}
if update_bn_stats is not None:
    PROGRAMS["fvcore `update_bn_stats`"] = fvcore_precise_bn


class Peak:
    """The peak of the memory in use since it was made, in MB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e6
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024e-6


def speed(model: nn.Module, batches: Batches, device: torch.device, rounds: int) -> dict[str, str]:
    """Returns the time of each program as a ratio to the forward pass, and the memory that it takes beyond it."""
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    peaks: dict[str, float] = dict.fromkeys(PROGRAMS, 0.0)
    for number in range(rounds + 1):
        for name, program in PROGRAMS.items():
            peak = Peak(device)
            synchronize(device)
            start = time.perf_counter()
            program(model, batches)
            synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
                peaks[name] = max(peaks[name], peak.read())
    least = seconds[FORWARD]
    found = {FORWARD: f"{statistics.median(least) / len(batches) * 1000:.3g} ms a batch"}
    for name in list(PROGRAMS)[1:]:
        ratio = statistics.median(mine / plain for mine, plain in zip(seconds[name], least, strict=True))
        fastest = min(seconds[name]) / min(least)
        found[name] = f"{ratio:.2f} ({fastest:.2f}), {peaks[name] - peaks[FORWARD]:+.0f} MB"
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def truth(model: nn.Module, batches: Batches) -> Truth:
    """Mean and unbiased variance of all values at each layer's input, in float64."""
    exact = copy.deepcopy(model).double().train()
    seen: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def gather(module: nn.Module, arguments: tuple[Tensor]) -> None:
            channels = arguments[0].transpose(0, 1).flatten(1)
            variance, mean = torch.var_mean(channels, 1, correction=0)
            seen.setdefault(name, []).append((channels.shape[1], mean, variance))

        return gather

    for name, layer in batch_norms(exact).items():
        layer.register_forward_pre_hook(watch(name))
    for batch in batches:
        exact(batch.double())
    found: Truth = {}
    for name, parts in seen.items():
        count = sum(part[0] for part in parts)
        mean = sum(part[0] * part[1] for part in parts) / count
        squares = sum(part[0] * (part[2] + (part[1] - mean) ** 2) for part in parts)
        found[name] = (mean, squares / (count - 1))
    # The first layer's input depends on nothing but the samples.
    first_name = next(iter(batch_norms(exact)))
    before_first = exact[: list(exact).index(exact.get_submodule(first_name))]
    channels = torch.cat([before_first(batch.double()) for batch in batches]).transpose(0, 1).flatten(1)
    found[first_name] = (channels.mean(1), channels.var(1, correction=1))
    return found


def error(model: nn.Module, expected: Truth, names: Iterable[str]) -> tuple[float, float]:
    worst_mean = worst_variance = 0.0
    for name in names:
        mean, variance = expected[name]
        layer = model.get_submodule(name)
        of_mean = (layer.running_mean.double() - mean).abs() / variance.sqrt()
        of_variance = (layer.running_var.double() - variance).abs() / variance
        worst_mean = max(worst_mean, of_mean.max().item())
        worst_variance = max(worst_variance, of_variance.max().item())
    return worst_mean, worst_variance


def accuracy(model: nn.Module, batches: Batches) -> dict[str, list[float]]:
    """Returns the worst errors of mean and variance, of the first layer and of all."""
    expected = truth(model, batches)
    found = {}
    for name in list(PROGRAMS)[1:]:
        refreshed = copy.deepcopy(model)
        PROGRAMS[name](refreshed, batches)
        found[name] = [*error(refreshed, expected, list(expected)[:1]), *error(refreshed, expected, expected)]
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="in a batch")
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--channels-last", action="store_true", help="convolutions in that layout")
    parser.add_argument("--only", choices=("speed", "accuracy"), default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{machine}, Linux {platform.release()}, Python {platform.python_version()}, torch {torch.__version__}")
    if update_bn_stats is None:
        print("fvcore skipped: it is not installed (pip install fvcore)")
    torch.manual_seed(0)
    network, wide = resnet_50().to(device), perceptron().to(device)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    count, samples, size = arguments.batches, arguments.samples, arguments.size

    def images(*sizes: int) -> Batches:
        # Each batch has a brightness of its own, so that the spread between batches counts.
        return [
            (torch.randn(number, 3, size, size) + 0.3 * index).to(device, memory_format=layout)
            for index, number in enumerate(sizes)
        ]

    if arguments.only != "accuracy":
        cases = {
            f"ResNet-50, {samples} per batch": (network, images(*[samples] * count)),
            "ResNet-50, 2 per batch": (network, images(*[2] * 2 * count)),
            "perceptron, 64 per batch": (wide, [torch.randn(64, 512, device=device) for _ in range(50 * count)]),
        }
        columns = {title: speed(*case, device, arguments.rounds) for title, case in cases.items()}
        heading(
            "speed", "Ratios are medians.", f"refresh.py --size {size} --batches {count} --rounds {arguments.rounds}"
        )
        table("time to the forward pass (of the fastest rounds), memory beyond it", *columns)
        for name in PROGRAMS:
            row(name, *(column[name] for column in columns.values()))
    if arguments.only != "speed":
        network = network.to(memory_format=torch.contiguous_format)
        equal = accuracy(network, images(*[samples] * count))
        unequal = accuracy(network, images(*[samples] * (count - 1), 2))
        heading("accuracy", "Equal batches / a small last one.", f"refresh.py --size {size} --batches {count}")
        table("", "first layer, mean", "first layer, variance", "all layers, mean", "all layers, variance")
        for name in equal:
            row(name, *(f"{one:.1e} / {other:.1e}" for one, other in zip(equal[name], unequal[name], strict=True)))


if __name__ == "__main__":
    main()
