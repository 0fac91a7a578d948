"""All figures of an edit: what the classifier sees, the strict ones, and Score Video's by optical flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from torch import Tensor

from ..demo import world
from ..demo.world import Clip, Scene
from ..tav_core.pictures import image
from ..tav_core.pipeline import scores
from . import measure, strict
from .subject import Studio

CELL = 8  # pixels of a latent cell
FLOW = ("motion_error", "motion_cosine", "warp_error")


@dataclass
class Judge:
    """What says how good an edit of a clip is."""

    studio: Studio
    clip: Clip

    def figures(self, head: str, wanted: Scene, pictures: Tensor) -> dict[str, float]:
        """All figures of one edit, pictures [f, h, w, 3]."""
        return {**self.seen(head, wanted, pictures), **self.strict(head, wanted, pictures), **self.flow(pictures)}

    def seen(self, head: str, wanted: Scene, pictures: Tensor) -> dict[str, float]:
        """What the classifier sees."""
        classifier, positions = self.studio.judge, self.clip.positions
        shown = measure.right(classifier, pictures, wanted)
        places = measure.places(classifier, pictures)
        return {
            "right": shown[head],
            "kept": float(np.mean([share for other, share in shown.items() if other != head])),
            "motion": measure.motion_correlation(places, positions),
            "cells": measure.position_error(places, positions) / CELL,
            "consistency": measure.frame_consistency(classifier, pictures),
            "flicker": measure.flicker(pictures, positions),
        }

    def strict(self, head: str, wanted: Scene, pictures: Tensor) -> dict[str, float]:
        """Of another object, how whole it is and what of the clip is left; of another place, the object that stays."""
        if head == "object":
            return strict.judge(self.truth(self.meant(wanted, pictures)), pictures)
        if head == "style":
            return {}
        return {"object_kept": strict.psnr_within(pictures, self.source, strict.masks(self.clip.scenes))}

    def meant(self, wanted: Scene, pictures: Tensor) -> str:
        """The object that most frames show, of those that its name may mean."""
        seen = [frame["object"] for frame in measure.labels(self.studio.judge, pictures)]
        return max(world.LOOKS[wanted.object], key=seen.count)

    @cached_property
    def source(self) -> Tensor:
        return self.studio.through(image.from_bytes(self.clip.frames))

    @cached_property
    def truth(self) -> Callable[[str], strict.Truth]:
        return cache(lambda thing: strict.truth(self.clip, thing, self.studio.through))

    def flow(self, pictures: Tensor) -> dict[str, float]:
        """What Score Video measures by optical flow, against the clip."""
        found = scores.score(image.from_bytes(self.clip.frames), pictures)
        return {score.key: scores.mean(score.edit) for score in found if score.key in FLOW}
