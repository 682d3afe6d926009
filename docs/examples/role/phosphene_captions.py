"""The role ``captions``: one text per image."""

from pathlib import Path
from typing import Annotated

from phosphene import InputError
from phosphene.roles import InputRole
from phosphene.spec import Role

#: One text per image: a tuple of N strings.
Captions = Annotated[tuple[str, ...], Role("captions")]


class CaptionsRole(InputRole):
    """Captions; left out, "a picture of CLASS" for each image's predicted class."""

    name, value_type, per_image = "captions", tuple, True
    description = "one text per image"
    metavar = "TEXT|FILE"
    help = "caption of each image, repeatable; or a text file with a line each (default: the predicted class)"

    def read(self, value, context):
        """A list of texts, one text, a file of lines, or None -> a tuple of texts."""
        if value is None:
            logits = context.model(context.inputs["images"])
            return tuple(f"a picture of {context.model.class_name(i)}" for i in logits.argmax(1).tolist())
        if isinstance(value, str):
            file = Path(value)
            return tuple(file.read_text().splitlines()) if file.is_file() else (value,)
        return tuple(value)

    def check(self, value, context):
        if not isinstance(value, tuple) or not all(isinstance(text, str) and text.strip() for text in value):
            raise InputError(f"captions are a tuple of texts that are not empty, not {value!r:.60}")
        context.need_one_each(value, "caption")
        return value

    def record(self, value):
        """As JSON; ``read`` takes it back."""
        return list(value)

    def sample(self, request):
        """For the conformance kit: the classes in turn."""
        names = [request.model.class_name(n % request.classes) for n in range(request.count)]
        return tuple(f"a picture of {name}" for name in names)

    def bad_values(self, good, context):
        """For the conformance kit: what ``check`` must refuse."""
        yield "too few captions", good[:-1]
        yield "one text instead of a tuple", good[0]
        yield "an empty caption", (*good[:-1], " ")
        yield "numbers", tuple(range(len(good)))
        yield "nothing", None


CAPTIONS = CaptionsRole()
