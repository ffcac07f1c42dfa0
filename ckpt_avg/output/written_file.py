"""A safetensors file that this package wrote, read back: its header, and the digests that it records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.checkpoint.spec import METHOD_KEY, TensorSpec
from ckpt_avg.errors import VerificationError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.safetensors_header import matches, parse_header, read_header
from ckpt_avg.output.provenance import Digests, header_digest, recorded_digests

ADVICE = "Restore it from a copy, or average the checkpoints again."


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file whose header is undamaged.

    Attributes:
        file: open.
        tensors: in it, by name, in the order of the header.
        metadata: its ``__metadata__``.
        recorded: the digests that it records.
    """

    file: InputFile
    tensors: Mapping[str, TensorSpec]
    metadata: dict[str, str]
    recorded: Digests

    @staticmethod
    def of(file: InputFile) -> WrittenFile:
        """Reads and verifies the header.

        Raises:
            VerificationError: it was changed, or this package did not write it.
            CheckpointFormatError: it breaks a rule of the format.
        """
        if not matches(file.read(0, min(file.size, 9))):
            raise VerificationError(
                f"{file.path}: expected a safetensors file that ckpt-avg wrote, got another kind of file. {ADVICE}"
            )
        text = read_header(file)
        tensors, metadata = parse_header(file, text)
        recorded = recorded_digests(metadata)
        if METHOD_KEY not in metadata or recorded is None:
            raise VerificationError(
                f"{file.path}: expected a file that ckpt-avg wrote, with digests in its metadata, got none. It was "
                f"written by another program, or is damaged. {ADVICE}"
            )
        refuse_other(file, "header", recorded.header, header_digest(file.read(0, 8 + len(text))))
        return WrittenFile(file, tensors, metadata, recorded)

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.file.path

    @property
    def nbytes(self) -> int:
        """Bytes of the data section."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_written(file: InputFile) -> bool:
    """Whether this package wrote a safetensors file, by its metadata.

    Raises:
        CheckpointFormatError: the header breaks a rule of the format.
    """
    return matches(file.read(0, min(file.size, 9))) and METHOD_KEY in parse_header(file, read_header(file))[1]


def refuse_other(file: InputFile, what: str, expected: str, found: str | None) -> None:
    """Raises VerificationError if the header or the data has another digest than the one that is recorded."""
    if found != expected:
        raise VerificationError(
            f"{file.path}: the {what} was changed or is damaged: expected the digest {expected}, got "
            f"{found or 'none'}. {ADVICE}"
        )
