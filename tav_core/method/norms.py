"""Norms on a GPU without copies: over all frames of a video as they lie in the batch, and in their input's dtype."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def knows_videos(norm: Any, x: Tensor, frames: int) -> bool:
    """Whether `video_group_norm` can take the place of a module's own forward: on CUDA, with weights as they are.

    Not where the host casts or patches them as it calls the module, nor for a gradient of weights or of many videos.
    """
    weight = norm.weight
    if not x.is_cuda or weight is None or getattr(norm, "weight_function", None):
        return False
    as_they_are = weight.device == x.device and weight.dtype in (x.dtype, torch.float32)
    return as_they_are and not (torch.is_grad_enabled() and (weight.requires_grad or len(x) > frames))


def video_group_norm(x: Tensor, frames: int, norm: Any) -> Tensor:
    """Group norm whose statistics are of a whole video's frames: `(b f) c h w` to the same.

    As on `b c (f h) w`, without the copies that rearranging makes: statistics of each channel, those of groups from
    them, and the affine map of each channel, by the kernels of torch's synchronised batch norm, in float32 inside.

    Args:
        norm: an `nn.GroupNorm` with weights in the dtype of `x`, or in float32, which are not trained.
    """
    return _VideoNorm.apply(x, frames, norm.num_groups, norm.weight, norm.bias, norm.eps)


class _VideoNorm(torch.autograd.Function):
    """Of videos one after the other; a gradient is of a single one, as in tuning."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frames: int, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        for video, result in zip(x.split(frames), out.split(frames), strict=True):
            mean, scale = (t.view(groups, -1) for t in torch.batch_norm_stats(video, eps))
            variance = scale**-2 - eps
            middle = mean.mean(1, keepdim=True)
            spread = (variance + (mean - middle) ** 2).mean(1, keepdim=True)
            mean, scale = (t.expand_as(mean).flatten() for t in (middle, (spread + eps).rsqrt()))
            torch.batch_norm_elemt(video, weight, bias, mean, scale, eps, out=result)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (x, weight, mean, scale) = gradients, ctx.saved_tensors
        total, times, _weight, _bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, scale, weight, True, False, False
        )
        # Of a group: what its channels' gradients, and these times what they were normalised to, come to on average.
        count = x.numel() // ctx.groups
        each = (t.view(ctx.groups, -1).sum(1, keepdim=True) / count for t in (weight * total, weight * times * scale))
        shift, slope = (t.expand(-1, len(mean) // ctx.groups).flatten() for t in each)
        slope = -(scale**2) * slope
        ones = torch.ones_like(slope)
        rest = torch.batch_norm_elemt(x, slope, -scale * shift, mean, ones, 0.0)
        return torch.addcmul(rest, gradient, (scale * weight).to(x)[:, None, None]), None, None, None, None, None


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """A layer norm in the dtype of its input, whatever its weights' is; see `as_it_is`."""
    with as_it_is(x):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x), norm.bias.to(x), norm.eps)


def as_it_is(x: Tensor) -> Any:
    """Keeps a GPU's autocast from norms: it would have them take float32 and hand on as much.

    That costs a fifth of a step's memory, and adds no digits where the next layer takes bfloat16 again; inside, a norm
    of bfloat16 computes in float32.
    """
    return torch.autocast(x.device.type, enabled=False) if x.is_cuda else nullcontext()


class MixedLayerNorm(nn.LayerNorm):
    """`layer_norm` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self)


class MixedGroupNorm(nn.GroupNorm):
    """The same for a group norm."""

    def forward(self, input: Tensor) -> Tensor:
        with as_it_is(input):
            return F.group_norm(input, self.num_groups, self.weight.to(input), self.bias.to(input), self.eps)
