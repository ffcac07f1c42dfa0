"""Opens pickles under an audit hook, in a process of its own, and tells what happened apart from reading the file.

``python -m system.fuzz.audited ours FOLDER`` opens every file of a folder with this package. ``standard`` lets the
standard unpickler loose on each, in a child and a scratch folder of its own: the control. ``grammar SEED COUNT`` reads
generated pickles with this package, and ``wild SEED COUNT`` with the standard unpickler.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from system.fuzz.corpus import checkpoint_pickle, torch_zip
from system.fuzz.grammar import generate
from system.fuzz.targets import make_rewrite, memory_folder

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.pickles.unpickler import read_pickle

Events = list[str]
SECONDS = 1.0


class Ear:
    """An audit hook, which cannot be taken off again: it can be turned."""

    def __init__(self) -> None:
        self.folder = ""
        self.listening = False
        self.events: Events = []
        self.log: int | None = None  # also written to, for one that may not live to tell
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.listening or event == "builtins.id":
            return
        if event == "open" and str(arguments[0]).startswith(self.folder) and not arguments[2] & _WRITING:
            return  # the checkpoint itself
        self.events.append(f"{event} {str(arguments)[:200]}")
        if self.log is not None:
            os.write(self.log, f"{self.events[-1]!a}\n".encode()[1:])

    @contextlib.contextmanager
    def listen(self, folder: Path | str) -> Iterator[None]:
        """Hears everything but what only reads files of the folder."""
        self.folder, self.events, self.listening = f"{folder}{os.sep}", [], True
        try:
            yield
        finally:
            self.listening = False


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def by_this_package(paths: list[Path]) -> dict[str, tuple[bool, Events]]:
    """Opens each, or reads it as the pickle of a checkpoint; returns whether it was accepted, and the events."""
    ear, found = Ear(), {}
    for path in [*paths, *paths]:  # the first time imports what is imported late
        before, opened = set(sys.modules), False
        with ear.listen(path.parent), contextlib.suppress(CheckpointFormatError):
            if path.suffix == ".pickle":
                read_pickle(path.read_bytes(), str(path))
            else:
                open_checkpoint(path).close()
            opened = True
        found[path.name] = (opened, ear.events + [f"imported {name}" for name in sorted(set(sys.modules) - before)])
    return found


def by_the_standard_unpickler(paths: list[Path]) -> dict[str, tuple[bool, Events]]:
    """Loads each bare pickle; returns whether its payload made its file, and the events."""
    import torch  # noqa: F401  (once, not in each child)

    ear = Ear()
    return {path.name: let_loose(path.read_bytes(), ear) for path in paths}


def let_loose(stream: bytes, ear: Ear) -> tuple[bool, Events]:
    """Loads a pickle as pickle.load does, in a child that has `SECONDS` for it."""
    with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="fuzz-") as folder:
        scratch, heard = Path(folder) / "scratch", Path(folder) / "heard"
        scratch.mkdir()
        if (child := os.fork()) == 0:
            try:
                ear.log = os.open(heard, os.O_WRONLY | os.O_CREAT, 0o600)
                _load(stream, ear, scratch)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it has started
        return "touched" in os.listdir(scratch), heard.read_text("utf-8", "replace").splitlines()[:1000]


def _load(stream: bytes, ear: Ear, scratch: Path) -> None:
    os.setpgid(0, 0)
    os.chdir(scratch)
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(silent, descriptor)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends it
    with ear.listen(scratch), contextlib.suppress(BaseException):
        load_by_standard(stream)


def load_by_standard(stream: bytes) -> object:
    """Loads a pickle as pickle.load does, with any persistent id."""
    import io

    class Loader(pickle.Unpickler):
        def persistent_load(self, pid: object) -> object:
            return pid

    return Loader(io.BytesIO(stream)).load()


def read_generated(seed: int, count: int) -> dict[str, Any]:
    """Reads generated pickles, every tenth as the pickle of an archive too."""
    ear, rng, accepted = Ear(), Random(seed), 0
    with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="fuzz-") as folder:
        path = Path(folder) / "input.pt"
        rewrite, heard = make_rewrite(path), {}

        def one(read: Callable[[], object], stream: bytes) -> bool:
            with ear.listen(folder):
                try:
                    read()
                    done = True
                except CheckpointFormatError:
                    done = False
            if ear.events and len(heard) < 20:
                heard[stream.hex()] = ear.events[:20]
            return done

        benign = checkpoint_pickle({})
        rewrite(torch_zip(benign))
        open_checkpoint(path).close()
        before = set(sys.modules)
        for number in range(count):
            stream = generate(rng)
            accepted += one(lambda stream=stream: read_pickle(stream, "input.pkl"), stream)
            if number % 10 == 0:
                inside = checkpoint_pickle({b"X\4\0\0\0evil": stream[2:-1]})
                rewrite(torch_zip(inside))
                one(lambda: open_checkpoint(path).close(), inside)
        imported = sorted(set(sys.modules) - before)
    return {"count": count, "accepted": accepted, "heard": heard, "imported": imported}


def let_generated_loose(seed: int, count: int) -> dict[str, Any]:
    """Loads generated pickles with the standard unpickler; returns how many did anything, and the kinds of events."""
    import torch  # noqa: F401  (once, not in each child)

    ear, rng = Ear(), Random(seed)
    heard = [let_loose(generate(rng), ear)[1] for _ in range(count)]
    kinds = {event.partition(" ")[0] for events in heard for event in events}
    return {"active": sum(map(bool, heard)), "kinds": sorted(kinds)}


def main() -> None:
    """Answers in JSON."""
    mode, *arguments = sys.argv[1:]
    if mode in ("ours", "standard"):
        read = by_this_package if mode == "ours" else by_the_standard_unpickler
        answer: Any = read(sorted(Path(arguments[0]).iterdir()))
    else:
        answer = (read_generated if mode == "grammar" else let_generated_loose)(*map(int, arguments))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
