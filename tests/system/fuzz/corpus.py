"""Small valid inputs for each parser, cut into the pieces that a mutator works with.

A seed is a list of pieces, JSON tokens or pickle operations, and a frame that puts a file around them. So an edit
of a header or a pickle does not merely break the length before it or the directory after it.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from formats.pickles.opcodes import (
    MAGIC,
    called,
    large,
    listed,
    mapping,
    named,
    operations,
    proto,
    restored,
    sequence,
    tensor,
    text,
    whole,
)

_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9.eE+]+|[{}\[\]:,]|[a-z]+|.', re.S)
_DCP = "torch.distributed.checkpoint.metadata"
FLOATS = struct.pack("<6f", *range(6))


@dataclass(frozen=True, slots=True)
class Seed:
    """A valid input: ``frame`` of all pieces together."""

    pieces: tuple[bytes, ...]
    frame: Callable[[bytes], bytes]

    @property
    def content(self) -> bytes:
        """The input itself."""
        return self.frame(b"".join(self.pieces))


def safetensors_file(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def stored_zip(members: Mapping[str, bytes], *, wide: bool = False) -> bytes:
    """A zip of uncompressed members; ``wide``: sizes as zip64 has them, and its two records at the end."""
    body, directory = b"", b""
    for name, content in members.items():
        raw, crc, size = name.encode(), zlib.crc32(content), len(content)
        short = 0xFFFFFFFF if wide else size
        extra = struct.pack("<2H2Q", 1, 16, size, size) if wide else b""
        common = struct.pack("<5H3I2H", 45, 0, 0, 0, 0, crc, short, short, len(raw), len(extra))
        directory += b"PK\1\2" + struct.pack("<H", 45) + common + struct.pack("<3H2I", 0, 0, 0, 0, len(body))
        directory += raw + extra
        body += b"PK\3\4" + common + raw + extra + content
    count, start = len(members), len(body)
    end64 = b"PK\6\6" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, len(directory), start)
    end64 += b"PK\6\7" + struct.pack("<IQI", 0, start + len(directory), 1)
    end = b"PK\5\6" + struct.pack("<4H2IH", 0, 0, count, count, len(directory), start, 0)
    return body + directory + (end64 if wide else b"") + end


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _json_seed(value: object, frame: Callable[[bytes], bytes]) -> Seed:
    return Seed(tuple(_TOKENS.findall(json.dumps(value, separators=(",", ":")).encode())), frame)


def _bare(content: bytes) -> bytes:
    return content


def _safetensors() -> list[Seed]:
    first = {"__metadata__": {"format": "pt"}, "a.weight": _entry("F32", [2, 3], 0, 24), "n": _entry("I64", [], 24, 32)}
    second = {
        "b": _entry("BF16", [2], 1, 5),
        "é": _entry("F8_E4M3", [1], 0, 1),
        "none": _entry("F16", [0, 4], 5, 5),
        "flags": _entry("BOOL", [3, 1, 1], 5, 8),
    }
    return [
        _json_seed(first, lambda header: safetensors_file(header, FLOATS + bytes(8))),
        _json_seed(second, lambda header: safetensors_file(header, bytes(8))),
    ]


def _state() -> dict[bytes, bytes]:
    return {
        text("w"): tensor("0", (2, 3)) + b"q\1",
        text("tied"): b"h\1",
        text("n"): tensor("1", (), kind="LongStorage"),
    }


def checkpoint_pickle(extra: Mapping[bytes, bytes]) -> bytes:
    """A training checkpoint, with something next to its weights."""
    return proto(mapping({text("model"): mapping(_state()), text("epoch"): b"K\3", **extra}))


def torch_zip(stream: bytes, *, wide: bool = False) -> bytes:
    """An archive as torch.save writes it around a pickle."""
    members = {"a/data.pkl": stream, "a/byteorder": b"little", "a/data/0": FLOATS, "a/data/1": bytes(8)}
    return stored_zip({**members, "a/version": b"3\n"}, wide=wide)


def _groups() -> bytes:
    rate = b"G" + struct.pack(">d", 0.1)
    return mapping({text("param_groups"): listed(mapping({text("lr"): rate, text("betas"): rate + rate + b"\x86"}))})


def array() -> bytes:
    """A numpy array that the pickle holds itself."""
    kind = called(named("numpy", "dtype"), text("f4"), b"\x89", b"\x88")
    kind += sequence(whole(3), text("<"), b"N", b"N", b"N", whole(-1), whole(-1), whole(0)) + b"b"
    start = called(named("numpy._core.multiarray", "_reconstruct"), named("numpy", "ndarray"), b"K\0\x85", b"C\1b")
    return start + sequence(b"K\1", whole(6) + b"\x85", kind, b"\x89", b"C\x18" + FLOATS) + b"b"


def _module() -> bytes:
    empty = called(named("collections", "OrderedDict"))
    inner = {"_parameters": mapping(_state()), "_buffers": empty, "_modules": empty, "training": b"\x88"}
    layer = restored("torch.nn.modules.linear", "Linear", inner)
    outer = {"_parameters": b"}", "_buffers": b"}", "_modules": mapping({text("layer"): layer})}
    return restored("net", "Net", outer)


def _pickles() -> list[bytes]:
    others = {
        text("optimizer"): _groups(),
        text("keys"): called(named("builtins", "set"), listed(b"K\1", text("a"))),
        text("huge"): large(2**80),
    }
    later = b"\x8f(K\1\x8c\1a\x90\x940\x96" + struct.pack("<Q", 2) + b"ab\x94h\0C\1b\x87"
    return [
        checkpoint_pickle(others),
        checkpoint_pickle({text("array"): array()}),
        proto(_module()),
        proto(mapping({text("w"): tensor("0", (2, 3)), text("later"): later}), 5),
    ]


def _stream() -> list[Seed]:
    machine = {text("protocol_version"): whole(1001), text("little_endian"): b"\x88"}
    start = [proto(large(MAGIC)), proto(whole(1001)), proto(mapping(machine))]
    count = tensor("1", (), kind="LongStorage", view=True)
    state = mapping({text("w"): tensor("0", (2, 3), view=True), text("n"): count})
    data = struct.pack("<q", 6) + FLOATS + struct.pack("<q", 1) + bytes(8)
    bodies = [mapping({text("model"): state, text("epoch"): b"K\3"}), state]
    keys = proto(listed(text("0"), text("1")))
    return [Seed((*operations(*start, proto(body), keys), data), _bare) for body in bodies]


def _index() -> list[Seed]:
    index = {"metadata": {"total_size": 32}, "weight_map": {"a.weight": SHARDS[0], "n": SHARDS[0], "b": SHARDS[1]}}
    return [_json_seed(index, _bare), _json_seed({"weight_map": index["weight_map"]}, _bare)]


def _chunk(start: int) -> bytes:
    sizes = {"offsets": b"K" + bytes([start]) + b"K\0\x86", "sizes": b"K\1K\3\x86"}
    return restored(_DCP, "ChunkStorageMetadata", sizes)


def _part() -> bytes:
    return stored_zip({"archive/data.pkl": proto(tensor("0", (1, 3))), "archive/data/0": FLOATS[:12]})


def _dcp() -> list[Seed]:
    properties = named(_DCP, "TensorProperties") + b")\x81"
    properties += sequence(named("torch", "float32"), b"N", b"\x89", b"N", b"\x89") + b"b"
    size = called(named("torch", "Size"), b"K\2K\3\x86")
    whole_tensor = {"properties": properties, "size": size, "chunks": listed(_chunk(0), _chunk(1))}
    entries = {
        text("model.w"): restored(_DCP, "TensorStorageMetadata", whole_tensor),
        text("step"): restored(_DCP, "BytesStorageMetadata", {}),
    }
    stored, length = {}, len(_part())
    for start in range(2):
        index = {"fqn": text("model.w"), "offset": b"K" + bytes([start]) + b"K\0\x86", "index": b"K" + bytes([start])}
        info = {"relative_path": text("__0_0.distcp"), "offset": whole(start * length), "length": whole(length)}
        key = restored(_DCP, "MetadataIndex", index)
        stored[key] = restored("torch.distributed.checkpoint.filesystem", "_StorageInfo", info)
    planner = {text("model.w"): text("model") + text("w") + b"\x86", text("step"): text("step") + b"\x85"}
    state = {"state_dict_metadata": mapping(entries), "storage_data": mapping(stored)}
    bodies = [
        restored(_DCP, "Metadata", {**state, "planner_data": mapping(planner)}),
        restored(_DCP, "Metadata", state),
    ]
    return [Seed(operations(proto(body)), _bare) for body in bodies]


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SEEDS: Mapping[str, list[Seed]] = {
    "safetensors": _safetensors(),
    "zip": [Seed(operations(each), torch_zip) for each in _pickles()]
    + [Seed(operations(_pickles()[0]), lambda stream: torch_zip(stream, wide=True))],
    "pickle": [Seed(operations(each), _bare) for each in _pickles()],
    "stream": _stream(),
    "index": _index(),
    "dcp": _dcp(),
}
PARSERS = tuple(SEEDS)


def write_companions(parser: str, folder: Path) -> None:
    """Writes the sound files that an index or a metadata file names."""
    if parser == "index":
        (folder / SHARDS[0]).write_bytes(SEEDS["safetensors"][0].content)
        header = json.dumps({"b": _entry("U8", [1], 0, 1)}).encode()
        (folder / SHARDS[1]).write_bytes(safetensors_file(header, b"\1"))
    elif parser == "dcp":
        (folder / "__0_0.distcp").write_bytes(_part() * 2)
