"""What a picture of the world shows: object, background, style, and where the object is.

Trained on rendered pictures only, never on the text-to-image model's output, which it is there to judge.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..demo import world

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
HEADS = {"object": world.OBJECTS, "background": tuple(world.BACKGROUNDS), "style": tuple(world.STYLES)}


class Seen(NamedTuple):
    """Scores of each class, [n, classes], and the object's centre as x, y fractions of the picture's sides, [n, 2]."""

    object: Tensor
    background: Tensor
    style: Tensor
    place: Tensor

    def labels(self) -> list[tuple[str, str, str]]:
        """The likeliest object, background and style of each picture."""
        best = [scores.argmax(1).tolist() for scores in self[:3]]
        return [
            tuple(names[i] for names, i in zip(HEADS.values(), row, strict=True)) for row in zip(*best, strict=True)
        ]


class Classifier(nn.Module):
    """A small convolutional network for pictures of `world.SIDE` pixels."""

    def __init__(self, width: int = 24):
        super().__init__()

        def stage(n_in: int, n_out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, n_out), nn.SiLU()
            )

        self.fine = nn.Sequential(stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width))
        self.coarse = nn.Sequential(
            stage(4 * width, 6 * width), nn.Conv2d(6 * width, 6 * width, 3, padding=1), nn.SiLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(12 * width, len(classes)) for name, classes in HEADS.items()})
        self.heat = nn.Conv2d(4 * width, 1, 5, padding=2)

    def forward(self, pictures: Tensor) -> Seen:
        """Judge pictures [n, 3, h, w] in 0 … 1."""
        fine = self.fine(pictures * 2 - 1)
        features = self._pooled(fine)
        return Seen(**{name: head(features) for name, head in self.heads.items()}, place=centre(self.heat(fine)))

    def features(self, pictures: Tensor) -> Tensor:
        """What the judgement of pictures [n, 3, h, w] in 0 … 1 rests on, [n, c]."""
        return self._pooled(self.fine(pictures * 2 - 1))

    def _pooled(self, fine: Tensor) -> Tensor:
        coarse = self.coarse(fine)
        return torch.cat([coarse.mean((2, 3)), coarse.amax((2, 3))], 1)


def centre(heat: Tensor) -> Tensor:
    """x, y of the centre of mass of softmax(heat), as fractions of the sides; [n, 1, h, w] -> [n, 2]."""
    n, _, h, w = heat.shape
    mass = heat.flatten(1).float().softmax(1).view(n, h, w)
    x = (torch.arange(w, device=heat.device) + 0.5) / w
    y = (torch.arange(h, device=heat.device) + 0.5) / h
    return torch.stack([mass.sum(1) @ x, mass.sum(2) @ y], 1)


def save(classifier: Classifier, file: Path, metadata: dict[str, str]) -> None:
    """Write the weights in float16."""
    save_file(
        {name: t.detach().cpu().half().contiguous() for name, t in classifier.state_dict().items()}, file, metadata
    )


def load(file: Path = WEIGHTS) -> Classifier:
    """The trained classifier, in float32."""
    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return classifier.eval().requires_grad_(False)
