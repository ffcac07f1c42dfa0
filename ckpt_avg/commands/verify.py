"""`verify`: whether an output is complete and undamaged, and whether it is the mean of given checkpoints."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_avg.commands.context import Context
from ckpt_avg.commands.requests import VerifyRequest, takes
from ckpt_avg.commands.verify_folder import read_folder, refuse_changed, refuse_exchanged
from ckpt_avg.errors import CheckpointFormatError, UsageError, VerificationError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.missing import missing
from ckpt_avg.files.status import input_status
from ckpt_avg.formats.sharded import is_index
from ckpt_avg.machine import choose_threads
from ckpt_avg.output.digests import digest_data
from ckpt_avg.output.provenance import MODEL, digest_of, recorded_shard
from ckpt_avg.output.written_file import WrittenFile, refuse_other
from ckpt_avg.progress import Phase
from ckpt_avg.results import Result, counted, paths_counted, plain
from ckpt_avg.text import decimal_size, escaped, size


@dataclass(frozen=True, slots=True, repr=False)
class VerifyReport(Result):
    """What `verify` found of a complete and undamaged output.

    Attributes:
        path: the file or folder.
        tensors: the number of its tensors.
        nbytes: the size of its weights in bytes.
        data_digest: the digest of its data section, as `AverageResult.data_digest`.
        metadata: its ``__metadata__``; of several files, that of the first.
        checkpoints: the checkpoints that it is the mean of, in order; None if it was not compared with any.
        weights: of the checkpoints, as the file records them; None if all are equal.
        measured: tensors that are not the mean, because a BatchNorm refresh measured them.
        spectral_norms: weights whose vectors of spectral norm were computed again, and give the same norm to 1e-6.
        files: what was verified of an output folder, weights first; empty for a file.
        unknown: files in it that its weights do not record.
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
    files: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg verify --json`` prints them."""
        found: dict[str, Any] = plain(self)
        found["bytes"] = found.pop("nbytes")
        return found

    def _title(self) -> str:
        mean = "" if self.checkpoints is None else ", and the mean of its checkpoints"
        return f"{escaped(self.path.name)} is complete and undamaged{mean}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "path", str(self.path)
        yield "tensors", f"{self.tensors:,}, {size(self.nbytes)}"
        yield "data_digest", self.data_digest
        yield "checkpoints", paths_counted(self.checkpoints or ())
        yield "weights", "" if self.weights is None else counted(self.weights, (f"{each:.4g}" for each in self.weights))
        yield "measured", counted(self.measured)
        yield "files", counted(self.files)
        yield "unknown", counted(self.unknown)


@takes(VerifyRequest)
def verify(request: VerifyRequest) -> VerifyReport:
    """Checks that a file or folder written by this package is well-formed, complete and undamaged.

    It reads all files. Of weights, the header is compared with one recorded digest, the data with another. A folder has
    all files that its weights record, its shards and their index belong together, and files that were copied to it are
    unchanged. Digests show damage, not forgery: anyone who can change the files can change them, too.

    Args:
        The fields of `VerifyRequest`.

    Raises:
        VerificationError: it is damaged or incomplete, not written by this package, or not the mean of the sources.
        CheckpointFormatError: it cannot be opened, or a source cannot be read.
        UsageError: an option is out of range, or there is nothing at the path.

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
    path = Path(request.path)
    path = path.parent if is_index(path) else path
    folder = read_folder(_checked(path)) if path.is_dir() else None
    paths = [_checked(path)] if folder is None else [path / name for name in folder.weights]
    with ExitStack() as stack:
        files = [stack.enter_context(InputFile(each)) for each in paths]
        try:
            written = [WrittenFile.of(file) for file in files]
            nbytes = sum(file.size for file in files)
            context.phase(Phase(f"reading {decimal_size(nbytes)}", sum(each.nbytes for each in written), "bytes"))
            for each in written:
                begin = each.file.size - each.nbytes
                found = digest_data(each.file, begin, threads=threads, progress=context.progress.advance)
                refuse_other(each.file, "data", each.recorded.data, found)
            if folder is not None:
                refuse_exchanged(written)
                refuse_changed(folder)
            for file in files:
                file.check_unchanged()
        except CheckpointFormatError as error:
            raise VerificationError(str(error)) from error
        digests = [each.recorded.data for each in written]
        report = VerifyReport(
            path,
            sum(len(each.tensors) for each in written),
            sum(file.size for file in files),
            digest_of(digests),
            written[0].metadata,
            files=() if folder is None else (*folder.weights, *sorted(folder.others)),
            unknown=() if folder is None else folder.unknown,
        )
        if request.sources is None:
            return report
        if folder is None and recorded_shard(written[0].metadata) is not None:
            raise UsageError(f"{path}: is one of several shards. With --sources, name its folder: {path.parent}.")
        from ckpt_avg.commands.verify_sources import compare_with_mean  # the digests need nothing of it

        models: dict[str, list[WrittenFile]] = {}
        for each in written:
            models.setdefault(each.metadata.get(MODEL, ""), []).append(each)
        context.phases_left = 2 * len(models)
        compared = [compare_with_mean(each, request, threads=threads, context=context) for each in models.values()]
        return replace(
            report,
            checkpoints=compared[0].checkpoints,
            weights=compared[0].weights,
            measured=tuple(name for each in compared for name in each.measured),
            spectral_norms=tuple(name for each in compared for name in each.spectral_norms),
        )


def _checked(path: Path) -> Path:
    """Returns the path. Raises UsageError if it is neither a file nor a folder."""
    status = input_status(path)
    if status is None:
        raise UsageError(f"{path}: {missing(path)}")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path}: is a device, pipe or socket. Name a file that ckpt-avg wrote, or a folder.")
    return path
