"""A clip that is edited, and the demo's model that edits it: what every way to edit needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ..tav_core import host
from ..tav_core.method.guidance import Steering
from ..tav_core.method.tuning import Recipe
from ..tav_core.pictures import image
from ..tav_core.pipeline import editing
from ..tav_core.pipeline.apply import apply_weights
from ..tav_core.pipeline.one_shot import one_shot_tune

# The paper's recipe scaled to this model, which is small and learns quickly.
RECIPE = Recipe(steps=300, learning_rate=5e-4)
STEPS, CFG = 30, 3.0
# Each frame's own statistics, which the image model was trained with. The paper's code takes those of the whole video;
# here that loses objects of another shape (a row of the table).
GROUP_NORM = "per_frame"
Edit = Callable[[str], dict[str, Tensor]]  # from a prompt to the edited latents


@dataclass
class Studio:
    """The demo model, and what every method below needs of it."""

    model: host.ModelPatcher
    clip: Any
    vae: Any
    judge: Any  # of an evaluation's own

    def encode(self, text: str) -> host.Conditioning:
        return [[self.clip.encode_from_tokens(self.clip.tokenize(text)), {}]]

    def latents(self, pictures: np.ndarray) -> dict[str, Tensor]:
        return {"samples": self.vae.encode(image.from_bytes(pictures))}

    def decode(self, latent: dict[str, Tensor]) -> Tensor:
        return self.vae.decode(latent["samples"]).clamp(0, 1)

    def through(self, pictures: Tensor) -> Tensor:
        """Pictures [f, h, w, 3] as the autoencoder passes them."""
        return self.decode(self.latents((255 * pictures).numpy()))


@dataclass
class Subject:
    """A clip that is to be edited, with its latents."""

    studio: Studio
    clip: Any  # of either world
    latent: dict[str, Tensor]
    recipe: Recipe = RECIPE
    steps: int = STEPS

    def video(self, **choices: Any) -> host.ModelPatcher:
        """The inflated model, untuned; `choices` are of `host.inflate`."""
        return host.inflate(self.studio.model, **{"group_norm": GROUP_NORM, **choices})

    @cached_property
    def tuned(self) -> host.ModelPatcher:
        return self.tune()

    def tune(self, **choices: Any) -> host.ModelPatcher:
        video, caption = self.video(**choices), self.studio.encode(self.clip.caption)
        weights = one_shot_tune(video, self.latent, caption, self.recipe, "fp32", "nothing", on_step=quiet)
        return apply_weights(video, weights)

    def invert(self, video: host.ModelPatcher, method: str = "plain") -> dict[str, Any]:
        return editing.invert(video, self.latent, self.studio.encode(""), self.steps, quiet, method)[0]

    def edit_from(
        self, video: host.ModelPatcher, start: dict[str, Any], cfg: float = CFG, steering: Steering = editing.PLAIN
    ) -> Edit:
        studio, empty = self.studio, self.studio.encode("")
        return lambda prompt: editing.sample_video(
            video, start, studio.encode(prompt), empty, self.steps, cfg, quiet, steering
        )


def quiet(*_args: Any) -> None:
    """Instead of the host's previews."""
