"""The sections of `run` that average."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.checking import Difference, difference, same
from benchmarks.harness import (
    COLUMNS,
    Compared,
    Program,
    Setup,
    ckpt_avg,
    in_turn,
    ours,
    python,
    remove,
    row,
    run,
    script,
    table,
)
from benchmarks.inputs import Form, layout, llama, many, write_random, write_run
from benchmarks.peers import Peer, installed

if TYPE_CHECKING:
    from torch import Tensor

_GIB = 2**30
_FIXTURE = Path(__file__).parents[2] / "fixtures" / "mnist_cnn"
_READERS = (0, 2, 4, 8, 16, 32)
_FORMATS: dict[str, tuple[str, Form]] = {
    "bfloat16 safetensors": ("bfloat16", "safetensors"),
    "float16 safetensors": ("float16", "safetensors"),
    "float8_e4m3fn safetensors": ("float8_e4m3fn", "safetensors"),
    "float32 `torch.save`": ("float32", "zip"),
    "float32 safetensors, 4 shards with an index": ("float32", "shards"),
}
_PLAIN = "float32 safetensors"
FLOOR, OVERLAPPED, OURS = "floor: reads, then writes", "floor: writes while it reads", "ckpt-avg"


def _exact(name: str, found: Difference) -> None:
    if found.wrong:
        raise AssertionError(f"{name}: {found}")


# -- Float32 safetensors: page cache warm and cold, threads, engines, ranks, a GPU ---------------------------------


def measure_warm(setup: Setup) -> None:
    """Page cache warm, next to floors of two threads; every element of the output is checked."""
    floors = {FLOOR: script("floor", setup.plain), OVERLAPPED: script("overlapped_floor", setup.plain)}
    done = in_turn(setup, {**floors, OURS: ours(setup.plain)})
    done.show(FLOOR)
    _exact(OURS, difference(done.output(OURS), setup.plain))
    print("\nEvery element of the output is the exact mean, rounded once.")


def measure_profile(setup: Setup) -> None:
    """Page cache warm, parts of the work alone: the start, headers and plan, and the digest of the output."""
    digest = f"import hashlib; d = hashlib.sha256(); [d.update(bytes(2**20)) for _ in range({setup.nbytes} >> 20)]"
    programs = {
        "`python -c pass`": python("pass"),
        "`ckpt-avg --version`": Program(lambda output: [sys.executable, "-m", "ckpt_avg", "--version"]),
        "`ckpt-avg average --dry-run`": Program(ours(setup.plain, "--dry-run").command),
        "SHA-256 of as many bytes as the output, one thread": python(digest),
        OURS: ours(setup.plain),
    }
    in_turn(setup, programs).show(OURS)


def measure_cold(setup: Setup) -> None:
    """The inputs dropped from the page cache before each run, next to the best of several floors."""
    floors = {
        f"{OVERLAPPED}, {count} at a time": script("overlapped_floor", setup.plain, count)
        for count in (1, *_READERS[1:])
    }
    done = in_turn(setup, {**floors, OURS: ours(setup.plain)}, cold=True)
    done.show(min(floors, key=lambda name: done[name].wall))


def measure_model(setup: Setup) -> None:
    """The inputs dropped from the page cache before each run, with a module of the user's that imports torch."""
    module = setup.empty("app") / "app.py"
    module.write_text("import torch\n\n\ndef make():\n    return torch.nn.Identity()\n")
    alone, with_model = f"{OURS} without a model", f"{OURS} with `--model`"
    programs = {
        "`import torch` alone": python("import torch"),
        alone: ours(setup.plain),
        with_model: ours(setup.plain, "--model", "app:make", "--app-dir", module.parent),
    }
    done = in_turn(setup, programs, cold=True)
    done.show(alone)
    done.same(alone, with_model)


def measure_readers(setup: Setup) -> None:
    """The inputs dropped from the page cache before each run, by the number of threads that read ahead."""
    programs = {f"`--readers {count}`": ours(setup.plain, "--readers", count) for count in _READERS}
    done = in_turn(setup, programs, cold=True)
    done.show("`--readers 16`")
    done.same()


def measure_threads(setup: Setup) -> None:
    """Page cache warm, by the number of threads."""
    programs = {f"`--threads {count}`": ours(setup.plain, "--threads", count) for count in (2, 4, 8, 16)}
    done = in_turn(setup, programs)
    done.show("`--threads 2`")
    done.same()


def measure_engines(setup: Setup) -> None:
    """Page cache warm, the native engine and torch."""
    names = ("native", "torch")
    programs = {name: ours(setup.plain, launcher=("env", f"CKPT_AVG_ENGINE={name}", sys.executable)) for name in names}
    done = in_turn(setup, programs)
    done.show("native")
    done.same()


def measure_ranks(setup: Setup) -> None:
    """Page cache warm, one process and several ranks of one machine; the memory is that of one process."""
    programs = {"one process": ours(setup.plain)}
    for size in (2, 4):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        programs[f"torchrun, {size} ranks"] = ours(setup.plain, launcher=launcher)
    done = in_turn(setup, programs)
    done.show("one process")
    done.same()


