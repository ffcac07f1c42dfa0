"""`verify`: whether a file that was written here is whole and undamaged, and the mean of given checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import METHOD_KEY, TensorSpec
from ckpt_avg.errors import CheckpointFormatError, VerificationError
from ckpt_avg.files.input_file import InputFile, check_io
from ckpt_avg.formats.safetensors_header import looks_like, parse_header, read_header
from ckpt_avg.machine import choose_threads
from ckpt_avg.output.digests import digest_data
from ckpt_avg.output.provenance import Digests, header_digest, recorded_digests
from ckpt_avg.progress import Progress
from ckpt_avg.runs.discover import Sources

_ADVICE = "Restore it from a copy, or average the checkpoints again."


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found of a file that is as it was written.

    Attributes:
        path: the file.
        tensors: how many it holds.
        nbytes: its size in bytes.
        data_digest: the digest of its data section, as recorded and as found.
        metadata: what it says of itself.
        checkpoints: the checkpoints that it is the mean of, in order; None where it was not held against any.
        measured: tensors that are not the mean, since a BatchNorm refresh measured them.
    """

    path: Path
    tensors: int
    nbytes: int
    data_digest: str
    metadata: dict[str, str]
    checkpoints: tuple[Path, ...] | None = None
    measured: tuple[str, ...] = ()


def verify(
    path: str | os.PathLike[str],
    *,
    sources: Sources | None = None,
    threads: int | None = None,
    memory: int | None = None,
    io: str = "auto",
    progress: Progress | None = None,
) -> VerifyReport:
    """Checks that a file written by this package is well-formed, complete and undamaged.

    All of it is read. What stands before the data is compared with one recorded digest, the data with another
    (`digests`). They tell damage, not forgery: who can change the file can change them too.

    Args:
        path: the file.
        sources: checkpoint files, checkpoint folders and run folders. The mean of those that the file records is taken
            again, and compared bit for bit; running statistics that a refresh measured are left aside.
        threads: workers; as many as this process may use cores if not given.
        memory: bytes of working memory for the mean, as for `average`.
        io: how to read, as for `average`.
        progress: callbacks.

    Returns:
        What was found.

    Raises:
        VerificationError: the file is damaged, was not written here, or is not the mean of the sources.
        CheckpointFormatError: it cannot be opened, or a source cannot be read.
        UsageError: an option is out of range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from ckpt_avg import average
        >>> with TemporaryDirectory() as folder:
        ...     result = average(["fixtures/mnist_cnn"], f"{folder}/swa.safetensors", last=3, bn="keep")
        ...     report = verify(result.output, sources=["fixtures/mnist_cnn"])
        >>> report.data_digest == result.data_digest
        True
    """
    workers, way = choose_threads(threads), check_io(io)
    progress = progress or Progress()
    with InputFile(Path(path)) as file:
        try:
            tensors, metadata, recorded = _check_header(file)
            begin = file.size - sum(tensor.nbytes for tensor in tensors.values())
            progress.start(file.size - begin)
            _refuse_other(
                file, "data", recorded.data, digest_data(file, begin, threads=workers, progress=progress.read)
            )
            file.check_unchanged()
        except CheckpointFormatError as error:
            raise VerificationError(f"{error} {_ADVICE}") from error
        report = VerifyReport(Path(path), len(tensors), file.size, recorded.data, metadata)
        if sources is None:
            return report
        from ckpt_avg.commands.verify_sources import compare_with_mean  # torch takes seconds to import

        checkpoints, measured = compare_with_mean(
            file, tensors, metadata, sources, threads=workers, memory=memory, io=way, progress=progress
        )
        return replace(report, checkpoints=checkpoints, measured=measured)


def _check_header(file: InputFile) -> tuple[dict[str, TensorSpec], dict[str, str], Digests]:
    """Returns the tensors, the metadata and the digests that a file records, once its header is as it was written."""
    if not looks_like(file.read(0, min(file.size, 9))):
        raise VerificationError(
            f"{file.path}: expected a safetensors file that ckpt-avg wrote, got another kind of file. {_ADVICE}"
        )
    text = read_header(file)
    tensors, metadata = parse_header(file, text)
    recorded = recorded_digests(metadata)
    if METHOD_KEY not in metadata or recorded is None:
        raise VerificationError(
            f"{file.path}: expected a file that ckpt-avg wrote, with digests of itself in its metadata, got none. It "
            "was written by another program or an older version, or is damaged."
        )
    _refuse_other(file, "header", recorded.header, header_digest(file.read(0, 8 + len(text))))
    return tensors, metadata, recorded


def _refuse_other(file: InputFile, what: str, expected: str, found: str) -> None:
    if found != expected:
        raise VerificationError(
            f"{file.path}: the {what} was changed or is damaged: expected the digest {expected}, got {found}. {_ADVICE}"
        )
