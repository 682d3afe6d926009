"""``open_clip:`` - vision-language models whose classes are sentences: ``open_clip:ViT-B-32(a dog; a cat)``.

open_clip is imported when a network is loaded: this module is imported for every model.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from phosphene import InputError, MissingExtra, ModelError, UnknownName, hookimpl

from ._downloads import fetch_from_hub

if TYPE_CHECKING:
    from torch import Tensor, nn

#: An architecture, a pretrained tag of it, prompts.
_PATTERN = re.compile(r"(?P<architecture>[^.()]*)(?:\.(?P<tag>[^()]+))?(?:\((?P<prompts>.*)\))?", re.DOTALL)


class OpenClipLoader:
    """Every CLIP of ``open_clip.list_models`` and ``list_pretrained``: ``ViT-B-32``, ``ViT-B-32.openai``.

    The classes are the prompts in parentheses after the name, separated by semicolons, or the option
    ``prompts=[...]``; the text tower embeds them once. ``weights`` is a pretrained tag of the architecture,
    or "DEFAULT", its first; a file of weights holds both towers. Other options are passed to
    ``open_clip.create_model``. Images are center-cropped, also for networks (SigLIP) that were trained on
    squeezed ones.
    """

    random_by_default = True
    fills = True

    def load(
        self, name: str, *, weights: Any, pretrained: bool, **options: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        try:
            import open_clip
        except ImportError as error:
            raise MissingExtra(f"open_clip:{name}", "open_clip") from error
        from ._zero_shot_classifier import TextTower, ZeroShotClassifier

        match = _PATTERN.fullmatch(name)
        architecture = match["architecture"] if match else name
        if match is None or architecture not in open_clip.list_models():
            raise UnknownName("open_clip model", architecture, open_clip.list_models())
        prompts = _prompts(architecture, match["prompts"], options.pop("prompts", None))
        state, cfg = _weights(architecture, match["tag"], weights, pretrained, options.get("cache_dir"))
        # Some published weights belong to a network with other activations than its architecture's.
        options = {"force_quick_gelu": cfg.get("quick_gelu", False), **options}
        with _without_logging_setup():
            clip = open_clip.create_model(architecture, load_weights=False, pretrained_text=False, **options)
            tokens = _tokens(architecture, clip.eval().context_length, prompts)
        if state is not None:
            _fill(clip, state, f"open_clip:{architecture}")
        preprocessing = open_clip.get_model_preprocess_cfg(clip) | cfg
        size = preprocessing["size"]
        return ZeroShotClassifier(clip, tokens), {
            "name": f"open_clip:{architecture}" + (f".{cfg['tag']}" if cfg else ""),
            "classes": prompts,
            "task": "classification",
            "embed_text": TextTower(clip, partial(_tokens_of, architecture, clip.context_length)),
            "input_size": (3, size, size) if isinstance(size, int) else (3, *size),
            **{key: preprocessing[key] for key in ("mean", "std", "interpolation")},
        }

    def saved_options(self, name: str) -> Sequence[str]:
        """The prompts and what changes the network; no folder of a cache."""
        return ("prompts", "force_quick_gelu", "force_image_size")

    def names(self) -> Sequence[str]:
        """Every architecture and every pretrained tag, without prompts."""
        if find_spec("open_clip") is None:
            return ()
        import open_clip

        return [*open_clip.list_models(), *(f"{name}.{tag}" for name, tag in open_clip.list_pretrained())]


def _prompts(architecture: str, text: str | None, option: Any) -> list[str]:
    """The prompts after the name or of the option; InputError where there are none, or both."""
    if text is not None and option is not None:
        raise InputError(f"open_clip:{architecture} has prompts twice: after its name and as prompts=[...]")
    prompts = [prompt.strip() for prompt in text.split(";")] if text is not None else option
    if not prompts:
        raise InputError(
            f"open_clip:{architecture} compares images with sentences and needs them as prompts: "
            f"'open_clip:{architecture}(a photo of a dog; a photo of a cat)', or prompts=[...]"
        )
    if isinstance(prompts, str) or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise InputError(f"prompts must be a list of sentences, none of them empty, not {prompts!r}")
    return list(prompts)


def _weights(
    architecture: str, tag: str | None, weights: Any, pretrained: bool, cache: str | None
) -> tuple[Mapping[str, Tensor] | None, dict[str, Any]]:
    """The tensors of both towers, None for random weights, and the configuration of a pretrained tag."""
    import open_clip

    from phosphene.models import read_weights

    state = weights if isinstance(weights, Mapping) else None
    weights = weights if state is None else None
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in (None, "DEFAULT"):
        tag = weights
    elif tag is None and state is None and (pretrained or weights):
        if not tags:
            raise ModelError(
                f"there are no pretrained weights for open_clip:{architecture}; pass weights='a local file'"
            )
        tag = tags[0]
    if tag is None:
        return state, {}
    if tag not in tags:
        raise UnknownName("pretrained weights", tag, tags, f"open_clip:{architecture}")
    cfg = {**open_clip.get_pretrained_cfg(architecture, tag), "tag": tag}
    if state is None and (pretrained or weights):
        repository, _, file = cfg["hf_hub"].rpartition("/")
        files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
        state = read_weights(fetch_from_hub(repository, *files, cache=cache))
    return state, cfg


def _tokens(architecture: str, length: int, prompts: Sequence[str]) -> Tensor:
    tokens: Tensor = _tokenizer(architecture, length)(list(prompts))
    return tokens


@functools.cache
def _tokenizer(architecture: str, length: int) -> Callable[[list[str]], Tensor]:
    import open_clip

    try:
        return open_clip.get_tokenizer(architecture, context_length=length)
    except ImportError as error:
        raise ModelError(
            f"the tokenizer of open_clip:{architecture} is not installed: pip install transformers ({error})"
        ) from error


def _tokens_of(architecture: str, length: int, text: str) -> Tensor:
    return _tokens(architecture, length, [text])


def _fill(clip: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load both towers, from every layout of open_clip and resized to this image size."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    from phosphene.models import fill_weights

    state = convert_state_dict(clip, {key.removeprefix("module."): value for key, value in state.items()})
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    resize_pos_embed(state, clip), resize_text_pos_embed(state, clip)
    fill_weights(clip, state, "passed", name)


@contextmanager
def _without_logging_setup() -> Iterator[None]:
    """open_clip logs through the root logger, which would otherwise configure the program's logging."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


@hookimpl
def phosphene_model_loaders():
    return {"open_clip": OpenClipLoader()}
