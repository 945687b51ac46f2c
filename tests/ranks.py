"""Runs a function on several ranks of a gloo group, on this machine, and gives what each returned; a rank that hangs fails the test."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Forked, since importing torch anew takes seconds; a process that has used a GPU cannot be forked.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def _rank(function: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=40))
        result = (function(rank, world, *args), "")
        dist.destroy_process_group()
    except BaseException:
        result = (None, traceback.format_exc())
    torch.save(result, f"{folder}/{rank}")


def on_ranks(world: int, function: Callable[..., Any], *args: Any, seconds: float = 60) -> list[Any]:
    """``function(rank, world, *args)`` of each rank, within so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [CONTEXT.Process(target=_rank, args=(function, rank, world, folder, args), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        for rank, process in enumerate(processes):
            process.join(seconds)
            hung = process.is_alive()
            process.kill()
            assert not hung, f"rank {rank} of {world} did not come back within {seconds} s"
        results = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]
    errors = [f"rank {rank} of {world}:\n{error}" for rank, (_, error) in enumerate(results) if error]
    assert not errors, "\n".join(sorted(errors, key=lambda e: "Connection closed by peer" in e))  # others end so when one fails
    return [result for result, _ in results]
