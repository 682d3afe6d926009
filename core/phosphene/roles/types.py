"""The input roles of methods, as annotated types: annotate a positional argument with one of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field
from torch import Tensor

from ..spec.spec import Role

if TYPE_CHECKING:
    from ..data.datasets import Dataset as _Dataset
    from ..generative.denoisers import Denoiser as _Denoiser
    from ..generative.generators import Generator as _Generator
    from ..models import Model as _Model
    from ..results import TrainedNetwork


#: A wrapped model; ``load_model`` makes one.
Model: TypeAlias = Annotated["_Model", Role("model")]


#: Pictures: float (N, C, H, W), RGB, in [0, 1].
Images: TypeAlias = Annotated[Tensor, Role("images")]


#: The same, whose files are read at their own size, for what a model sees at any.
Content: TypeAlias = Annotated[Tensor, Role("images", own_size=True)]


#: Class indices: int64 (N,). ``run`` takes what the model predicts where none are given.
Labels: TypeAlias = Annotated[Tensor, Role("labels")]


#: Where the object is in each image, bool (N, H, W), or None where nobody knows. ``run`` knows the bundled
#: scenes' own.
Masks: TypeAlias = Annotated[Tensor | None, Role("masks")]


#: Where a search begins: a picture for each image, (N, C, H, W) in [0, 1], or None. ``run`` takes a saved
#: result, too, whose pictures are then gone on with.
Start: TypeAlias = Annotated[Tensor | None, Role("start")]


#: Pictures whose forms are wanted, of any size, (G, C, H, W) in [0, 1], or None.
Guide: TypeAlias = Annotated[Tensor | None, Role("guide")]


#: One scalar per image. Callers give a class, a unit ("layer4[17]"), a callable or None (the predicted
#: class); the method receives an ``Objective``.
Target: TypeAlias = Annotated[Any, Role("target")]


#: Many pictures, read in batches: a folder, a tensor, the bundled scenes.
Dataset: TypeAlias = Annotated["_Dataset", Role("dataset")]


#: A texture sample: float (N, 3, H, W) in [0, 1].
Texture: TypeAlias = Annotated[Tensor, Role("texture")]


#: Pictures whose style is wanted: float (S, 3, H, W) in [0, 1].
Styles: TypeAlias = Annotated[Tensor, Role("styles")]


#: A network that a training method made, for its partner that applies it.
Stylizer: TypeAlias = Annotated["TrainedNetwork", Role("stylizer")]


#: One that is shown its styles, and knows none by name.
AdaptiveStylizer: TypeAlias = Annotated["TrainedNetwork", Role("adaptive_stylizer")]


#: A diffusion model: the noise in x at a time t, and the way from pixels to x and back.
Denoiser: TypeAlias = Annotated["_Denoiser", Role("denoiser")]


#: A decoder from codes, like draws of N(0, I), to pictures.
Generator: TypeAlias = Annotated["_Generator", Role("generator")]


#: A parameter that names a layer, checked against the model before work starts.
LayerName: TypeAlias = Annotated[str, Role("layer")]


#: A parameter of what is drawn step by step.
Frames: TypeAlias = Annotated[
    int,
    Field(ge=0, le=1000, description="pictures to keep of how it came about, evenly over the steps"),
]


#: The seed of all randomness in a call; None draws one and records it.
_told = "seed of all randomness; drawn and recorded when absent"


Seed: TypeAlias = Annotated[int | None, Role("seed"), Field(ge=0, lt=2**63, description=_told)]
