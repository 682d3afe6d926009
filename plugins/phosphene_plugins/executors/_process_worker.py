"""The process of a worker: it computes the shards that it is sent until the connection ends."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread

import torch

from phosphene.data import FoldTask

from ._sending import describe_error, pack


def main(descriptor: int) -> None:
    """Answer every shard with its ``ComputedShard``, or with the error."""
    connection, shards = Connection(descriptor), SimpleQueue[tuple[tuple[int, str], range]]()
    Thread(target=_receive, args=(connection, shards), daemon=True).start()
    current: tuple[int, str] | None = None
    task: FoldTask | None = None
    while True:
        sent, shard = shards.get()
        try:
            if task is None or current != sent:
                task, current = None, sent
                # Weights and images in memory are mapped: workers share them, and a write makes a copy.
                task = torch.load(sent[1], mmap=True, weights_only=False)
            answer = pack(task.compute(shard))
        except Exception as error:
            answer = pack(describe_error(error))
        connection.send_bytes(answer)


def _receive(connection: Connection, shards: SimpleQueue[tuple[tuple[int, str], range]]) -> None:
    """Queue what arrives; end the process at once when the process of the run has ended."""
    try:
        while True:
            shards.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)
