"""Checkpoints that are one file. The first bytes decide how it is read, never the suffix alone."""

from __future__ import annotations

import hashlib
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.checkpoint.spec import METHOD_KEY, ORIGIN_KEY, Checkpoint
from ckpt_avg.errors import CheckpointFormatError, NoWeightsError, ResourceError, fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats import safetensors_header, torch_legacy, torch_zip
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.tensor_names import TensorTable, settle_names, shared_table
from ckpt_avg.formats.torch_file import open_torch_file
from ckpt_avg.text import argument, plural
from ckpt_avg.wording import setting

DCP_SHARDING = "DCP_SHARDING_INFO"
_TORCH_TAR = (b"sys_info\0", b"storages\0", b"tensors\0", b"pickle\0")  # the names of its members

_EXPECTED = "expected a safetensors file or one written by torch.save, got"
# A pickle in protocol 0 or 1 begins with a class, or with a dict and a memo.
_OLD_PICKLE = re.compile(rb"c[A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n|\(dp\d+\n|\}q.", re.DOTALL)
# Converts a pickle of tensors, arrays or modules. File names are its arguments.
_CONVERT = (
    "import pickle, sys, torch; "
    "f = lambda v: v.state_dict() if hasattr(v, 'state_dict') else {k: f(x) for k, x in v.items()} "
    "if isinstance(v, dict) else torch.as_tensor(v) if hasattr(v, 'shape') else v; "
    "torch.save(f(pickle.load(open(sys.argv[1], 'rb'), encoding='latin1')), sys.argv[2])"
)


def open_file(path: Path, reading: Reading, *, strip: bool = True) -> Checkpoint:
    """Opens a checkpoint file and reads its header. Shards are not stripped: a prefix belongs to the whole model.

    Raises:
        CheckpointFormatError: the file is corrupt, unsafe, or of an unknown kind.
    """
    with ExitStack() as on_error:
        file = on_error.enter_context(InputFile(path))
        head = file.read(0, min(file.size, 512))
        if head.startswith(torch_zip.MAGIC):
            checkpoint = open_torch_file(file, "torch zip", torch_zip.read_contents(file), reading, strip=strip)
        elif safetensors_header.matches(head):
            checkpoint = _open_safetensors(file, reading, strip=strip)
        elif torch_legacy.matches(head):
            checkpoint = open_torch_file(file, "torch stream", torch_legacy.read_contents(file), reading, strip=strip)
        elif (head.startswith(b"\x80") and len(head) > 32) or _OLD_PICKLE.match(head):  # less may be cut off
            raise NoWeightsError(
                f"{path}: {_EXPECTED} a Python pickle (pickle.dump, as in detectron2's model zoo and StyleGAN). If you "
                "trust it, convert it, where the code of its classes can be imported: "
                f'`python -c "{_CONVERT}" {argument(path.name)} model.pth`.'
            )
        else:
            got, advice = _describe(head, path.name)
            fail(path, f"{_EXPECTED} {got}", advice)
        on_error.pop_all()  # the checkpoint keeps the file open
        return checkpoint


