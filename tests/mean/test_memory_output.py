"""An average in memory: the same bytes at the same places as in the file, whatever the shapes and dtypes."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_avg import average
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, CheckpointSpec, TensorSpec, contiguous_stride
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean.plan import Plan, make_plan
from ckpt_avg.mean.stream import Mean, MemoryOutput, write_means

CPU = torch.device("cpu")
AWKWARD = {
    "zero": (torch.float32, (0,)),
    "zero.rows": (torch.float64, (3, 0, 2)),
    "scalar": (torch.float32, ()),
    "scalar.bf16": (torch.bfloat16, ()),
    "flag": (torch.bool, ()),
    "one": (torch.float16, (1,)),
    "count": (torch.int64, ()),
    "mask": (torch.bool, (3,)),
    "bytes": (torch.uint8, (5,)),
    "complex": (torch.complex64, (2, 3)),
    "double": (torch.float64, (3, 3)),
    "half": (torch.float16, (7,)),
    "f8": (torch.float8_e4m3fn, (3,)),
    "f8 zero": (torch.float8_e5m2, (0, 4)),
    "many": (torch.float32, (2, 1, 3, 1, 2)),
}


def plan_of(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> Plan:
    specs = {
        name: TensorSpec(
            name, BY_TORCH_NAME[str(dtype).removeprefix("torch.")], shape, contiguous_stride(shape), 0, 0, (0, 0)
        )
        for name, (dtype, shape) in tensors.items()
    }
    return make_plan([CheckpointSpec(Path("a"), "safetensors", specs)])


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if dtype.is_floating_point
        else torch.randn(shape, generator=generator, dtype=dtype)
        if dtype.is_complex
        else torch.ones(shape, dtype=dtype)
        for name, (dtype, shape) in AWKWARD.items()
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and bytes(
        one.contiguous().reshape(-1).view(torch.uint8).tolist()
    ) == bytes(other.contiguous().reshape(-1).view(torch.uint8).tolist())


def filled(plan: Plan, tensors: dict[str, torch.Tensor], step: int | None = None) -> MemoryOutput:
    output = MemoryOutput(plan)
    for tensor in plan.tensors:
        contents = bytes(tensors[tensor.name].contiguous().reshape(-1).view(torch.uint8).tolist())
        size = step or max(1, len(contents))
        for start in range(0, len(contents), size):
            output.write(memoryview(contents)[start : start + size], tensor.offset + start)
    return output


@pytest.mark.parametrize("step", [None, 1, 3])
def test_gives_back_what_was_written(step: int | None) -> None:
    """Zero-size and 0-d tensors included, and written in pieces that end in the middle of an element."""
    tensors = random_tensors(0)
    plan = plan_of(AWKWARD)
    found = filled(plan, tensors, step).tensors()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(found[name], tensor), name


def test_the_order_of_writing_does_not_matter() -> None:
    """Threads finish in any order."""
    tensors = random_tensors(1)
    plan = plan_of(AWKWARD)
    output = MemoryOutput(plan)
    pieces = []
    for tensor in plan.tensors:
        contents = bytes(tensors[tensor.name].contiguous().reshape(-1).view(torch.uint8).tolist())
        pieces += [(contents[at : at + 2], tensor.offset + at) for at in range(0, len(contents), 2)]
    random.Random(0).shuffle(pieces)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: output.write(memoryview(piece[0]), piece[1]), pieces))
    assert all(same(output.tensors()[name], tensor) for name, tensor in tensors.items())


def test_only_tensors_without_elements() -> None:
    """A model whose every tensor is empty takes no bytes, and no memory can be mapped of none."""
    plan = plan_of({"a": (torch.float32, (0,)), "b": (torch.int64, (2, 0))})
    assert plan.nbytes == 0
    found = MemoryOutput(plan).tensors()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        "a": (torch.float32, (0,)),
        "b": (torch.int64, (2, 0)),
    }


def test_a_zero_size_tensor_at_the_very_end() -> None:
    """Its offset is the end of the memory, where torch.frombuffer takes none."""
    plan = plan_of({"a": (torch.float32, (2,)), "z": (torch.uint8, (0,))})
    assert plan.tensors[-1].offset == plan.nbytes
    assert MemoryOutput(plan).tensors()["z"].shape == (0,)


def test_unwritten_memory_is_zero() -> None:
    assert all(not tensor.any() for tensor in MemoryOutput(plan_of({"a": (torch.float32, (9,))})).tensors().values())


def test_what_is_written_later_shows_in_tensors_taken_before() -> None:
    """The refresh writes statistics after the model took the weights; they are views, not copies."""
    plan = plan_of({"a": (torch.float32, (2,))})
    output = MemoryOutput(plan)
    before = output.tensors()["a"]
    output.write(memoryview(torch.tensor([1.5, -2.0]).numpy()).cast("B"), 0)
    assert before.tolist() == [1.5, -2.0]


def test_tensors_outlive_the_output() -> None:
    plan = plan_of(AWKWARD)
    tensors = random_tensors(2)
    found = filled(plan, tensors).tensors()
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("overhang", [1, 8])
def test_writing_beyond_the_end_is_an_error(overhang: int) -> None:
    """It must neither grow the memory nor lose bytes in silence."""
    plan = plan_of({"a": (torch.float32, (2,))})
    with pytest.raises((IndexError, ValueError)):
        MemoryOutput(plan).write(memoryview(bytes(8)), overhang)


@pytest.mark.parametrize("dtype", ["keep", "float64", "float32", "bfloat16", "float16"])
def test_holds_the_tensors_of_the_file_that_average_writes(tmp_path: Path, dtype: str) -> None:
    """Bit for bit, over awkward shapes and dtypes, for each output dtype and several windows in one pass."""
    paths = [tmp_path / f"step_{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_file(random_tensors(number), path)
    windows = [range(0, 1), range(3), range(1, 3), range(2, 3)]
    opened = [open_checkpoint(path) for path in paths]
    plan = make_plan([checkpoint.spec for checkpoint in opened], dtype=dtype)
    outputs = [MemoryOutput(plan) for _ in windows]
    write_means(
        opened,
        plan,
        [Mean(window, output.write) for window, output in zip(windows, outputs, strict=True)],
        device=CPU,
        threads=2,
        memory=2**20,
    )
    for checkpoint in opened:
        checkpoint.close()
    for window, output in zip(windows, outputs, strict=True):
        file = tmp_path / f"{window.start}-{window.stop}.out.safetensors"
        average([paths[index] for index in window], file, dtype=dtype, device="cpu")
        expected = load_file(file)
        found = output.tensors()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same(found[name], tensor), (window, name)


def test_takes_as_much_memory_as_the_data_section() -> None:
    """`--hold` is divided by this size: what is held must not be more than that."""
    plan = plan_of(AWKWARD)
    assert plan.nbytes == sum(
        math.prod(shape) * torch.empty((), dtype=dtype).element_size() for dtype, shape in AWKWARD.values()
    )
    output = MemoryOutput(plan)
    addresses = [tensor.data_ptr() for tensor in output.tensors().values() if tensor.numel()]
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in output.tensors().values() if tensor.numel()]
    assert max(ends) - min(addresses) <= plan.nbytes
