"""``ROLES``: every input role by name, the core's own and those of plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import UnknownName
from ..registry.extensions import extensions
from .adaptive_stylizer import ADAPTIVE_STYLIZER
from .base import InputRole
from .checkpoints import CHECKPOINTS
from .dataset import DATASET
from .denoiser import DENOISER
from .features import FEATURES
from .generator import GENERATOR
from .guide import GUIDE
from .images import IMAGES
from .labels import LABELS
from .masks import MASKS
from .model import MODEL
from .other_model import OTHER_MODEL
from .predicted_stylizer import PREDICTED_STYLIZER
from .sources import SOURCES
from .start import START
from .styles import STYLES
from .stylizer import STYLIZER
from .target import TARGET
from .texture import TEXTURE
from .video import VIDEO

_CORE: dict[str, InputRole] = {
    role.name: role
    for role in (
        *(MODEL, OTHER_MODEL, IMAGES, LABELS, MASKS, START, GUIDE, TARGET, DATASET, TEXTURE, STYLES),
        *(STYLIZER, ADAPTIVE_STYLIZER, DENOISER, GENERATOR, FEATURES, CHECKPOINTS, SOURCES, VIDEO),
        PREDICTED_STYLIZER,
    )
}


class Roles(Mapping[str, InputRole]):
    """Every input role by name. Plugins are asked only for names that the core does not have."""

    def __getitem__(self, name: str) -> InputRole:
        """The role of this name. Raises UnknownName."""
        if name in _CORE:
            return _CORE[name]
        brought = self._from_plugins()
        if name not in brought:
            raise UnknownName("input role", name, (*_CORE, *brought))
        return brought[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*_CORE, *self._from_plugins())))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _from_plugins(self) -> dict[str, InputRole]:
        roles: dict[str, InputRole] = extensions.gather("phosphene_roles", lambda role: role.name)
        return roles


ROLES = Roles()


def is_per_image(role: str) -> bool:
    """Whether an input of this role may have a value of its own for each image."""
    return role == "target" or ROLES[role].per_image