def starts_as_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint by its first bytes."""
    head = _head(path)
    first_name = head[30 : 30 + int.from_bytes(head[26:28], "little")]  # of a zip archive
    is_torch_zip = head.startswith(torch_zip.MAGIC) and first_name.endswith(b"/data.pkl")
    return is_torch_zip or safetensors_header.matches(head) or torch_legacy.matches(head)


def starts_as_text(path: Path) -> bool:
    """Whether the first bytes of a file are printable."""
    return _head(path).decode(errors="ignore").replace("\n", "").isprintable()


def _head(path: Path) -> bytes:
    try:
        with InputFile(path) as file:
            return file.read(0, min(file.size, 512))
    except (CheckpointFormatError, ResourceError):
        return b""


def refuse_options(reading: Reading, path: Path) -> None:
    """Raises CheckpointFormatError if an option chooses among state dicts, of which safetensors have only one."""
    if reading.state_key is not None or reading.ema:
        option = "--ema" if reading.ema else setting("--state-key", reading.state_key or "")
        fail(path, f"a safetensors file has one flat state dict, so {option} matches nothing in it", "Omit it")


@dataclass(frozen=True, slots=True)
class _Header:
    """A header as a key: to compare it with an equal one takes a fifth of the time of a hash of all its bytes."""

    json: bytes

    def __hash__(self) -> int:
        return hash(self.json[-64:])


def _open_safetensors(file: InputFile, reading: Reading, *, strip: bool) -> Checkpoint:
    refuse_options(reading, file.path)
    header = safetensors_header.read_header(file)

    def make() -> TensorTable:
        tensors, metadata = safetensors_header.parse_header(file, header)
        names = settle_names(tensors, reading.strip_prefix, file.path, strip=strip)
        return TensorTable(tensors, names, metadata, hashlib.sha256(header).hexdigest())

    table = shared_table((_Header(header), file.size, reading.strip_prefix, strip), make)
    metadata = table.metadata
    if DCP_SHARDING in metadata and file.path.name.startswith("shard-"):
        problem = "one shard of a checkpoint that torch.distributed.checkpoint wrote, with parts of tensors"
        fail(file.path, problem, f"Name its folder: {file.path.parent}")
    notes: tuple[str, ...] = ()
    if strip and (shard := re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.path.name)) and int(shard[2]) > 1:
        notes = (f"one of {int(shard[2])} shards, by its name. For the whole model name the folder or its index",)
    spec = table.names.make_spec(
        file.path,
        "safetensors",
        table,
        kind="torch DCP" if DCP_SHARDING in metadata else None,
        averaged="ckpt-avg made it"
        if metadata.get(METHOD_KEY) in ("mean", "weighted mean") or ORIGIN_KEY in metadata
        else "",
        notes=notes,
        metadata=metadata,
        digest=table.digest,
    )
    return Checkpoint(spec, (file,))


def _describe(head: bytes, name: str) -> tuple[str, str]:
    """Returns what a file with these first 512 bytes seems to be, and what to do."""
    if not head:
        return "an empty file", "Copy or save it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer", "Fetch the file: git lfs pull"
    if head[257:262] == b"ustar" and head.startswith(_TORCH_TAR):
        return "the tar archive of torch before 0.1.10", "Load it with torch and save it again"
    if head[257:262] == b"ustar" or (head.startswith(b"\x1f\x8b") and name.endswith((".nemo", ".tgz", ".tar.gz"))):
        return f"a {'NeMo' if name.endswith('.nemo') else 'tar'} archive", (
            f"Unpack it (tar xf {argument(name)}) and name the checkpoint in it: of a NeMo archive model_weights.ckpt, "
            "or the folder model_weights"
        )
    for magic, what, advice in (
        (b"\x1f\x8b", "a gzip file", "Unpack it first"),
        (b"\x28\xb5\x2f\xfd", "a Zstandard file", "Unpack it first"),
        (b"BZh", "a bzip2 file", "Unpack it first"),
        (b"\xfd7zXZ\0", "an xz file", "Unpack it first"),
        (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "Unpack it first"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Save the weights with torch.save or safetensors"),
        (b"GGUF", "a GGUF file, whose weights are quantized", "Average the checkpoints that it was made from"),
        (b"\x93NUMPY", "a numpy file", "Save a dict of named tensors with torch.save or safetensors"),
    ):
        if head.startswith(magic):
            return what, advice
    if head.lstrip()[:1] == b"<" and b"\0" not in head:
        return "an HTML or XML page, probably a failed download", "Download the file again"
    if len(head) < 8:
        return plural(len(head), "byte"), "Copy or save it again"
    return f"something else (first bytes {head[:8]!r})", "Name checkpoint files only"
