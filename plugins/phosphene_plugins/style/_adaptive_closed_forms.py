"""Closed forms of AdaIN, the decoder and its network, by hand; for the oracle of ``adaptive_style_fit``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phosphene import InputError, fork_random_state, load_model

from ._adain import channel_statistics
from ._adaptive_network import AdaptiveNetwork
from ._decoder import Decoder, decoder_widths, log2_stride, stages_up_to
from ._pixel_features import draw_images, load_pixel_model


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
