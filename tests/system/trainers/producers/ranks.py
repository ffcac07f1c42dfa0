"""Two processes on one machine, on the CPU, as `torchrun` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist


def start(program: str, *arguments: object, count: int = 2, **environment: str) -> None:
    """Runs a program in ``count`` processes; fails if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)} | environment
    processes = [
        subprocess.Popen(
            [sys.executable, program, *map(str, arguments)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]
    codes = [process.wait(120) for process in processes]
    if any(codes):
        raise RuntimeError(f"{Path(program).name}: the ranks ended with {codes}")


def started() -> bool:
    """Says whether this is one of the processes."""
    return "RANK" in os.environ


def join() -> int:
    """Joins the other processes; returns the rank."""
    dist.init_process_group("gloo")
    return dist.get_rank()


def leave() -> None:
    """Ends this process once all are done. Ends of the interpreter may meet torch's threads, which then abort."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
