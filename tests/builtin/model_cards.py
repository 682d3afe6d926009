"""Model cards of the bundled networks, atomic writing, and accuracy on scenes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phosphene.builtin.networks import normalize
from phosphene.builtin.scenes import Scenes


def write_card(path: Path, summary: str, weights: bytes, **facts: Any) -> None:
    """Write a model card in Markdown: a summary and a table of facts, with the hash of the weights."""
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    facts["sha256"] = hashlib.sha256(weights).hexdigest()
    lines = [f"# {path.stem}", "", summary, "", "| | |", "| --- | --- |"]
    for key, value in facts.items():
        text = f"{value:.4g}" if isinstance(value, float) else value
        lines.append(f"| {key.replace('_', ' ')} | {text} |")
    write_file(path, ("\n".join(lines) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no partial file is left behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def first_and_last_loss(losses: Any) -> dict[str, float]:
    """The mean loss of the first and of the last 50 steps, for a card."""
    first, last = (torch.as_tensor(part).mean().item() for part in (losses[:50], losses[-50:]))
    return {"first_loss": first, "last_loss": last}


@torch.no_grad()
def predictions(network: nn.Module, scenes: Scenes) -> Tensor:
    """The predicted class of each scene, (N,)."""
    return torch.cat([network(normalize(batch)).argmax(1) for batch in scenes.images.split(250)])


def accuracy(network: nn.Module, scenes: Scenes) -> float:
    """The fraction of scenes whose predicted class is right."""
    return (predictions(network, scenes) == scenes.labels).double().mean().item()
