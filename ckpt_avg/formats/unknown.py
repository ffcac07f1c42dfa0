"""What a file that cannot be opened seems to be, and the way out."""

from __future__ import annotations

from ckpt_avg.text import plural

_GZIP, _ZSTD, _HDF5 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x89HDF\r\n\x1a\n"


def explain(head: bytes, name: str) -> str:
    """Says what a file seems to be, and what to do.

    Args:
        head: its first 512 bytes.
        name: its name.
    """
    expected = "expected a safetensors file or one written by torch.save, got"
    if not head:
        return f"{expected} an empty file. Copy or save it again."
    if head.startswith(b"version https://git-lfs"):
        return f"{expected} a Git LFS pointer. Fetch the file itself: git lfs pull."
    if name.endswith(".nemo"):
        return (
            f"{expected} a NeMo archive. Unpack it (tar xf {name}) and name the model_weights.ckpt in it; one that "
            "holds a folder model_weights is a distributed checkpoint: name that folder."
        )
    if len(head) > 262 and head[257:262] == b"ustar":
        return (
            f"{expected} a tar archive. If torch before 0.1.10 wrote it, load it there and save it again; else unpack "
            "it and name the checkpoint in it."
        )
    for magic, what, way_out in (
        (_GZIP, "a gzip file", "Unpack it first."),
        (_ZSTD, "a Zstandard file", "Unpack it first."),
        (_HDF5, "an HDF5 file", "Save the weights with torch.save or safetensors."),
        (b"GGUF", "a GGUF file, whose weights are quantized", "Average the checkpoints that it was made from."),
        (b"\x93NUMPY", "a numpy file", "Save a dict of named tensors with torch.save or safetensors."),
    ):
        if head.startswith(magic):
            return f"{expected} {what}. {way_out}"
    if head.lstrip()[:1] == b"<" and b"\0" not in head:
        return f"{expected} an HTML or XML page, probably a failed download. Download the file again."
    if len(head) < 8:
        return f"{expected} {plural(len(head), 'byte')}. Copy or save it again."
    return f"{expected} something else (first bytes {head[:8]!r}). Name checkpoint files only."
