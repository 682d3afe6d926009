"""Networks of transformers that answer questions: the families of LLaVA and BLIP, from a local folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phosphene import InputError, MissingExtra, ModelError, fork_random_state

from ._answer_models import AnswerModel, Pass

#: The architectures that are read, and what an image token is in each.
ARCHITECTURES = ("LlavaForConditionalGeneration", "BlipForConditionalGeneration")
#: Means and standard deviations of CLIP, which a folder without a processor has.
_PROCESSOR = "preprocessor_config.json"


class _HuggingFaceAnswers(AnswerModel):
    """What both families share: preprocessing, tokens, and the side of the grid."""

    def __init__(self, network: Any, tokenizer: Any, statistics: tuple[list[float], list[float]], uri: str):
        self.network, self.tokenizer, self._uri, self.name = network, tokenizer, uri, uri
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in statistics)
        vision = network.config.vision_config
        side = vision.image_size // vision.patch_size
        self.input_size, self.grid = (vision.image_size,) * 2, (side, side)

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def ends(self) -> frozenset[int]:
        configured = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        return frozenset(number for number in configured if number is not None)

    @property
    def special(self) -> frozenset[int]:
        rows = self.network.get_input_embeddings().num_embeddings  # more than the tokenizer has, as padding
        return frozenset([*self.tokenizer.all_special_ids, *range(len(self.tokenizer), rows)])

    def normalize(self, image: Tensor) -> Tensor:
        """The network's input, in its precision and on its device."""
        weight = next(self.network.parameters())
        pixels: Tensor = (image - self.mean.to(image)) / self.std.to(image)
        return pixels.to(weight.device, weight.dtype)

    def encode_answer(self, text: str) -> list[int]:
        numbers: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return numbers

    def decode(self, number: int) -> str:
        text: str = self.tokenizer.decode([number]).strip()
        return text or self.tokenizer.convert_ids_to_tokens(number)


class LlavaAnswers(_HuggingFaceAnswers):
    """LLaVA: a vision tower's patch features, projected, are tokens in the sequence of a language model."""

    @property
    def image_id(self) -> int:
        """The number of the token that stands for the image."""
        config = self.network.config
        number = getattr(config, "image_token_id", None)
        return int(config.image_token_index if number is None else number)

    @property
    def special(self) -> frozenset[int]:
        return super().special | {self.image_id}

    def embedding(self, tokens: Tensor) -> nn.Embedding:
        layer: nn.Embedding = self.network.get_input_embeddings()
        return layer

    def image_tokens(self, image: Tensor) -> Tensor:
        features = self.network.get_image_features(pixel_values=self.normalize(image))
        features = getattr(features, "pooler_output", features)
        tokens: Tensor = (features[0] if isinstance(features, (list, tuple)) else features).reshape(
            -1, self.network.get_input_embeddings().embedding_dim
        )
        if len(tokens) != math.prod(self.grid):
            raise ModelError(
                f"{self.name} has {len(tokens)} image tokens, not one for each of {self.grid[0]} x "
                f"{self.grid[1]} patches: their positions are not determined"
            )
        return tokens

    def read(self, tokens: Tensor, ids: Sequence[int]) -> Pass:
        (position,) = [n for n, number in enumerate(ids) if number == self.image_id]
        embed = self.network.get_input_embeddings()
        numbers = torch.tensor(list(ids), device=tokens.device)
        before, after = embed(numbers[:position]), embed(numbers[position + 1 :])
        sequence = torch.cat([before, tokens, after])[None]
        output = self.network(inputs_embeds=sequence, output_attentions=True, use_cache=False)
        count = len(tokens)
        columns = torch.arange(position, position + count, device=tokens.device)
        # The logits after the image token are those after its last patch.
        rows = torch.arange(len(ids), device=tokens.device)
        rows = torch.where(rows >= position, rows + count - 1, rows)
        return Pass(output.logits[0, rows], list(output.attentions), rows, columns)

    def encode(self, text: str) -> list[int]:
        marker = self.tokenizer.convert_ids_to_tokens(self.image_id)
        text = text if marker in text else f"{marker}\n{text}"
        numbers: list[int] = self.tokenizer(text)["input_ids"]
        if (count := numbers.count(self.image_id)) != 1:
            raise InputError(f"a question names its image once, as {marker}; it has {count} of them")
        return numbers


class BlipAnswers(_HuggingFaceAnswers):
    """BLIP: words attend to the patch features of a vision tower by cross-attention."""

    def embedding(self, tokens: Tensor) -> nn.Embedding:
        layer: nn.Embedding = self.network.text_decoder.get_input_embeddings()
        return layer

    def image_tokens(self, image: Tensor) -> Tensor:
        features: Tensor = self.network.vision_model(pixel_values=self.normalize(image)).last_hidden_state
        return features[0]  # the class token and the patches

    def read(self, tokens: Tensor, ids: Sequence[int]) -> Pass:
        numbers = torch.tensor([list(ids)], device=tokens.device)
        output = self.network.text_decoder(
            input_ids=numbers,
            encoder_hidden_states=tokens[None],
            output_attentions=True,
            use_cache=False,
        )
        columns = torch.arange(len(tokens), device=tokens.device)[-math.prod(self.grid) :]
        rows = torch.arange(len(ids), device=tokens.device)
        return Pass(output.logits[0], list(output.cross_attentions), rows, columns)

    def encode(self, text: str) -> list[int]:
        numbers: list[int] = self.tokenizer(text)["input_ids"]
        # A caption goes on after the question: no end of a text, and the decoder's own start.
        numbers = [number for number in numbers if number not in self.ends]
        start = self.network.config.text_config.bos_token_id
        if numbers and numbers[0] == self.tokenizer.cls_token_id:
            numbers = numbers[1:]
        return [start, *numbers]


def load_hf_answer_model(name: str) -> AnswerModel:
    """A network of transformers from a local folder, with its tokenizer and its processor's mean and std.

    Raises InputError for a folder without a configuration, ModelError for another architecture, a folder
    without a tokenizer or with weights that are no safetensors.
    """
    if find_spec("transformers") is None:
        raise MissingExtra(f"hf:{name}", "transformers")
    import transformers

    from ..models._hf_networks import quiet

    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} contains no config.json: `hf download {name} --local-dir FOLDER` writes a repository "
            "of the hub there, and network.save_pretrained one of your own"
        )
    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    architecture = next((each for each in architectures if each in ARCHITECTURES), None)
    if architecture is None:
        raise ModelError(
            f"hf:{folder} is a {', '.join(architectures) or 'network without an architecture'}; answers are "
            f"explained of {' and '.join(ARCHITECTURES)}. Subclass AnswerModel for another network"
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # Fused attention returns no probabilities.
    eager = {"attn_implementation": "eager", "use_safetensors": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        with quiet(), fork_random_state():
            network = getattr(transformers, architecture).from_pretrained(folder, **options, **eager)
    except (OSError, ValueError) as error:
        raise ModelError(f"hf:{folder} cannot be loaded: {error}") from error
    processor = folder / _PROCESSOR
    if not processor.is_file():
        raise ModelError(
            f"hf:{folder} has no {_PROCESSOR}, which says how images are normalized: save its processor there"
        )
    values = json.loads(processor.read_text())
    statistics = values["image_mean"], values["image_std"]
    kind = LlavaAnswers if architecture.startswith("Llava") else BlipAnswers
    return kind(network.eval().requires_grad_(False), tokenizer, statistics, f"hf:{folder.resolve()}")
