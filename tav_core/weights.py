"""What one-shot tuning yields: a value that can be applied to a model, kept and compared."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class TunedWeights:
    """Float32 tensors on the CPU, by the host's names of the UNet's modules.

    Attributes:
        queries: change of `attn1.to_q` and `attn2.to_q`, to be added to the base model's weights.
        temporal: the temporal layers, as they are (`TemporalLayers.named`).
        frames: length of the clip.
        group_norm: the group norm mode that it was tuned with.
        losses: one a step.
    """

    queries: dict[str, Tensor]
    temporal: dict[str, Tensor]
    frames: int
    group_norm: str
    losses: list[float] = field(default_factory=list)
