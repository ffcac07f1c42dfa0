"""Tensors of torch files that contradict their storages, and contents that cannot be averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from formats.pickles.opcodes import called, named, sequence, text, whole
from formats.reading import read, refusal
from formats.torch_bytes import (
    DAMAGED,
    DATA,
    DISTRUST,
    PICKLE,
    Member,
    archive,
    holding,
    number,
    state,
    storage,
    tensor,
    weights,
    write,
)

from ckpt_avg.errors import NoWeightsError
from ckpt_avg.formats.open import open_checkpoint

HUGE = 10**5000  # more digits than Python prints
ONE = b"K\1\x85"


def rebuilt(*arguments: bytes) -> bytes:
    """A tensor of arguments that `tensor` does not make."""
    return called(named("torch._utils", "_rebuild_tensor_v2"), *arguments)


def w(*arguments: Any, **keywords: Any) -> bytes:
    """A file of one tensor."""
    return holding(weights(tensor(*arguments, **keywords)))


SHAPE = f"expected a tuple of integers as shape or stride, got 'tuple'. {DISTRUST}"
LIES: dict[str, tuple[bytes, str]] = {
    "no record": (archive(PICKLE), "tensor 'w': expected the record '0', got none. Copy the file again."),
    "a record of another key": (w(storage(key=text("1"))), "tensor 'w': expected the record '1', got none."),
    "a record elsewhere": (w(storage(key=text("../data.pkl"))), "expected the record '../data.pkl', got none"),
    "a record that is too long": (
        archive(PICKLE, Member(b"a/data/0", DATA + b"\0")), f"'w': expected a record of 8 bytes, got 9. {DAMAGED}"),
    "a record that is too short": (w(storage(numel=whole(3))), "tensor 'w': expected a record of 12 bytes, got 8."),
    "a record of another dtype": (
        w(storage(named("torch", "DoubleStorage"))), "tensor 'w': expected a record of 16 bytes, got 8."),
    **{
        f"a view past its end by its {name}": (
            w(**{name: value}),
            "tensor 'w': expected elements inside a record of 8 bytes, got a view that ends at byte 12. Save it again.")
        for name, value in (("offset", 1), ("shape", (3,)), ("stride", (2,)))
    },
    "a view before its start": (w(offset=-1), "tensor 'w': expected sizes and strides from 0 to 2⁶³−1, got shape (2,)"),
    "a negative stride": (
        w(offset=1, stride=(-1,)),
        "tensor 'w': expected sizes and strides from 0 to 2⁶³−1, got shape (2,), stride (-1,), offset 1. Save it again",
    ),
    "a negative size": (w(shape=(-2,)), "tensor 'w': expected sizes and strides from 0 to 2⁶³−1, got shape (-2,)"),
    "more sizes than strides": (w(stride=()), "tensor 'w': expected sizes and strides"),
    "a size of 2^63": (w(shape=(2**63,), stride=(0,)), f"got shape ({2**63},)"),
    "sizes whose product overflows": (
        w(shape=(2**32, 2**32), stride=(0, 0)),
        "tensor 'w': shape (4294967296, 4294967296) overflows 63 bits. Save it again.",
    ),
    "the same with a zero": (w(shape=(0, 2**62, 2**62), stride=(1, 1, 1)), "overflows 63 bits"),
    "an expansion bomb": (
        w(shape=(10**6, 10**6), stride=(0, 0)),
        "tensor 'w': expected at most the 8 bytes of its record, got an expanded view of 4,000,000,000,000 bytes. Save "
        "tensor.contiguous() instead.",
    ),
    "an endless size": (w(shape=(HUGE,)), "tensor 'w': "),
    "an endless stride": (w(stride=(HUGE,)), "tensor 'w': "),
    "an endless offset": (w(offset=HUGE), "tensor 'w': "),
    "an endless storage": (w(storage(numel=number(HUGE))), "tensor 'w': expected a record of <int too long to print>"),
    "65 dimensions": (
        w(shape=(1,) * 65, stride=(1,) * 65), f"expected a shape or stride of at most 64 integers, got 65. {DISTRUST}"),
    "a text as shape": (
        holding(weights(called(named("torch", "Size"), text("22")))),
        f"expected a tuple of integers as shape or stride, got 'str'. {DISTRUST}",
    ),
    "a number as size": (
        holding(weights(rebuilt(storage(), b"K\0", b"G" + bytes(8) + b"\x85", ONE, b"\x89", b"}"))), SHAPE),
    "a truth as size": (holding(weights(rebuilt(storage(), b"K\0", b"\x88\x85", ONE, b"\x89", b"}"))), SHAPE),
    "no shape": (holding(weights(rebuilt(storage(), b"K\0", b"N", ONE, b"\x89", b"}"))), "shape or stride"),
    "no offset": (holding(weights(rebuilt(storage(), b"N", ONE, ONE, b"\x89", b"}"))), "refers to no storage"),
    **{
        f"one storage as {name}": (
            holding(state((text("w"), tensor()), (text("v"), tensor(second)))),
            f"storage '0' has two types or sizes in the pickle. {DISTRUST}")
        for name, second in (("Int", storage(named("torch", "IntStorage"))), ("longer", storage(numel=whole(3))))
    },
    "no storage": (
        holding(weights(rebuilt(b"N", b"K\0", b")", b")"))),
        f"a tensor of the pickle refers to no storage. {DISTRUST}",
    ),
    # contents that only opcodes can make
    "a quantized storage": (
        w(storage(named("torch", "QInt8Storage"))), "tensor 'w': expected a plain tensor, got a quantized tensor"),
    **{
        f"a wrapper subclass of {module!r}": (
            holding(weights(called(
                named("torch._tensor", "_rebuild_from_type_v2"),
                named("torch._utils", "_rebuild_wrapper_subclass"), named(module, "T"), b")", b"}",
            ))),
            f"tensor 'w': expected a plain tensor, got a tensor subclass ({shown}.T)",
        )
        for module, shown in (("torch.distributed.tensor",) * 2, ("evil\x1b[31m", r"evil\x1b[31m"))
    },
    "a tensor of several ranks": (
        holding(weights(called(
            named("torch._utils", "_rebuild_wrapper_subclass"), named("torch.distributed.tensor", "DTensor"), b")"))),
        "(torch.distributed.tensor.DTensor). It may be one rank's part. Save with torch.distributed.checkpoint, or",
    ),
    "a torchao tensor": (
        holding(weights(called(
            named("torch._utils", "_rebuild_wrapper_subclass"), named("torchao.dtypes", "AffineTensor"), b")"))),
        "a tensor subclass (torchao.dtypes.AffineTensor). Average the checkpoints before quantisation.",
    ),
    "tuples and classes as names": (
        holding(state((sequence(text("a"), whole(1)), tensor()), (sequence(sequence(whole(2))), b"N"),
                      (named("m", "C"), b"N"), (named("torch", "float16"), b"N"))),
        "a dict with the keys ('a', 1), ((2,),), m.C, torch.float16, which contains no named tensors",
    ),
    "bytes as name": (
        holding(state((b"C\1w", tensor()), (text("v"), tensor()))), "expected tensor names, got the key b'w'."),
    "a tensor in a list": (
        holding(state((text("w"), tensor()), (text("v"), b"]" + tensor() + b"a"))),
        "the file: 'v': expected a plain tensor, got tensors inside a list. Save model.state_dict(), whose values are",
    ),
    "an object of an unknown class": (
        holding(named("models", "Net") + b")\x81"),
        "expected a state dict, got a pickled object of class 'models.Net'. In a trusted environment, load it and save "
        "model.state_dict() instead.",
    ),
}  # fmt: skip


@pytest.mark.guarantee("expanded-views", "odd-tensors", "pickled-modules", "storage-bounds", "tensor-keys")
@pytest.mark.parametrize("case", LIES)
def test_what_contradicts_itself_or_has_no_elements_is_refused(tmp_path: Path, case: str) -> None:
    """No view leaves its record, none expands without limit, and no number is too long for a message."""
    content, fact = LIES[case]
    assert fact in refusal(write(tmp_path, content))


def test_nothing_next_to_the_weights_breaks_the_message(tmp_path: Path) -> None:
    """Numbers too long to print, in keys that are only listed."""
    huge = (number(HUGE), b"K\1")
    for contents in (state((text("w"), tensor()), huge), state((text("model"), weights(tensor())), huge)):
        assert list(read(write(tmp_path, holding(contents)))) == ["w"]
    refusal(write(tmp_path, holding(state(huge))), NoWeightsError)


@pytest.mark.parametrize("contents", [
    state((text("\x1b[31m\n"), weights(tensor())), (text("other"), weights(tensor()))),
    state((text("model"), state((text("w"), tensor()), (text("\x1b[31m\n"), weights(tensor()))))),
])  # fmt: skip
def test_names_from_the_pickle_are_shown_escaped(tmp_path: Path, contents: bytes) -> None:
    """Control characters in keys never reach the terminal."""
    assert r"\x1b[31m\n" in refusal(write(tmp_path, holding(contents)))


@pytest.mark.guarantee("tensor-keys")
def test_of_one_name_twice_in_a_dict_the_last_counts(tmp_path: Path) -> None:
    """As Python itself reads it, and torch.load."""
    twice = state((text("w"), tensor(shape=(1,))), (text("w"), tensor(offset=1, shape=(1,))))
    path = write(tmp_path, holding(twice, Member(b"a/version", b"3\n")))
    assert torch.load(path)["w"].tolist() == read(path)["w"].tolist() == [2]


def test_a_damaged_number_next_to_the_weights_does_no_harm(tmp_path: Path) -> None:
    """The epoch as a tensor with a record that is too long: the weights don't depend on it."""
    epoch = tensor(storage(key=text("1"), numel=whole(1)), shape=(1,))
    content = holding(state((text("epoch"), epoch), (text("model"), weights(tensor()))), Member(b"a/data/1", DATA))
    with open_checkpoint(write(tmp_path, content)) as checkpoint:
        assert (list(checkpoint.spec.tensors), checkpoint.spec.record.epoch) == (["w"], None)
