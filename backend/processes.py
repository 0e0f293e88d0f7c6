"""Work in forked processes, each for a few items: one that ends its process, or spoils its GPU, spoils few others."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Lock
from typing import TypeVar

R = TypeVar("R")

PIECE = 24
"""So many items a process works on, one after the other."""

_CONTEXT = multiprocessing.get_context("fork")
_STARTING = Lock()
"""Held from a pipe's making to its end in this process being closed: no other process inherits that end."""


def spread(
    work: Callable[[str], R], items: Sequence[str], processes: int, died: Callable[[str, int | None], R]
) -> list[R]:
    """`work` of every item, in order, by so many processes at a time.

    Args:
        died: what stands for an item that ended its process with an exit code.
    """
    pieces = [items[start : start + PIECE] for start in range(0, len(items), PIECE)]
    with ThreadPoolExecutor(processes) as threads:
        found = threads.map(lambda piece: _piece(work, piece, died), pieces)
        return [result for results in found for result in results]


def _piece(work: Callable[[str], R], items: Sequence[str], died: Callable[[str, int | None], R]) -> list[R]:
    results: list[R] = []
    while len(results) < len(items):
        found, code = _process(work, items[len(results) :])
        results += found
        if len(results) < len(items):
            results.append(died(items[len(results)], code))
    return results


def _process(work: Callable[[str], R], items: Sequence[str]) -> tuple[list[R], int | None]:
    """What one process made of the items until it ended, and its exit code."""
    with _STARTING:
        receiver, sender = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_send_all, args=(work, items, sender))
        process.start()
        sender.close()
    results: list[R] = []
    with receiver, suppress(EOFError):
        while True:
            results.append(receiver.recv())
    process.join()
    return results, process.exitcode


def _send_all(work: Callable[[str], R], items: Sequence[str], sender: Connection) -> None:
    for item in items:
        sender.send(work(item))
