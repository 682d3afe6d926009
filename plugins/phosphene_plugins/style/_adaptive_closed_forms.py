"""Closed forms of AdaIN, the decoder and its network, by hand; for the oracle of ``adaptive_style_fit``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError, ModelError, fork_random_state, load_model

from ._adain import channel_statistics
from ._adaptive_network import AdaptiveNetwork, StyleProgram
from ._decoder import Decoder, decoder_widths, log2_stride, stages_up_to
from ._pixel_features import MEAN, STD, draw_images, load_pixel_model


def statistics_of_few_positions() -> None:
    """A single value deviates by sqrt(1e-5), not NaN; the variance of two has the factor 1 / (2 - 1)."""
    single = torch.tensor([[[[1.0]]], [[[3.0]]]], dtype=torch.float64)
    mean, std = channel_statistics(single, per_image=True)
    assert mean.flatten().tolist() == [1, 3] and torch.equal(std, torch.full_like(std, 1e-5).sqrt())
    for pair, per_image in (
        (single, False),
        (single.view(1, 1, 2, 1), True),
        (single.view(1, 1, 1, 2), False),
    ):
        mean, std = channel_statistics(pair, per_image=per_image)
        assert mean.flatten().tolist() == [2] and abs(std.item() - 2.00001**0.5) < 1e-12


def decoder_is_convolutions_and_upsampling() -> None:
    """The decoder by hand; replication instead of reflection for a single row or column; its widths."""
    with fork_random_state():
        torch.manual_seed(0)
        decoder, paint = Decoder([4, 3, 2], 1).double(), Decoder([4], 2).double()
    maps = draw_images(1, 4, 2, 3, seed=0) - 0.5

    def convolve(x: Tensor, layer: nn.Module, mode: str = "reflect") -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), layer.weight, layer.bias)  # type: ignore[arg-type]

    def upsample(x: Tensor) -> Tensor:
        return x.clamp(min=0).repeat_interleave(2, 2).repeat_interleave(2, 3)

    with torch.no_grad():
        assert len(decoder.smooth) == 1 and len(decoder.widen) == 2
        smooth = convolve(upsample(convolve(maps, decoder.widen[0])), decoder.smooth[0]).clamp(min=0)
        expected = convolve(upsample(convolve(smooth, decoder.widen[1])), decoder.paint)
        assert (decoder(maps) - expected).abs().max() < 1e-12, "the decoder is not that of the definition"
        for line in (maps[:, :, :1], maps[..., :1]):
            expected = convolve(line, paint.paint, "replicate")
            assert (paint(line) - expected).abs().max() < 1e-12, "a single row or column is not replicated"
    layers = nn.Conv2d(3, 5, 1), nn.AvgPool2d(4), nn.Conv2d(5, 41, 1), nn.Conv2d(41, 20, 1)
    model = load_model(nn.Sequential(*layers), input_size=(3, 18, 24))
    assert decoder_widths(model, "2") == [41, 20, 5] and decoder_widths(model, "3") == [20, 16, 5]
    assert stages_up_to(model, "0") == ["0"] and stages_up_to(model, "3") == ["0", "1", "3"]
    assert [log2_stride(model, layer) for layer in ("0", "1")] == [0, 2]
    assert log2_stride(load_model(nn.Sequential(*layers), input_size=(3, 7, 16)), "1") == 3, "7 rows to 1"


def network_pads_and_crops() -> None:
    """Padding to the stride, four positions around an encoded image, and outputs of the image's size."""
    model, unpadded = load_pixel_model(), nn.Conv2d(3, 3, 3).double()
    network = AdaptiveNetwork.from_decoder(model, unpadded, "1", config={"channels": 3})
    assert not unpadded.training and not unpadded.weight.requires_grad
    assert network.config.keys() == {"channels", "layer", "halvings", "encoder"} and network.stride == 2
    assert network.previews.shape == (0, 3, 1, 1) and network.losses.shape == (0,)
    for shape, padded in (((8, 9), (8, 10)), ((7, 8), (8, 8)), ((8, 8), (8, 8))):
        image = draw_images(1, 3, *shape, seed=0)
        expected = image[:, :, [*range(shape[0]), -1][: padded[0]]][..., [*range(shape[1]), -1][: padded[1]]]
        assert torch.equal(network.pad(image), expected), f"{shape} is not padded to {padded}"
        maps = network.encode(image)
        assert maps.shape == (1, 3, padded[0] // 2, padded[1] // 2)
        decoded = network.decode(maps, image)
        resized = F.interpolate(unpadded(maps), padded, mode="bilinear")
        assert torch.equal(decoded, resized[..., : shape[0], : shape[1]]), "not of the image's size"
    pool = nn.Sequential(nn.AvgPool2d(11, 1, 5))  # a network without parameters is one in float32
    blur = load_model(pool, input_size=(3, 16, 16), mean=(0, 0, 0), std=(1, 1, 1))
    image = draw_images(1, 3, 8, 7, seed=0)
    expected = F.avg_pool2d(F.pad(image, (4, 4, 4, 4), mode="replicate"), 11, 1, 5)[..., 4:-4, 4:-4]
    encoded = AdaptiveNetwork.from_decoder(blur, unpadded, "0").encode(image)
    assert (encoded - expected).abs().max() < 1e-5, "an image is not encoded with four positions around it"
    for call, message in (
        (lambda: network.encode(image[:, :1]), "the encoder takes 3 channels, the images have 1"),
        (lambda: AdaptiveNetwork.restore({"config": {}}, None), "the field 'config'"),
    ):
        refusal = ""
        try:
            call()
        except InputError as error:
            refusal = str(error)
        assert message in refusal, f"{message}: {refusal}"


class _Tokens(nn.Module):
    """Pixels as tokens (N, 256, 3), which have no maps, and a condition on values, which torch.fx refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.tokens = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
        nn.init.dirac_(self.pixels.weight)
        nn.init.eye_(self.tokens.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pixels(x)
        result: Tensor = self.tokens((x if x.max() < 1e3 else -x).flatten(2).mT)
        return result.mean(1)


def exported_network_is_stylization() -> None:
    """g(AdaIN(f(c), f(s))) of squared pixels at stride 4, in closed form; its inputs; encoders refused."""
    pixels = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.dirac_(pixels.weight)
    pool = nn.Sequential(nn.Dropout(), pixels, nn.AvgPool2d(9, 4, 4)).double()
    plain = load_model(pool, input_size=(3, 16, 20), mean=MEAN, std=STD)
    model = plain.defended(torch.square, "squares")
    with fork_random_state():
        torch.manual_seed(1)
        decoder = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Dropout()).double()
    paint: Any = decoder[0]
    network = AdaptiveNetwork.from_decoder(model, decoder, "2", config={"widths": [3], "channels": 3})
    pool.train()  # the caller's, which remains as it is
    program = StyleProgram(network)
    assert not program.encoder.training and not any(p.requires_grad for p in program.parameters())
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))

    def encode(images: Tensor) -> Tensor:
        """Pixels repeated up to a multiple of 4 and 16 pixels more, squared, normalized and averaged."""
        right, down = (-side % 4 + 16 for side in images.shape[:1:-1])
        padded = F.pad(images, (16, right, 16, down), mode="replicate")
        return F.avg_pool2d((padded.square() - mean) / std, 9, 4, 4)[..., 4:-4, 4:-4]

    contents, styles = draw_images(2, 3, 9, 14, seed=2), draw_images(2, 3, 15, 6, seed=3).square()
    content, style = encode(contents), encode(styles)
    means, stds = zip(
        *((x.mean((2, 3), True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()) for x in (content, style)),
        strict=True,
    )
    target = stds[1] * (content - means[0]) / stds[0] + means[1]
    decoded = F.interpolate(paint(target), (12, 16), mode="bilinear")[..., :9, :14].detach()
    # Some of it above 1 and some below 0.
    scale = 2 / float(decoded.max() - decoded.min())
    offset = -0.5 - scale * float(decoded.min())
    expected = (scale * decoded + offset).clamp(0, 1)
    paint.weight.data *= scale
    paint.bias.data = scale * paint.bias.data + offset
    for name, stylized in (
        ("the exported network", program(contents, styles)),
        ("stylize", network.stylize(contents, network.style_statistics(styles), torch.eye(2))),
    ):
        assert (stylized - expected).abs().max() < 1e-9, name
    pool.eval()
    exported, inputs = network.export_network()
    assert {name: x.shape for name, x in inputs.items()} == {
        "images": (2, 3, 64, 96), "style": (2, 3, 56, 80),
    } and all(x.dtype == torch.float64 and 0 <= x.min() < x.max() <= 1 for x in inputs.values())  # fmt: skip
    by_stylize = network.stylize(inputs["images"], network.style_statistics(inputs["style"]), torch.eye(2))
    assert (exported(**inputs) - by_stylize).abs().max() < 1e-9

    tokens = load_model(_Tokens(), input_size=(3, 16, 16))
    for encoder, layer, message in (
        (tokens, "tokens", "_Tokens has tokens, not maps (N, C, h, w)"),
        (tokens, "pixels", "_Tokens at 'pixels': TraceError: symbolically traced"),
    ):
        refused = AdaptiveNetwork.from_decoder(encoder, decoder, layer)
        refusal = ""
        try:
            StyleProgram(refused)
        except ModelError as error:
            refusal = str(error)
        assert message in refusal, f"{message}: {refusal}"