def measure_cuda(setup: Setup) -> None:
    """Page cache warm, on the CPU and on a GPU, next to the copies that the bus allows."""
    import torch

    if not torch.cuda.is_available():
        print("Skipped: torch finds no CUDA device.")
        return
    start, cpu, cuda = "start of torch and CUDA", "`--device cpu`", "`--device cuda`"
    programs = {start: python("import torch; torch.zeros(1, device='cuda')")}
    programs |= {f"`--device {name}`": ours(setup.plain, "--device", name) for name in ("cpu", "cuda")}
    done = in_turn(setup, programs)
    done.show(cpu)
    done.same(cpu, cuda)
    net = done[cuda].wall - done[start].wall
    speed = done[cuda].nbytes / net
    print(f"\n{torch.cuda.get_device_name()}; without the start {net:.2f} s, {speed / 1e9:.1f} GB/s of input.\n")
    table("copies to the device", "GB/s", "`--device cuda` without the start, relative")
    for name, is_pinned in (("page-locked memory", True), ("pageable memory", False)):
        possible = _copy_speed(torch.empty(_GIB // 4, dtype=torch.uint8, pin_memory=is_pinned).fill_(1))
        row(name, f"{possible / 1e9:.1f}", speed / possible)


def _copy_speed(source: Tensor) -> float:
    """Returns bytes per second to a CUDA device, the best of ten copies."""
    import torch

    target = torch.empty_like(source, device="cuda")
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return source.nbytes / min(seconds)


# -- Other formats, layouts and sizes ------------------------------------------------------------------------------


def measure_formats(setup: Setup) -> None:
    """Page cache warm, as many bytes in each format, each in the same rounds as float32 safetensors."""
    table("", *COLUMNS, "bytes per second, relative to float32 safetensors")
    for name, (dtype, form) in _FORMATS.items():
        inputs = write_random(setup.empty("inputs"), setup.checkpoints, setup.nbytes, dtype=dtype, form=form)
        done = in_turn(setup, {_PLAIN: ours(setup.plain), name: ours(inputs)})
        speed = done[name].nbytes / done[_PLAIN].nbytes / done[name].ratio(done[_PLAIN])
        row(name, *done[name].cells(), speed)
        if dtype != "float32":
            _exact(name, difference(done.output(name), inputs))
        elif not same(done.output(name), done.output(_PLAIN)):
            raise AssertionError(f"{name}: not the bits of {_PLAIN}")
    print("\nEvery element of each output is the exact mean, rounded once.")


def measure_tensors(setup: Setup) -> None:
    """Page cache warm, as many bytes in small tensors; a dry run ends before the first tensor byte."""
    shapes = many(setup.nbytes // 10_000, 10_000)
    inputs = write_random(setup.empty("inputs"), setup.checkpoints, setup.nbytes, shapes=shapes)
    usual, small = "the usual layout", f"{len(shapes):,} tensors of 10 KB"
    programs = {
        usual: ours(setup.plain),
        small: ours(inputs),
        "the same, `--dry-run`": Program(ours(inputs, "--dry-run").command),
    }
    done = in_turn(setup, programs)
    done.show(usual)
    _exact(small, difference(done.output(small), inputs))


def measure_fixture(setup: Setup) -> None:
    """A run of small files, next to the start of Python and of torch."""
    programs = {f"`python -c '{code}'`": python(code) for code in ("pass", "import torch")}
    programs["fixture run, `--bn keep`"] = ours([_FIXTURE], "--last", 8, "--bn", "keep")
    in_turn(setup, programs, rounds=3 * setup.rounds).show("`python -c 'import torch'`")


def measure_memory(setup: Setup) -> None:
    """Peak resident sets over sparse files, and the ratio of the largest to the smallest; one run each."""
    scale = setup.nbytes / 1e9
    table("`--threads`", "model, GiB", "checkpoints", "peak RSS, MB", "wall, s", "input, GB/s")
    sizes = (0.25 * scale, scale, 4 * scale)
    for threads, of_sizes in ((2, sizes), (16, sizes[:2])):
        peaks = []
        for size, count in product(of_sizes, (2, 8, 32)):
            home = setup.empty("inputs")
            paths = write_run(home, layout(int(size * _GIB)), count)
            done = run(ckpt_avg("-o", home / "out.safetensors", "--threads", threads, *paths))
            row(threads, f"{size:g}", count, f"{done.peak:.0f}", done.wall, count * size * _GIB / 1e9 / done.wall)
            peaks.append(done.peak)
        row(threads, "largest / smallest", "", f"{max(peaks) / min(peaks):.3f}", "", "")


# -- Other tools over the same checkpoints; some of them know only Llamas ------------------------------------------


def measure_peers(setup: Setup) -> None:
    """Page cache warm, every tool that is installed, and the error of each output."""
    remove(setup.folder / "plain")
    vars(setup).pop("plain", None)
    shapes, config = llama(setup.nbytes)
    folder = setup.empty("inputs")
    inputs = write_random(folder, setup.checkpoints, setup.nbytes, shapes=shapes, config=config)
    peers = installed(inputs, setup.peers, folder)
    programs = {FLOOR: script("floor", inputs), OURS: ours(inputs)}
    imports = {f"import {peer.imports}": python(f"import {peer.imports}", peer.python) for peer in peers.values()}
    done = in_turn(setup, programs | {name: peer.program for name, peer in peers.items()} | imports)
    print(f"{len(shapes)} tensors, the layout of a Llama\n")
    table("", *COLUMNS, "anonymous, MB", "time, relative", "output")
    for name, of_program in done.items():
        checked = "" if name == FLOOR or name in imports else _checked(name, peers.get(name), done, inputs)
        anonymous = max(one.anonymous for one in of_program)
        row(name, *of_program.cells(), f"{anonymous:.0f}", of_program.ratio(done[OURS]), checked)


def _checked(name: str, peer: Peer | None, done: Compared, inputs: Sequence[Path]) -> Difference:
    found = difference(done.output(name), inputs)
    if found.wrong and (peer is None or found.relative > peer.tolerance):
        raise AssertionError(f"{name}: {found}")
    return found
