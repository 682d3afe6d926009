"""The role ``features``: features that were computed before, instead of a model and a data set."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, type_name
from ..finite_values import contains_non_finite
from ..models.digest import checksum
from ..precision import at_least_float32
from ..results import Embedding
from ..results.feature_files import as_embedding, is_feature_file, read_features
from ..spec.spec import Role
from .base import InputContext, InputRole, check_dense

#: Features (N, D) of N images, passed instead of the input ``dataset`` and, where no other input needs it, of
#: the model. Declare all three as optional: ``features: Features | None = None``.
Features: TypeAlias = Annotated[Embedding, Role("features", replaces=("dataset",))]


class FeaturesRole(InputRole):
    """Features that were computed before; default: None, the features of a data set are computed."""

    name, value_type = "features", Embedding
    metavar = "FOLDER|FILE"
    description = (
        "features instead of a data set: an ``Embedding``, as ``embed`` returns it, or numbers (N, D)"
    )
    help = "features instead of model and data set: a saved result of embed, or .parquet, .npy, .npz"

    def read(self, value: Any, context: InputContext) -> Embedding | None:
        """A saved result, a file, or the record of either, whose features must be the same as then."""
        if isinstance(value, (str, os.PathLike)):
            path = Path(value)
            return read_features(path) if is_feature_file(path) else _saved_embedding(path, context)
        if not isinstance(value, Mapping):
            return value  # type: ignore[no-any-return]  # ``check`` refuses it or makes it an Embedding
        if value.keys() != {"uri", "checksum"} or not isinstance(value["uri"], str):
            raise InputError(
                f"features are a folder or a file, not a mapping with {', '.join(value) or 'no keys'}"
            )
        embedding = self.read(value["uri"], context)
        if embedding is None or _checksum(embedding) != value["checksum"]:
            raise InputError(f"the features in {value['uri']} have changed since they were used")
        return embedding

    def check(self, value: Any, context: InputContext) -> Embedding | None:
        if value is None:
            return None
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value)
        embedding = as_embedding(value) if isinstance(value, Tensor) and value.ndim == 2 else value
        if not isinstance(embedding, Embedding):
            what = (
                f"{tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else type(value).__name__
            )
            raise InputError(
                f"features must be an Embedding, as embed returns it, or numbers (N, D), not {what}; "
                "load_result(folder) loads a saved one"
            )
        return _checked(embedding, context)

    def record(self, value: Embedding | None) -> Any:
        """Where they were loaded from and their checksum; features in memory are recorded as an object."""
        if value is None or value.uri is None:
            return super().record(value)
        return {"uri": value.uri, "checksum": _checksum(value)}

    def is_identified(self, value: Embedding | None) -> bool:
        return True

    def fingerprint(self, value: Embedding | None) -> Any:
        return None if value is None else _checksum(value)

    def bad_values(self, good: Embedding | None, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "features of one axis", torch.rand(6)
        yield "a path", "somewhere"


def _saved_embedding(path: Path, context: InputContext) -> Embedding:
    """A saved embedding. Raises InputError for a result of another type."""
    result = context.result(path)
    if isinstance(result, Embedding):
        return result
    raise InputError(f"{path} holds {type_name(result)}, not an Embedding, such as embed saves")


def _checked(embedding: Embedding, context: InputContext) -> Embedding:
    """An embedding whose rows belong together, with finite features, on the model's device."""
    check_dense(embedding.features, "features")
    features, count = at_least_float32(embedding.features), len(embedding.ids)
    if features.ndim != 2 or not features.numel() or not features.is_floating_point():
        kind = f"{str(features.dtype).removeprefix('torch.')} {tuple(features.shape)}"
        raise InputError(f"features must be numbers (N, D) with at least one row and column, not {kind}")
    rows = {"features": features, "thumbnails": embedding.thumbnails, "labels": embedding.labels}
    for name, part in rows.items():
        if part is not None and len(part) != count:
            raise InputError(f"an embedding of {count} ids needs as many rows of {name}, not {len(part)}")
    if contains_non_finite(features):
        row = int((~features.isfinite().all(1)).nonzero()[0, 0])
        raise InputError(f"the features of image {embedding.ids[row]} contain NaN or infinity")
    thumbnails, model = embedding.thumbnails, context.model
    if model is not None:
        features, thumbnails = features.to(model.device), thumbnails.to(model.device)
        computed_by = (embedding.provenance and embedding.provenance.model) or {}
        if computed_by.get("digest", model.digest) != model.digest:
            raise InputError(
                f"the features were computed by {computed_by.get('name')}, whose weights are not those of "
                f"{model.name}: pass the model that computed them"
            )
    return dataclasses.replace(embedding, features=features.detach(), thumbnails=thumbnails)


def _checksum(embedding: Embedding) -> str:
    """Checksums of the features, ids, labels and thumbnails, as text."""
    texts = "\0".join([*embedding.ids, "", *(embedding.labels or ())])
    letters = torch.frombuffer(bytearray(texts.encode("utf-8", "surrogatepass")), dtype=torch.uint8)
    parts = (at_least_float32(embedding.features), embedding.thumbnails, letters)
    return " ".join(f"{checksum(part):08x}" for part in parts)


FEATURES = FeaturesRole()
