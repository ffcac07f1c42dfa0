"""An average in memory: the same bytes at the same offsets as in the file, whatever the shapes and dtypes."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mean.inputs import bits, save
from mean.plans import Tensors, plan_of
from safetensors.torch import load_file

from ckpt_avg import average
from ckpt_avg.checkpoint.spec import DTYPES
from ckpt_avg.checkpoint.tensor_reads import torch_dtype
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean.memory_output import MemoryOutput
from ckpt_avg.mean.plan import Plan, make_plan
from ckpt_avg.mean.stream import Mean, write_means

State = dict[str, torch.Tensor]
AWKWARD: Tensors = {
    "zero": ("F32", (0,)),
    "zero.rows": ("F64", (3, 0, 2)),
    "scalar": ("F32", ()),
    "scalar.bf16": ("BF16", ()),
    "flag": ("BOOL", ()),
    "one": ("F16", (1,)),
    "count": ("I64", ()),
    "mask": ("BOOL", (3,)),
    "bytes": ("U8", (5,)),
    "complex": ("C64", (2, 3)),
    "double": ("F64", (3, 3)),
    "half": ("F16", (7,)),
    "f8": ("F8_E4M3", (3,)),
    "f8 zero": ("F8_E5M2", (0, 4)),
    "many": ("F32", (2, 1, 3, 1, 2)),
}


def random_tensors(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (code, shape) in AWKWARD.items():
        dtype = torch_dtype(DTYPES[code])
        if DTYPES[code].kind == "exact":
            state[name] = torch.ones(shape, dtype=dtype)
        else:
            wide = torch.complex64 if dtype.is_complex else torch.float64
            state[name] = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    return state


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def pieces(plan: Plan, state: State, step: int | None) -> list[tuple[bytes, int]]:
    """The bytes to write and their offsets, in pieces of so many bytes, or one for each tensor."""
    found = []
    for tensor in plan.tensors:
        contents = bits(state[tensor.name])
        size = step or max(1, len(contents))
        found += [(contents[at : at + size], tensor.offset + at) for at in range(0, len(contents), size)]
    return found


@pytest.mark.parametrize("step", [None, 1, 3])
def test_tensors_are_what_was_written(step: int | None) -> None:
    """In pieces that end within an element, in any order, by several threads, zero-size and 0-d tensors included."""
    state, plan = random_tensors(0), plan_of(AWKWARD)
    written = pieces(plan, state, step)
    random.Random(0).shuffle(written)

    def tensors() -> State:
        output = MemoryOutput(plan)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda piece: output.write(memoryview(piece[0]), piece[1]), written))
        return output.tensors()  # which outlive it

    assert_same(tensors(), state)


@pytest.mark.parametrize(
    ("tensors", "nbytes"),
    [({"a": ("F32", (0,)), "b": ("I64", (2, 0))}, 0), ({"a": ("F32", (2,)), "z": ("U8", (0,))}, 8)],
)
def test_tensors_without_elements(tensors: Tensors, nbytes: int) -> None:
    """No memory of 0 bytes can be mapped, and `torch.frombuffer` accepts no offset at the end of the memory."""
    plan = plan_of(tensors)
    assert plan.nbytes == plan.tensors[-1].offset == nbytes
    found = MemoryOutput(plan).tensors()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} == {
        name: (torch_dtype(DTYPES[code]), shape) for name, (code, shape) in tensors.items()
    }


def test_tensors_are_views_of_the_memory() -> None:
    """The refresh writes statistics after the model received the weights. Memory is zero before."""
    output = MemoryOutput(plan_of({"a": ("F32", (2,))}))
    before = output.tensors()["a"]
    assert before.tolist() == [0.0, 0.0]
    output.write(memoryview(torch.tensor([1.5, -2.0]).numpy()).cast("B"), 0)
    assert before.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("overhang", [1, 8])
def test_writing_beyond_the_end_is_an_error(overhang: int) -> None:
    """It must neither grow the memory nor lose bytes silently."""
    with pytest.raises((IndexError, ValueError)):
        MemoryOutput(plan_of({"a": ("F32", (2,))})).write(memoryview(bytes(8)), overhang)


@pytest.mark.parametrize("dtype", ["keep", "float64", "float32", "bfloat16", "float16"])
def test_several_means_in_one_pass_are_what_average_writes(tmp_path: Path, dtype: str) -> None:
    """Bit for bit, over awkward shapes and dtypes, for each output dtype."""
    paths = save(tmp_path, [random_tensors(number) for number in range(3)])
    chosen = [range(0, 1), range(3), range(1, 3), range(2, 3)]
    opened = [open_checkpoint(path) for path in paths]
    plan = make_plan([checkpoint.spec for checkpoint in opened], dtype=dtype)
    outputs = [MemoryOutput(plan) for _ in chosen]
    means = [Mean(indices, output.write) for indices, output in zip(chosen, outputs, strict=True)]
    write_means(opened, plan, means, device="cpu", threads=2, memory=2**20)
    for checkpoint in opened:
        checkpoint.close()
    for indices, output in zip(chosen, outputs, strict=True):
        file = tmp_path / f"{indices.start}-{indices.stop}.out.safetensors"
        average([paths[index] for index in indices], file, dtype=dtype, device="cpu")
        assert_same(output.tensors(), load_file(file))


def test_takes_as_much_memory_as_the_data_section() -> None:
    """`--hold` is divided by this size, so an output must not take more."""
    plan = plan_of(AWKWARD)
    tensors = MemoryOutput(plan).tensors().values()
    assert plan.nbytes == sum(tensor.nbytes for tensor in tensors)
    addresses = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.numel()]
    assert max(end for _, end in addresses) - min(begin for begin, _ in addresses) <= plan.nbytes
