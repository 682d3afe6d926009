"""``VideoStylization``, the result of ``video_style``: stylized frames, and how much they flicker."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from phosphene import InputError, UnknownName
from phosphene.images import write_gif, write_mp4
from phosphene.images.charts import plain_label
from phosphene.results import Panel, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Most frames in the figure.
_DRAWN = 6


@dataclass(frozen=True, eq=False, kw_only=True)
class VideoStylization(Result):
    """A stylized video: ``images`` and ``stylized`` (T, 3, H, W) in [0, 1], ``style`` the name of the style.

    ``consistent`` (T - 1, H, W), bool, are the pixels of each frame from the second on whose motion since the
    frame before is consistent, and ``flicker`` (T - 1,) the root mean square difference there between a
    stylized frame and the one before, warped along the flow. ``input_flicker`` is that of the input: what the
    flow does not explain. ``independent`` (T, 3, H, W) are the frames stylized each on its own and
    ``independent_flicker`` (T - 1,) their flicker, where ``compare`` was set. ``losses`` (steps, T),
    ``sources`` (S, 3, H', W') the styles, ``fps`` the frames per second of the film.
    """

    shapes: ClassVar[Mapping[str, str]] = {
        "images": "T C H W",
        "stylized": "T C H W",
        "consistent": "P H W",
        "flicker": "P",
        "input_flicker": "P",
        "independent": "T C H W",
        "independent_flicker": "P",
        "sources": "S C h w",
        "losses": "steps T",
    }

    images: Tensor
    stylized: Tensor
    style: str
    consistent: Tensor
    flicker: Tensor
    input_flicker: Tensor
    sources: Tensor
    losses: Tensor
    fps: float
    independent: Tensor | None = None
    independent_flicker: Tensor | None = None

    @property
    def frame_seconds(self) -> float:
        return 1 / self.fps

    def panels(self) -> list[list[Panel]]:
        """Per frame: the frame, the one stylized alone, if any, and the stylized one."""
        groups = []
        for n, (image, stylized) in enumerate(zip(self.images, self.stylized, strict=True)):
            alone = [] if self.independent is None else [Panel(self.independent[n], "frame alone")]
            groups.append([Panel(image, f"frame {n}"), *alone, Panel(stylized, self.style, is_output=True)])
        return groups

    def lines(self) -> list[str]:
        """The mean flicker of the input, of frames stylized alone, if any, and of the video."""
        values = {
            "input": self.input_flicker,
            "frames alone": self.independent_flicker,
            "video": self.flicker,
        }
        return [f"flicker, {name}: {v.mean():.4f}" for name, v in values.items() if v is not None]

    def draw(self) -> Figure:
        """Up to six frames beside the stylized ones, and the flicker from frame to frame."""
        from matplotlib.figure import Figure

        count = len(self.images)
        numbers = sorted({round(n * (count - 1) / (_DRAWN - 1)) for n in range(_DRAWN)})
        rows = [("input", self.images, self.input_flicker)]
        if self.independent is not None and self.independent_flicker is not None:
            rows.append(("each frame alone", self.independent, self.independent_flicker))
        rows.append((self.style, self.stylized, self.flicker))
        height, width = self.images.shape[2:]
        side = 1.7
        cell = side * height / width
        figure = Figure(
            figsize=(side * len(numbers) + 0.3, (cell + 0.05) * len(rows) + 1.9),
            dpi=110,
            layout="constrained",
        )
        ratios = [*[cell] * len(rows), 1.4]
        grid = figure.add_gridspec(len(ratios), len(numbers), height_ratios=ratios, hspace=0.02, wspace=0.02)
        for r, (name, images, _) in enumerate(rows):
            for c, number in enumerate(numbers):
                axis = figure.add_subplot(grid[r, c])
                pixels = images[number].permute(1, 2, 0).float().cpu().numpy()
                axis.imshow(pixels, interpolation="nearest" if max(height, width) < 128 else "antialiased")
                axis.set_xticks([]), axis.set_yticks([]), axis.spines[:].set_visible(False)
                if r == 0:
                    axis.set_title(f"frame {number}", fontsize=8)
                if c == 0:
                    axis.set_ylabel(plain_label(name, 24), fontsize=8)
        chart = figure.add_subplot(grid[-1, :])
        for name, _, flicker in rows:
            label = plain_label(f"{name}: {float(flicker.mean()):.3f}", 40)
            chart.plot(range(1, count), flicker.cpu(), marker=".", label=label)
        chart.set_ylim(bottom=0)
        chart.set_xticks(numbers)
        chart.set_xlabel("frame", fontsize=8)
        chart.set_ylabel("flicker", fontsize=8)
        chart.tick_params(labelsize=7)
        chart.legend(fontsize=7, frameon=False, loc="center right")
        chart.spines[["top", "right"]].set_visible(False)
        return figure

    def animation_frames(self) -> list[Tensor]:
        return list(self.stylized)

    def save_video(self, path: str | os.PathLike[str]) -> Path:
        """Write the stylized frames as MP4 or GIF, by the suffix, with ``fps`` frames per second.

        Raises InputError for another suffix and a file that exists, MissingExtra for MP4 without ffmpeg.
        """
        file = Path(path)
        writers = {".mp4": write_mp4, ".gif": write_gif}
        if file.suffix.lower() not in writers:
            raise UnknownName("suffix of a video", file.suffix or str(file), writers)
        if file.exists():
            raise InputError(f"{file} exists already, and is not overwritten")
        try:
            writers[file.suffix.lower()](list(self.stylized), file, seconds=self.frame_seconds)
        except OSError as error:
            raise InputError(f"the video cannot be written to {file}: {error}") from error
        return file
