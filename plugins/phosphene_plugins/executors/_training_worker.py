"""A process of a training: it takes the same steps as the first one."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from threading import Thread

import torch

from ._sending import describe_error, pack
from ._training_processes import HOST, GlooGroup, open_store


def main(descriptor: int) -> None:
    """Read the task, answer that it is read, and follow the group; an error is sent, and ends the process."""
    connection = Connection(descriptor)
    try:
        task = torch.load(connection.recv(), mmap=True, weights_only=False)
        connection.send_bytes(pack(None))
        port, rank, count = connection.recv()
        Thread(target=_end_with, args=(connection,), daemon=True).start()
        task.follow(GlooGroup(open_store(HOST, port, count), rank, count))
        connection.send_bytes(pack(None))
    except (EOFError, ConnectionError):
        os._exit(1)
    except Exception as error:
        connection.send_bytes(pack(describe_error(error)))
        os._exit(1)


def _end_with(connection: Connection) -> None:
    """End this process when that of the run has ended."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
