"""The header, against files that safetensors itself writes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ckpt_avg import IncompatibleError, OutputError, average, open_checkpoint
from ckpt_avg.checkpoint.spec import DTYPES
from ckpt_avg.limits import Limits
from ckpt_avg.mean.plan import Plan, make_plan
from ckpt_avg.output import header
from ckpt_avg.output.header import encode_header, encode_tensors, refuse_damaged
from ckpt_avg.output.unpublished_file import UnpublishedFile

NAMES = [
    *("", " ", "a", "A", "a.b", "a/b", "../../etc/passwd", 'quo"te', "back\\slash", "line\nfeed", "tab\t", "\r", "\b"),
    *("\f", "\x01", "\x1f", "\x7f", "\x80", "é", "e\u0301", "ß", "中文", "😀", "\u2028", "\ufeff", "\uffff"),
    *("\U0010ffff", "null", "x" * 300, "weight", "weight.", ".weight", "__metadata", "format", "</script>", "z" * 7),
]
SHAPES = [(), (0,), (1,), (3,), (2, 0, 3), (2, 3), (1, 1, 1, 1), (7, 5), (17,)]


def random_state(seed: int) -> dict[str, torch.Tensor]:
    """Awkward names, dtypes and shapes; finite numbers."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    state = {}
    for name in rng.sample(NAMES, rng.randint(1, 9)):
        dtype, shape = rng.choice(list(DTYPES.values())), rng.choice(SHAPES)
        torch_dtype = getattr(torch, dtype.torch_name)
        if dtype.kind in ("float", "complex"):
            state[name] = torch.randn(shape, dtype=torch.complex64 if dtype.kind == "complex" else None).to(torch_dtype)
        elif dtype.kind == "float8":
            state[name] = torch.randn(shape).to(torch_dtype)
        elif dtype.torch_name == "float8_e8m0fnu":
            state[name] = torch.randint(0, 255, shape, dtype=torch.uint8).view(torch_dtype)
        else:
            state[name] = torch.randint(0, 2, shape).to(torch_dtype)
    return state


def data_of(state: dict[str, torch.Tensor], plan: Plan) -> bytes:
    return b"".join(
        state[tensor.name].flatten().view(torch.uint8).numpy().tobytes() for tensor in plan.tensors if tensor.numel
    )


def split(contents: bytes) -> tuple[bytes, bytes]:
    length = 8 + int.from_bytes(contents[:8], "little")
    return contents[:length], contents[length:]


