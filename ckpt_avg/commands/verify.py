"""`verify`: whether an output is complete and undamaged, and whether it is the mean of given checkpoints."""

from __future__ import annotations

import stat
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import METHOD_KEY, TensorSpec
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.requests import VerifyRequest, takes
from ckpt_avg.errors import CheckpointFormatError, UsageError, VerificationError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import input_status
from ckpt_avg.formats.safetensors_header import matches, parse_header, read_header
from ckpt_avg.machine import choose_threads
from ckpt_avg.output.digests import digest_data
from ckpt_avg.output.provenance import Digests, header_digest, recorded_digests
from ckpt_avg.progress import Phase
from ckpt_avg.text import decimal_size

_ADVICE = "Restore it from a copy, or average the checkpoints again."


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found of a complete and undamaged file.

    Attributes:
        path: the file.
        tensors: the number of its tensors.
        nbytes: its size in bytes.
        data_digest: the digest of its data section.
        metadata: its ``__metadata__``.
        checkpoints: the checkpoints that it is the mean of, in order; None if it was not compared with any.
        weights: of the checkpoints, as the file records them; None if all are equal.
        measured: tensors that are not the mean, because a BatchNorm refresh measured them.
        spectral_norms: weights whose vectors of spectral norm were computed again, and give the same norm to 1e-6.
    """

    path: Path
    tensors: int
    nbytes: int
    data_digest: str
    metadata: dict[str, str]
    checkpoints: tuple[Path, ...] | None = None
    weights: tuple[float, ...] | None = None
    measured: tuple[str, ...] = ()
    spectral_norms: tuple[str, ...] = ()


@takes(VerifyRequest)
def verify(request: VerifyRequest) -> VerifyReport:
    """Checks that a file written by this package is well-formed, complete and undamaged.

    It reads the whole file. The header is compared with one recorded digest, the data with another. Digests show
    damage, not forgery: anyone who can change the file can change them, too.

    Args:
        The fields of `VerifyRequest`.

    Raises:
        VerificationError: the file is damaged, was not written by this package, or is not the mean of the sources.
        CheckpointFormatError: it cannot be opened, or a source cannot be read.
        UsageError: an option is out of range, or the path is no file.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from ckpt_avg import average
        >>> with TemporaryDirectory() as folder:
        ...     result = average(["fixtures/mnist_cnn"], f"{folder}/swa.safetensors", last=3, bn="keep")
        ...     report = verify(result.output, sources=["fixtures/mnist_cnn"])
        >>> report.data_digest == result.data_digest
        True
    """
    threads = choose_threads(request.threads)
    context = Context(progress=request.callbacks)
    context.phases_left = 1 if request.sources is None else 3
    _refuse_other_paths(Path(request.path))
    with InputFile(Path(request.path)) as file:
        try:
            tensors, metadata, recorded = _check_header(file)
            begin = file.size - sum(tensor.nbytes for tensor in tensors.values())
            context.phase(Phase(f"reading {decimal_size(file.size)}", file.size - begin, "bytes"))
            _refuse_other(
                file,
                "data",
                recorded.data,
                digest_data(file, begin, threads=threads, progress=context.progress.advance),
            )
            file.check_unchanged()
        except CheckpointFormatError as error:
            raise VerificationError(str(error)) from error
        report = VerifyReport(Path(request.path), len(tensors), file.size, recorded.data, metadata)
        if request.sources is None:
            return report
        from ckpt_avg.commands.verify_sources import compare_with_mean  # the digests need nothing of it

        compared = compare_with_mean(file, tensors, metadata, request, threads=threads, context=context)
        return replace(
            report,
            checkpoints=compared.checkpoints,
            weights=compared.weights,
            measured=compared.measured,
            spectral_norms=compared.spectral_norms,
        )


def _refuse_other_paths(path: Path) -> None:
    status = input_status(path)
    if status is None:
        raise UsageError(f"{path}: no such file. Check the path.")
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise UsageError(f"{path}: is {kind}. Name a file that ckpt-avg wrote, for example swa.safetensors.")


def _check_header(file: InputFile) -> tuple[dict[str, TensorSpec], dict[str, str], Digests]:
    """Returns a file's tensors, metadata and recorded digests, once its header is verified."""
    if not matches(file.read(0, min(file.size, 9))):
        raise VerificationError(
            f"{file.path}: expected a safetensors file that ckpt-avg wrote, got another kind of file. {_ADVICE}"
        )
    text = read_header(file)
    tensors, metadata = parse_header(file, text)
    recorded = recorded_digests(metadata)
    if METHOD_KEY not in metadata or recorded is None:
        raise VerificationError(
            f"{file.path}: expected a file that ckpt-avg wrote, with digests in its metadata, got none. It was "
            f"written by another program, or is damaged. {_ADVICE}"
        )
    _refuse_other(file, "header", recorded.header, header_digest(file.read(0, 8 + len(text))))
    return tensors, metadata, recorded


def _refuse_other(file: InputFile, what: str, expected: str, found: str | None) -> None:
    if found != expected:
        raise VerificationError(
            f"{file.path}: the {what} was changed or is damaged: expected the digest {expected}, got "
            f"{found or 'none'}. {_ADVICE}"
        )
