"""One rank of the peers: runs the configurations it is given one after another and times each.

Started by peers.py, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. Rank 0 writes a line of JSON for each.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peer_models import Sizes, Step, step
from processes import append
from shapes import BY_NAME

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", help="a file that lines are appended to")
    parser.add_argument("jobs", nargs="+", help="WORK:CONFIGURATION")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = _join(given.tiny)
    for job in given.jobs:
        name, _, configuration = job.partition(":")
        found = _measured(name, configuration, device, given)
        if RANK == 0:
            append(Path(given.out), found)
    sys.stdout.flush()
    os._exit(0)  # communicators of torch may wait for each other at a regular end


def _join(tiny: bool) -> torch.device:
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch.set_float32_matmul_precision("highest")
    if tiny:
        torch.accelerator.device_count = lambda: RANKS
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", RANK)
        torch.cuda.set_device(device)
    if RANKS > 1:
        dist.init_process_group("gloo" if tiny else "cpu:gloo,cuda:nccl", rank=RANK, world_size=RANKS)
    return device


def _measured(name: str, configuration: str, device: torch.device, given: argparse.Namespace) -> dict[str, Any]:
    """The line of one configuration; `error` in it if it failed on any rank."""
    start, own, error, whole = time.perf_counter(), {}, "", True
    for whole in (True, False):
        try:
            sizes = Sizes.tiny() if given.tiny else Sizes.real()
            run = step(BY_NAME[name], configuration, RANKS, device, sizes, whole=whole)
            own, error = _times(run, device, given.runs), ""
            del run
        except Exception as failure:
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if not error.startswith("Unsupported"):  # dynamo's: what it cannot trace, it can go around
            break
    ranks = _gathered((own, error))
    errors = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(ranks) if failure]
    line: dict[str, Any] = {"work": name, "ranks": RANKS, "configuration": configuration}
    line["seconds"] = round(time.perf_counter() - start, 1)
    if errors:
        return {**line, "error": errors[0]}
    everyone = [times for times, _ in ranks]
    latencies = [max(runs) for runs in zip(*(times["latencies_ms"] for times in everyone))]
    return {
        **line,
        "latency_ms": _median(latencies),
        "back_to_back_ms": max(times["back_to_back_ms"] for times in everyone),
        "memory_bytes": max(times["memory_bytes"] for times in everyone),
        "whole_graph": whole,
        "device": everyone[0]["device"],
        "torch": torch.__version__,
    }


def _times(run: Step, device: torch.device, runs: int) -> dict[str, Any]:
    """What this rank measures: runs by themselves after a barrier, and runs enqueued at once, by events."""
    for _ in range(5):
        run()
    _wait(device)
    long = max(_gathered(_once(run, device))) > 300.0
    latencies = [_once(run, device) for _ in range(min(runs, 20) if long else runs)]
    barrier()
    _wait(device)
    return {
        "latencies_ms": latencies,
        "back_to_back_ms": _median(list(_intervals(run, device, 5 if long else runs))),
        "memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _once(run: Step, device: torch.device) -> float:
    barrier()
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return 1000.0 * (time.perf_counter() - start)


def _intervals(run: Step, device: torch.device, runs: int) -> Iterator[float]:
    if device.type != "cuda":
        yield _once(run, device)
        return
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    for before, after in pairwise(events):
        yield before.elapsed_time(after)


def barrier() -> None:
    """Wait for the other ranks, on the host."""
    if RANKS > 1:
        _gathered(None)


def _gathered(value: Any) -> list[Any]:
    """Every rank's value. Over gloo, so that a GPU's communicator is not needed."""
    if RANKS == 1:
        return [value]
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, value)
    return everyone


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _median(values: Sequence[float]) -> float:
    return round(sorted(values)[len(values) // 2], 4)


if __name__ == "__main__":
    main()
