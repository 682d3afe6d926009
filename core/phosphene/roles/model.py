"""The role ``model``: the model that a method explains, trains or attacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias

from ..errors import InputError
from ..models import Model as _Model
from ..models import SavedSource, check_saved_options, load_model
from ..models.arguments import check_has_values, check_weight_types
from ..spec.spec import Role
from .base import InputContext, InputRole, SampleRequest, check_type

#: A wrapped model, as ``load_model`` returns it.
Model: TypeAlias = Annotated[_Model, Role("model")]


class ModelRole(InputRole):
    """A model; default: the bundled classifier."""

    name, value_type, default = "model", _Model, "builtin:shapes-vgg"
    metavar = "URI"
    description = "a ``Model``, as ``load_model`` returns it"
    help = "model as scheme:name, such as timm:resnet18 (default: builtin:shapes-vgg)"

    def read(self, value: Any, context: InputContext) -> _Model:
        """A model by its URI, alone or in a mapping with other arguments of ``load_model``."""
        if not isinstance(value, Mapping):
            return load_model(value)
        settings = {str(name): setting for name, setting in value.items()}
        uri = settings.pop("uri", None)
        if not isinstance(uri, str):
            raise InputError('a model with settings is {"uri": "scheme:name", "weights": ..., ...}')
        check_saved_options(uri, {n: v for n, v in settings.items() if n not in SavedSource.model_fields})
        try:
            return load_model(uri, **settings)
        except TypeError as error:
            raise InputError(f"{uri} cannot be loaded with {settings}: {error}") from error

    def check(self, value: Any, context: InputContext) -> _Model:
        model: _Model = check_type(value, _Model, "as load_model(module, mean=..., std=...) returns it")
        check_has_values(model.module, model.name)
        check_weight_types(model.module, model.name)  # it may have been quantized since it was loaded
        return model

    def sample(self, request: SampleRequest) -> _Model:
        return request.model

    def bad_values(self, good: _Model, context: InputContext) -> Iterator[tuple[str, Any]]:
        yield "a bare module", good.module
        yield "a name", "resnet18"


MODEL = ModelRole()
