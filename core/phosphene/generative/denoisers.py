"""``Denoiser``: noise prediction of a diffusion or flow-matching model."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from ..errors import InputError

#: What the network of a diffusion model predicts, in the names of diffusers.
Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]


class Denoiser(nn.Module):
    """A diffusion model, which predicts the noise eps in x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps.

    Subclass it for a network of your own. ``forward(x, t)`` returns, for x (N, C, h, w) at one time step t
    = 0 ... T - 1, what ``prediction`` names: the noise, v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, or
    x_0. Further output channels, such as a predicted variance, are ignored. ``alphas_cumprod`` (T,) is
    abar, which falls from nearly 1 to nearly 0. ``encode`` and ``decode`` map images (N, ``channels``, H,
    W) in [0, 1] to x_0 and back; H and W are multiples of ``multiple``.

    With ``sigmas`` (T,), from 0 to 1, in place of ``alphas_cumprod`` it is a flow-matching model:
    x_t = (1 - sigma_t) x_0 + sigma_t eps, and ``forward`` predicts the velocity eps - x_0.
    """

    prediction: Prediction = "epsilon"
    channels: int = 3
    multiple: int = 1
    #: Whether attention keys carry the position of their token, as with rotary embeddings.
    positional_keys: bool = False
    #: Height and width of the images that it was trained on; None where it is not recorded.
    image_size: tuple[int, int] | None = None
    #: Path or name that it was loaded from.
    uri: str | None = None

    def __init__(self, alphas_cumprod: Tensor | None = None, *, sigmas: Tensor | None = None) -> None:
        super().__init__()
        if (alphas_cumprod is None) == (sigmas is None):
            raise InputError("a diffusion model has either alphas_cumprod or sigmas: pass one of them")
        # Not buffers: ``.half()`` would round them, and 1 - abar_t loses all digits in half precision.
        self.alphas_cumprod = None if alphas_cumprod is None else alphas_cumprod.detach().cpu().double()
        self.sigmas = None if sigmas is None else sigmas.detach().cpu().double()
        if self.sigmas is not None:
            self.prediction = "flow_prediction"

    @property
    def time_steps(self) -> int:
        """Number T of time steps."""
        schedule = self.sigmas if self.alphas_cumprod is None else self.alphas_cumprod
        assert schedule is not None
        return len(schedule)

    def levels(self, t: int) -> tuple[float, float]:
        """Signal and noise levels of x_t: sqrt(abar_t), sqrt(1 - abar_t), or 1 - sigma_t, sigma_t."""
        if self.alphas_cumprod is None:
            assert self.sigmas is not None
            sigma = self.sigmas[t].item()
            return 1 - sigma, sigma
        abar = self.alphas_cumprod[t].item()
        return math.sqrt(abar), math.sqrt(1 - abar)

    def predict(self, x: Tensor, t: int) -> Tensor:
        """What the network predicts of x at time step t, without further channels, of x's shape and dtype."""
        return self(x.to(next(self.parameters(), x)), t)[:, : x.shape[1]].to(x)

    def eps(self, x: Tensor, t: int) -> Tensor:
        """The predicted noise in x at time step t, of x's shape and dtype."""
        return self._noise(x, self.predict(x, t), t)

    def _noise(self, x: Tensor, output: Tensor, t: int) -> Tensor:
        """The noise in x that an output of ``predict(x, t)`` stands for."""
        signal, noise = self.levels(t)
        match self.prediction:
            case "epsilon":
                return output
            case "v_prediction":
                return noise * x + signal * output
            case "flow_prediction":
                return x + signal * output
        return (x - signal * output) / noise

    def target(self, clean: Tensor, noise: Tensor, t: int) -> Tensor:
        """What ``predict(x_t, t)`` is trained to return, of x_0 and the noise in x_t."""
        signal, level = self.levels(t)
        match self.prediction:
            case "epsilon":
                return noise
            case "v_prediction":
                return signal * noise - level * clean
            case "flow_prediction":
                return noise - clean
        return clean

    def step(self, x: Tensor, output: Tensor, t: int, next_t: int) -> Tensor:
        """x_t moved along to time step ``next_t`` by one deterministic step (DDIM, or Euler's of a flow).

        ``output`` is that of ``predict(x, max(t, next_t))``, or a linear combination of such outputs whose
        weights add up to 1, as in guidance. At pure noise, where the noise alone would not determine x_0,
        x_0 is that of ``output``.

        Source: Song, Meng and Ermon 2021, equation 12 with sigma = 0; Esser et al. 2024, equation 1.
        """
        (signal, level), (next_signal, next_level) = self.levels(t), self.levels(next_t)
        if self.prediction == "flow_prediction" and self.alphas_cumprod is None:
            return x + (next_level - level) * output
        noise = self._noise(x, output, max(t, next_t))
        if signal == 0:
            clean = {"sample": output, "v_prediction": -output}[self.prediction]
            return next_signal * clean + next_level * noise
        return next_signal * (x - level * noise) / signal + next_level * noise

    def prompted(self, text: str) -> Denoiser:
        """The same model, conditioned on a text. Raises InputError for a model without text."""
        raise InputError("this diffusion model is not conditioned on text, so it takes no prompt")

    def with_tokens(self, text: str, tokens: Tensor) -> Denoiser:
        """The same model, conditioned on a text in which every ``*`` is read as learned words.

        ``tokens`` (n, ``token_width``) are their input embeddings. Predictions are differentiable with
        respect to them. Raises InputError for a model without text, a text without ``*``, or tokens of
        another shape.
        """
        raise InputError("this diffusion model is not conditioned on text, so it learns no words")

    @property
    def token_width(self) -> int:
        """Length of the input embedding of a word, that of all text encoders together; 0 without text."""
        return 0

    def token_embedding(self, word: str) -> Tensor:
        """The input embedding (``token_width``,) of a word, the mean of its tokens'.

        Raises InputError for a model without text.
        """
        raise InputError("this diffusion model is not conditioned on text, so it reads no words")

    def word_tokens(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, each with the positions of its tokens in the text embedding.

        Raises InputError for a model without text, or a text with more tokens than the model reads.
        """
        raise InputError("this diffusion model is not conditioned on text, so it reads no words")

    def encode(self, images: Tensor) -> Tensor:
        """x_0 of images in [0, 1]: 2 I - 1."""
        return 2 * images - 1

    def decode(self, x: Tensor) -> Tensor:
        """Images of x_0: (x_0 + 1) / 2, not clipped to [0, 1]."""
        return (x + 1) / 2