@pytest.mark.parametrize("seed", range(200))
def test_files_are_byte_for_byte_those_of_safetensors(tmp_path: Path, seed: int) -> None:
    """Header and data of a file with no or one metadata key; and the data that `average` of it writes."""
    state = random_state(seed)
    key = random.Random(seed).choice(NAMES)
    metadata = {} if seed % 2 else {key: random.Random(-seed).choice(NAMES)}
    save_file(state, tmp_path / "reference.safetensors", metadata or None)
    reference = (tmp_path / "reference.safetensors").read_bytes()
    with open_checkpoint(tmp_path / "reference.safetensors") as checkpoint:
        plan = make_plan([checkpoint.spec])
    assert encode_header(encode_tensors(plan.tensors), metadata) + data_of(state, plan) == reference
    average([tmp_path / "reference.safetensors"], tmp_path / "mean.safetensors")
    head, data = split((tmp_path / "mean.safetensors").read_bytes())
    assert data == split(reference)[1]
    with safe_open(tmp_path / "mean.safetensors", framework="pt") as reader:
        assert encode_header(encode_tensors(plan.tensors), reader.metadata()) == head


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan of two tensors."""
    save_file({"a": torch.ones(3), "b": torch.ones(2).half()}, tmp_path / "x.safetensors")
    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        return make_plan([checkpoint.spec])


def test_metadata_is_first_and_sorted_whatever_its_order(plan: Plan) -> None:
    """safetensors itself writes several keys in another order in every process."""
    metadata = {key: key.upper() for key in ["zebra", "apple", "mango", "Äpfel"]}
    encoded = encode_header(encode_tensors(plan.tensors), metadata)
    assert encoded == encode_header(encode_tensors(plan.tensors), dict(reversed(metadata.items())))
    parsed = json.loads(encoded[8:])
    assert next(iter(parsed)) == "__metadata__"
    assert list(parsed["__metadata__"]) == sorted(metadata)


def test_no_metadata_is_left_out(plan: Plan) -> None:
    assert "__metadata__" not in json.loads(encode_header(encode_tensors(plan.tensors), {})[8:])


@pytest.mark.parametrize("size", [0, 1, 150, 400, 401, 403, 1000, 4096])
@pytest.mark.parametrize("room", [0, 1, 7, 8, 30])
def test_a_longer_header_is_padded_with_spaces_to_a_multiple_of_eight(
    plan: Plan, tmp_path: Path, size: int, room: int
) -> None:
    plain = encode_header(encode_tensors(plan.tensors), {"k": "v"})
    padded = encode_header(encode_tensors(plan.tensors), {"k": "v"}, size=size, room=room)
    least = max(len(plain.rstrip(b" ")) + room, size)
    assert least <= len(padded) < least + 8
    assert len(padded) % 8 == 0
    assert padded[8:].rstrip(b" ") == plain[8:].rstrip(b" ")
    assert int.from_bytes(padded[:8], "little") == len(padded) - 8
    path = tmp_path / "padded.safetensors"
    path.write_bytes(padded + data_of({"a": torch.ones(3), "b": torch.ones(2).half()}, plan))
    assert load_file(path)["a"].tolist() == [1, 1, 1]


def test_there_is_room_for_metadata_that_grow(plan: Plan) -> None:
    """If it failed, the data would begin elsewhere once the metadata are complete."""
    for grown in range(31):
        first = encode_header(encode_tensors(plan.tensors), {"k": "v"}, room=30)
        assert len(encode_header(encode_tensors(plan.tensors), {"k": "v" * (1 + grown)}, size=len(first))) == len(first)


def test_a_header_over_the_formats_limit_is_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    length = len(encode_header(encode_tensors(plan.tensors), {})) - 8
    monkeypatch.setattr(header, "LIMITS", Limits(header=length))
    assert len(encode_header(encode_tensors(plan.tensors), {})) == length + 8
    monkeypatch.setattr(header, "LIMITS", Limits(header=length - 1))
    with pytest.raises(
        IncompatibleError, match=rf"would be {length:,} bytes long, but safetensors allows {length - 1:,}"
    ):
        encode_header(encode_tensors(plan.tensors), {})


# What happens to a file of 8 bytes of length, a header and 16 bytes of data before it is published.
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "another length": lambda content: bytes([content[0] - 8]) + content[1:],
    "a length beyond the file": lambda content: b"\xff\xff\xff\x00" + content[4:],
    "another name": lambda content: content.replace(b'"a"', b'"c"'),
    "another metadata key": lambda content: content.replace(b'"k"', b'"l"'),
    "a bit of the padding": lambda content: content[:-17] + b"!" + content[-16:],
    "no header": lambda content: bytes(len(content)),
    "a byte less": lambda content: content[:-1],
    "a byte more": lambda content: content + b"x",
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header_is_noticed(plan: Plan, tmp_path: Path, damage: str) -> None:
    """And what was written is accepted."""
    encoded = encode_header(encode_tensors(plan.tensors), {"k": "v"}, room=9)
    path = tmp_path / "out.safetensors"
    path.write_bytes(encoded + bytes(plan.nbytes))
    refuse_damaged(path, encoded, len(encoded) + plan.nbytes, tmp_path / "target")
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(OutputError, match=r"target: .* It is not published\."):
        refuse_damaged(path, encoded, len(encoded) + plan.nbytes, tmp_path / "target")


def test_brackets_in_the_names_of_many_sources_are_no_damage(plan: Plan, tmp_path: Path) -> None:
    """A finished run would be thrown away, because of the names of its checkpoints."""
    encoded = encode_header(encode_tensors(plan.tensors), {"sources": "lr[1e-3]_wd[0] " * 10_000})
    path = tmp_path / "out.safetensors"
    path.write_bytes(encoded + bytes(plan.nbytes))
    refuse_damaged(path, encoded, len(encoded) + plan.nbytes, path)


def test_a_header_that_would_not_be_read_again_is_refused(plan: Plan, tmp_path: Path) -> None:
    """Such as one with brackets without end in its metadata."""
    encoded = encode_header(encode_tensors(plan.tensors), {"k": "[" * 200_000})
    path = tmp_path / "out.safetensors"
    path.write_bytes(encoded + bytes(plan.nbytes))
    with pytest.raises(OutputError, match=r"cannot be read: .*too many other values"):
        refuse_damaged(path, encoded, len(encoded) + plan.nbytes, path)


def test_an_output_whose_header_is_damaged_is_not_published(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = UnpublishedFile.write

    def write_damaged(file: UnpublishedFile, contents: memoryview | bytes, offset: int) -> None:
        write(file, bytes(contents).replace(b"F32", b"I32") if offset == 0 else contents, offset)

    monkeypatch.setattr(UnpublishedFile, "write", write_damaged)
    with pytest.raises(OutputError, match="is not what was written"):
        average(run_folder, tmp_path / "out.safetensors", bn="keep")
    assert not list(tmp_path.iterdir())
