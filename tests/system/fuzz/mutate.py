"""A seeded mutator that knows what it edits: JSON tokens, pickle operations, length fields, zip records, and bits."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from random import Random

from formats.pickles.opcodes import named, tensor, text
from system.fuzz.corpus import SEEDS, Seed

_NUMBERS = [0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**60]
_NUMBERS += [2**62, 2**63 - 1, 2**63, 2**64 - 1]
_JSON = [*rb"""{ } [ ] , : " null true NaN""".split(), b" ", b"\t", b"\n", b"\\", b'"\\ud800"']
_JSON += [b"-0", b"-1", b"1.0", b"1e0", b"1e999", b"9" * 400, b"9" * 5000, b"[" * 2000, b'{"a":' * 500, b"\xef\xbb\xbf"]
_JSON += [*rb'''"__metadata__" "weight_map" "../x" "F4" "U8" "BF16" "" "\u0000"'''.split(), b"\xff", b"\x00"]
_JSON += [str(number).encode() for number in (*_NUMBERS, 2**64, 10**30)]
_CODES = b"().0123KMJLFGIVSUXTBCRbiocdtlseauagjhpqrPQN\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89"
_PICKLE = [bytes([code]) for code in (*_CODES, *range(0x8A, 0x99), *b"}])(201\x94\x91")]
_PICKLE += [b"K\0", b"K\2", b"h\1", b"q\1", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\x7f", b"I-1\n"]
_PICKLE += [b"L" + b"9" * 5000 + b"L\n", b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"\x96" + b"\xff" * 7 + b"\0"]
_PICKLE += [b"\x95" + b"\xff" * 8, b"p99\n"]
_PICKLE += [named("os", "system"), named("torch", "Size"), named("numpy", "dtype"), named("torch", "BoolStorage")]
_PICKLE += [text("storage"), text("0"), text("\ud800"), text("x" * 300), tensor("0", (6,))]
_PICKLE += [b"\x82\1", b"Px\n", b"(i\nx\n"]

# Where numbers follow each signature of a zip: (offset, bytes).
_ZIP = {
    b"PK\3\4": [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
    b"PK\1\2": [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4)],
    b"PK\5\6": [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
    b"PK\6\6": [(4, 8), (16, 4), (24, 8), (32, 8), (40, 8), (48, 8)],
    b"PK\6\7": [(4, 4), (8, 8), (16, 4)],
}
_SIGNATURE = re.compile(b"|".join(map(re.escape, _ZIP)))


def tokens_of(parser: str) -> Sequence[bytes]:
    """Returns the pieces that are put in: JSON tokens or pickle operations."""
    return _JSON if parser in ("safetensors", "index") else _PICKLE


def inputs(parser: str, seed: int) -> Iterator[bytes]:
    """Yields mutated inputs without end, the same ones for the same seed."""
    rng = Random(f"{parser} {seed}")
    seeds, tokens = SEEDS[parser], tokens_of(parser)
    while True:
        yield mutated(rng, rng.choice(seeds), tokens, parser)


def mutated(rng: Random, seed: Seed, tokens: Sequence[bytes], parser: str) -> bytes:
    """Returns a seed with a few edits: of its pieces, of its fields, of its bytes."""
    way = rng.random()
    pieces = list(seed.pieces)
    if way < 0.75:
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
            _edit_pieces(rng, pieces, tokens)
    content = seed.frame(b"".join(pieces))
    if 0.65 < way < 0.9 and parser in ("zip", "safetensors"):
        content = _edit_field(rng, content, parser)
    elif way > 0.75:
        content = _edit_bytes(rng, content)
    return content


def _edit_pieces(rng: Random, pieces: list[bytes], tokens: Sequence[bytes]) -> None:
    at = rng.randrange(len(pieces)) if pieces else 0
    way = rng.randrange(10)
    if way <= 2 or not pieces:
        pieces.insert(at, rng.choice(tokens))
    elif way <= 4:
        pieces[at] = rng.choice(tokens)
    elif way == 5:
        del pieces[at : at + rng.choice((1, 1, 2, 5))]
    elif way == 6:  # a copy of other pieces
        begin = rng.randrange(len(pieces))
        pieces[at:at] = pieces[begin : begin + rng.choice((1, 1, 3, 10))]
    elif way == 7:
        other = rng.randrange(len(pieces))
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif way == 8:
        pieces[at : at + 1] = [pieces[at]] * rng.choice((2, 3, 50))
    else:
        pieces[at] = _edit_bytes(rng, pieces[at])


def _edit_field(rng: Random, content: bytes, parser: str) -> bytes:
    if parser == "safetensors":
        at, width = 0, 8
    else:
        records = [match.start() for match in _SIGNATURE.finditer(content)]
        if not records:
            return content
        record = rng.choice(records)
        offset, width = rng.choice(_ZIP[content[record : record + 4]])
        at = record + offset
    before = int.from_bytes(content[at : at + width], "little")
    value = rng.choice((before - 1, before + 1, before ^ (1 << rng.randrange(8 * width)), rng.choice(_NUMBERS)))
    return content[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + content[at + width :]


def _edit_bytes(rng: Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    way = rng.randrange(8)
    if way == 0:
        return content[:at]
    if way == 1:
        return content[:at] + rng.randbytes(rng.choice((1, 2, 8))) + content[at:]
    if way == 2:
        return content[:at] + content[at + rng.choice((1, 2, 8)) :]
    if way == 3:
        raw = struct.pack("<Q", rng.choice(_NUMBERS))[: rng.choice((1, 2, 4, 8))]
        return content[:at] + raw + content[at + len(raw) :]
    if way == 4:  # a part of it again
        begin = rng.randrange(len(content) + 1)
        return content[:at] + content[begin : begin + rng.randrange(1, 40)] + content[at:]
    if way == 5:
        return content + rng.randbytes(rng.choice((1, 8, 100)))
    edited = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if content else 0):
        edited[rng.randrange(len(edited))] ^= 1 << rng.randrange(8)
    return bytes(edited)
