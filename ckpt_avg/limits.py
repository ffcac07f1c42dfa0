"""Bounds on what an untrusted header, zip directory or pickle may ask for.

Each is far above what a real checkpoint needs and low enough that a hostile file is refused in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Limits:
    """Every bound, with its unit in its comment."""

    header: int = 100_000_000  # bytes of a safetensors header; the format's own limit
    tensors: int = 1_000_000  # in one file
    name: int = 4_096  # bytes of one tensor name in UTF-8
    rank: int = 64  # dimensions of one tensor; torch itself allows no more
    elements: int = 2**63 - 1  # of one tensor; torch counts them in int64
    index: int = 16 * 2**20  # bytes of a shard index
    log: int = 8 * 2**20  # bytes of a trainer's log next to the weights
    log_line: int = 16 * 2**20  # bytes of a line of a log that the user names, which is read as a stream
    log_document: int = 64 * 2**20  # bytes of such a log if it is one JSON document
    log_columns: int = 10_000  # different columns of it
    log_steps: int = 1_000_000  # steps of it that are compared with those of the checkpoints, to tell what differs
    part_members: int = 100  # of the archive of one stored part of a tensor
    zip_directory: int = 256 * 2**20  # bytes of a zip's central directory
    pickle: int = 256 * 2**20  # bytes of a checkpoint's pickle, the tensors not included
    pickle_operations: int = 30_000_000
    pickle_globals: int = 10_000  # distinct classes and functions named in a pickle
    expanded: int = 64 * 2**20  # bytes of a tensor that repeats elements of a smaller storage (stride 0)
    parts: int = 1_000_000  # of all tensors of one distributed checkpoint, counted each time they occur
    part_pairs: int = 1_000_000  # pairs of adjacent parts of one tensor
    part_pickle: int = 64 * 1024  # bytes of the pickle of one stored part of a tensor
    module_items: int = 1_000_000  # modules and tensors of one pickled module, counted each time they occur
    files: int = 100_000  # of one checkpoint folder that the output is compared with
    side_file: int = 256 * 2**20  # bytes of a file that is copied next to the weights, such as a tokenizer
    folders: int = 2_000  # that are searched for checkpoints inside one run folder
    nesting: int = 16  # how deep nested dicts are searched for a state dict


LIMITS = Limits()
