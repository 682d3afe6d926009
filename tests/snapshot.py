"""Digests of what every method returns, to compare two states of the code bit for bit.

``python -m tests.snapshot write FILE`` runs every method with seed 0 on the bundled images, with its quick
and its default parameters, on two bundled networks, on the CPU with one thread, and stores a digest of every
tensor. Runs of more than ``MOST_PASSES`` passes are left out. ``python -m tests.snapshot compare OLD NEW``
lists what differs. Digests depend on the processor and on the versions of the libraries, so both files have
to come from one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import PhospheneError, methods, prepare
from phosphene.results import Result

MODELS = ("builtin:shapes-vgg", "builtin:shapes-resnet")
#: Runs with more forward and backward passes than this (trainings with their default steps) are left out.
MOST_PASSES = 20_000


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a value, with a path that says where."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        for key, tensor in value.state_dict().items():
            yield f"{name}.{key}", tensor
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}.{index}")


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's shape, type and bits."""
    stored = tensor.detach().cpu().contiguous()
    content = stored.flatten().view(torch.uint8).numpy().tobytes() if stored.numel() else b""
    return hashlib.sha256(f"{tuple(stored.shape)} {stored.dtype}".encode() + content).hexdigest()[:16]


def digests(result: Result) -> dict[str, str]:
    """A digest for every tensor of a result, by field."""
    return {key: digest(value) for name, field in result.fields() for key, value in tensors(field, name)}


def settings(quick_only: bool) -> Iterator[tuple[str, str, str | None, dict[str, Any]]]:
    """Every method with the parameters and the model that it is run with."""
    for name in sorted(methods):
        method = methods[name]
        inputs = {i.name for i in method.spec.inputs}
        seed = {method.seed: 0} if method.seed else {}
        quick = {n: v for n, v in method.spec.quick.items() if n not in inputs}
        owner = method.spec.input("model")
        for label, params in (("quick", quick | seed), ("default", seed)):
            if label == "default" and quick_only:
                continue
            for model in MODELS if owner else (None,):
                yield f"{method.spec.name} {label} {model or '-'}", name, model, params


def write(file: Path, *, only: str, quick_only: bool) -> None:
    """Run everything and store the digests; what is in the file already is not run again."""
    torch.set_num_threads(1)
    stored: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for key, name, model, params in settings(quick_only):
        if only not in key or key in stored:
            continue
        arguments = dict(params) | ({methods[name].spec.input("model").name: model} if model else {})
        started = time.perf_counter()
        try:
            prepared = prepare(name, progress=False, **arguments)
            if sum(prepared.passes() or ()) > MOST_PASSES:
                print(f"   left out  {key}", flush=True)
                continue
            stored[key] = digests(prepared.execute_locally())
        except PhospheneError as error:
            stored[key] = {"refused": type(error).__name__}
        print(f"{time.perf_counter() - started:7.1f} s  {key}", flush=True)
        file.write_text(json.dumps(stored, indent=1, sort_keys=True))


def compare(old: Path, new: Path) -> int:
    """Print every difference; the exit status is 1 where there is one."""
    before, after = json.loads(old.read_text()), json.loads(new.read_text())
    shared = [key for key in after if key in before]
    differing = 0
    for key in shared:
        if before[key] == after[key]:
            continue
        if sorted(before[key].values()) == sorted(after[key].values()):
            print(f"renamed  {key}: {', '.join(sorted(before[key].keys() ^ after[key].keys()))}")
            continue
        differing += 1
        names = sorted(
            n for n in before[key].keys() | after[key].keys() if before[key].get(n) != after[key].get(n)
        )
        print(f"differs  {key}: {', '.join(names)}")
    for key in sorted(before.keys() ^ after.keys()):
        print(f"{'only before' if key in before else 'only after'}  {key}")
    print(f"{len(shared)} runs compared, {differing} differ")
    return min(differing, 1)


def main() -> int:
    """Write or compare, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.snapshot", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run every method and store digests")
    writing.add_argument("file", type=Path)
    writing.add_argument("--only", default="", help="only runs whose name contains this text")
    writing.add_argument("--quick", action="store_true", help="leave out the default parameters")
    comparing = commands.add_parser("compare", help="list the differences of two files")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        return compare(arguments.old, arguments.new)
    write(arguments.file, only=arguments.only, quick_only=arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
