"""A function on several processes of this machine, with a process group of torch, for scripts and tests.

The processes are forked, so that nothing is imported again. The caller must not have run a backward pass: torch does
not continue one in a forked process.
"""

import multiprocessing
import multiprocessing.connection
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_processes(size: int, work: Callable[..., Any], *arguments: Any, group: bool = True, timeout: float = 600.0,
                 environment: Callable[[int], dict[str, str]] | None = None) -> list[Any]:  # fmt: skip
    """What ``work(*arguments)`` returns on each of ``size`` processes, in their order.

    Args:
        size: Number of processes.
        work: Called on each of them.
        arguments: Its arguments.
        group: Whether the processes are a gloo group before ``work`` begins.
        timeout: Seconds after which those that still run are ended.
        environment: Environment variables of each process, from its place.

    Raises:
        RuntimeError: A process failed, or did not end in time; the message has its traceback.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store" if group else None
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        children = [
            context.Process(target=_child, args=(pipes[rank][1], rank, size, store, environment, work, arguments))
            for rank in range(size)
        ]
        for child, (_, end) in zip(children, pipes, strict=True):
            child.start()
            end.close()
        try:
            return _collected([pipe for pipe, _ in pipes], time.monotonic() + timeout)
        finally:
            for child in children:
                child.join(5.0)
                if child.is_alive():
                    child.kill()
                    child.join()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(pipe: Any, rank: int, size: int, store: Path | None, environment: Any, work: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        os.environ |= environment(rank) if environment is not None else {}
        if store is not None and size > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result, error = work(*arguments), ""
    except BaseException:
        result, error = None, traceback.format_exc()
    pipe.send((result, error))
    pipe.close()
    if error or not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()


def _collected(pipes: list[Any], until: float) -> list[Any]:
    """What the processes send; the first error ends the waiting."""
    found: dict[Any, Any] = {}
    while len(found) < len(pipes):
        waiting = [pipe for pipe in pipes if pipe not in found]
        ready = multiprocessing.connection.wait(waiting, max(until - time.monotonic(), 0.0))
        if not ready:
            raise RuntimeError(f"{len(waiting)} of {len(pipes)} processes did not end in time.")
        for pipe in [pipe for pipe in waiting if pipe in ready]:
            try:
                found[pipe], error = pipe.recv()
            except EOFError:
                error = "The process ended without a word."
            if error:
                raise RuntimeError(f"Process {pipes.index(pipe) + 1} of {len(pipes)} failed.\n{error}")
    return [found[pipe] for pipe in pipes]
