"""Parameters and invariants that attacks share: annotated types, each declared once.

Every attack leaves an image unchanged whose predicted class is not its label from the outset (``targeted``:
is the target class from the outset). ``success`` is true for such an image.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from phosphene.attacks import Norm as LpNorm
from phosphene.optimize import TransformName
from phosphene.spec import Equivariant, Invariant, InvariantTo, PixelRange, Relation, SameShape, WithinBall

Eps: TypeAlias = Annotated[
    float, Field(gt=0, le=1000, description="radius of the ball around each image, for pixels in [0, 1]")
]
Norm: TypeAlias = Annotated[LpNorm, Field(description="norm in which the ball is measured")]
StepSize: TypeAlias = Annotated[
    float, Field(gt=0, le=1000, description="length of one step, for pixels in [0, 1]")
]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=10_000, description="number of gradient steps")]
Restarts: TypeAlias = Annotated[
    int, Field(ge=1, le=1000, description="number of runs, each from another random point")
]
Momentum: TypeAlias = Annotated[
    float, Field(ge=0, le=1, description="decay of the accumulated gradient (MI-FGSM); 0: no momentum")
]
Targeted: TypeAlias = Annotated[
    bool, Field(description="whether labels are the target classes, not the true classes")
]
EotSamples: TypeAlias = Annotated[
    int, Field(ge=1, le=1000, description="number of random passes that each gradient is averaged over")
]
Augmentations: TypeAlias = Annotated[
    tuple[TransformName, ...],
    Field(max_length=8, description="random transformations that the example must survive"),
]
TargetClasses: TypeAlias = Annotated[
    int,
    Field(ge=0, le=1000, description="number of most likely other classes attacked in turn; 0: untargeted"),
]
#: The norms that ``nearest_boundary`` has a closed form for, of a minimum-norm attack.
MinimizedNorm: TypeAlias = Annotated[
    Literal["l2", "linf"], Field(description="norm of the perturbation that is minimized")
]
Candidates: TypeAlias = Annotated[
    int, Field(ge=2, le=100_000, description="number of most likely classes whose boundaries are considered")
]
MaxQueries: TypeAlias = Annotated[
    int, Field(ge=1, le=1_000_000, description="largest number of model queries for one image")
]
HeldOut: TypeAlias = Annotated[
    float, Field(ge=0, lt=1, description="fraction of the data set held out for evaluation")
]

#: What every result with ``adversarial`` promises, and what a fixed-radius attack promises.
IN_RANGE: list[Invariant] = [PixelRange(field="adversarial"), SameShape(field="adversarial")]
IN_BALL: list[Invariant] = [WithinBall(radius="eps", norm="norm"), *IN_RANGE]

#: What holds for an attack by gradients of a loss of the softmax, without random numbers.
GRADIENT_RELATIONS: list[Relation] = [
    Equivariant("hflip", fields=("adversarial",)),
    Equivariant("transpose", fields=("adversarial",)),
    InvariantTo("normalization", fields=("adversarial",)),
    InvariantTo("logit_shift", fields=("adversarial",)),
    InvariantTo("batch_order", fields=("adversarial",)),
]
