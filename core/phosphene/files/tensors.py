"""``save_tensors``: a safetensors file with the permissions that the umask sets."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file in a folder of its own, in which another file exists for a moment."""
    # safetensors creates files that only their owner can read; the umask decides about this one.
    mode = file.with_name("mode")
    mode.touch()
    save_file(dict(tensors), file, metadata)
    shutil.copymode(mode, file)
    mode.unlink()
