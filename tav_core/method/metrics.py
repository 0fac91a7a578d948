"""What can be measured on a clip and its edit. Every figure is one a frame, or one a pair of neighbouring frames.

Pictures are IMAGE, [f, h, w, 3] in 0 … 1, float32; a flow is [f, h, w, 2] in pixels, x first: where a pixel of one
frame is found in another, as seen from the pixel. Figures of published tables hold for their model and size only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MOVES = 0.5  # pixels from which on a pixel of the source counts as moving
SEEN_AGAIN = 5.0  # of 255: difference in grey up to which the source's own flow finds a pixel of it again
LEAST_SEEN = 0.7  # share of such pixels below which a pair of frames says nothing
WINDOW, SIGMA = 11, 1.5  # of structural similarity


# --- pictures ---------------------------------------------------------------------------------------------------


def luma(pictures: Tensor) -> Tensor:
    """Brightness by ITU-R BT.601, [f, h, w] in 0 … 1."""
    return pictures @ pictures.new_tensor([0.299, 0.587, 0.114])


def flicker(pictures: Tensor) -> Tensor:
    """Mean change of a pixel from frame to frame, in 0 … 255, [f - 1].

    VBench's temporal flickering (arXiv 2311.17982) is one minus this, divided by 255. Motion is a change as well, so it
    says something beside the source's only.
    """
    return 255 * pictures.diff(dim=0).abs().flatten(1).mean(1)


def sharpness(pictures: Tensor) -> Tensor:
    """Variance of the Laplacian of the brightness in 0 … 255, not rounded, [f] (Pech-Pacheco et al., ICPR 2000)."""
    padded = F.pad(255 * luma(pictures)[:, None], (1, 1, 1, 1), mode="reflect")
    kernel = padded.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(padded, kernel[None, None]).flatten(1).var(1, correction=0)


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, [n], of each picture, [n, …] in 0 … 1; infinite where they are equal.

    Args:
        where: bool [n, h, w], the pixels that count; NaN for a picture of which none does. PIE-Bench (arXiv 2310.01506)
            counts the others as equal, so its background's is 10 log10(all / counted) dB higher.
    """
    error = (a - b).square()
    if where is None:
        return -10 * error.flatten(1).mean(1).log10()
    counts = where[..., None].expand_as(error)
    return -10 * ((error * counts).flatten(1).sum(1) / counts.flatten(1).sum(1)).log10()


def ssim(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Structural similarity, [f], of 11 x 11 Gaussian windows of sigma 1.5 (Wang et al., IEEE TIP 2004), mean of RGB.

    Args:
        where: bool [f, h, w]; only windows of which all pixels count are taken. NaN for a picture without any.
    """
    line = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2)).to(a)
    line /= line.sum()

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line[None, None, :, None]), line[None, None, None])

    x, y = (rearrange(pictures, "f h w c -> (f c) 1 h w") for pictures in (a, b))
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    alike = alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    alike = rearrange(alike, "(f c) 1 h w -> f c h w", f=len(a)).mean(1)
    whole = torch.ones_like(alike) if where is None else -F.max_pool2d(-where.to(a)[:, None], WINDOW, 1)[:, 0]
    return (alike * whole).flatten(1).sum(1) / whole.flatten(1).sum(1)


def change_correlation(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of where and when two clips of one size change from frame to frame, at an eighth the size."""
    changes = [pictures.float().mean(-1)[:, None].diff(dim=0).abs() for pictures in (a, b)]
    coarse = torch.stack([F.avg_pool2d(change, 8).flatten() for change in changes])
    return float(torch.corrcoef(coarse)[0, 1])


# --- motion -----------------------------------------------------------------------------------------------------


def flow_length(flow: Tensor) -> Tensor:
    """Mean length of the flow in pixels, [f]: also the end-point error of an edit that stands still."""
    return flow.norm(dim=-1).flatten(1).mean(1)


def end_point_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean distance in pixels of where two flows lead, [f].

    V2VBench's motion alignment (github.com/wenhao728/awesome-diffusion-v2v) is minus this, by GMFlow at 512 x 512.
    """
    return (a - b).norm(dim=-1).flatten(1).mean(1)


def flow_cosine(source: Tensor, edit: Tensor) -> Tensor:
    """Mean cosine of two flows where the source's moves, [f]; NaN where it does nowhere.

    EditBoard's FF-beta (arXiv 2409.09668) is one minus this over all pixels, by Farneback's flow. Where nothing moves,
    the direction of a flow is its noise's, so those pixels are left out here.
    """
    moves = source.norm(dim=-1) >= MOVES
    cosine = F.cosine_similarity(source, edit, dim=-1)
    return (cosine * moves).flatten(1).sum(1) / moves.flatten(1).sum(1)


def warp_difference(before: Tensor, after: Tensor, flow: Tensor) -> Tensor:
    """Difference of each channel, in 0 … 255, between a frame and what the one before it says of it, [f, h, w, 3].

    Args:
        before, after: pictures, [f, h, w, 3].
        flow: where each pixel of `after` is in `before`.
    Returns:
        NaN where that is outside of the picture.
    """
    height, width = flow.shape[1:3]
    y, x = torch.meshgrid(torch.arange(height).to(flow), torch.arange(width).to(flow), indexing="ij")
    at = flow + torch.stack([x, y], -1)
    at = 2 * at / at.new_tensor([width - 1, height - 1]) - 1
    warped = F.grid_sample(before.movedim(-1, 1), at, padding_mode="border", align_corners=True).movedim(1, -1)
    outside = (at.abs() > 1).any(-1, keepdim=True)
    return 255 * (warped - after).abs().masked_fill(outside, torch.nan)


def warp_error(source: Tensor, edit: Tensor) -> tuple[Tensor, Tensor]:
    """Of the edit and the source, the mean largest `warp_difference` of a channel where the source's flow holds: [f].

    EditBoard's FF-alpha (arXiv 2409.09668), of the pixels that the source's own flow finds again, within 5 of 255 in
    grey. NaN for a pair of frames in which these are fewer than 70 %; there the whole clip is then 0. Its flow is
    Farneback's at 512 x 512, from a frame to the next, with its sign turned; ours leads back from the next frame.
    """
    seen = luma(source).round() <= SEEN_AGAIN  # false for NaN
    share = seen.flatten(1).float().mean(1)
    largest = (x.amax(-1).nan_to_num() * seen for x in (edit, source))
    means = (x.flatten(1).sum(1) / seen.flatten(1).sum(1) for x in largest)
    edit_mean, source_mean = (mean.masked_fill(share < LEAST_SEEN, torch.nan) for mean in means)
    return edit_mean, source_mean


# --- features of frames and texts -----------------------------------------------------------------------------------


def cosine_to_previous(features: Tensor) -> Tensor:
    """Cosine of each frame's features to the one's before, [f, d] to [f - 1].

    V2VBench's consistency (github.com/wenhao728/awesome-diffusion-v2v) is its mean, of CLIP's features before the
    projection, nothing below 0.
    """
    return F.cosine_similarity(features[1:], features[:-1], dim=-1)


def consistency(features: Tensor) -> Tensor:
    """Mean of the cosines, nothing below 0, to the frame before and to the first one, [f, d] to [f - 1].

    VBench's subject and background consistency (arXiv 2311.17982); the first frame shows a slow drift as well.
    """
    to_first = F.cosine_similarity(features[1:], features[:1], dim=-1)
    return (cosine_to_previous(features).clamp(min=0) + to_first.clamp(min=0)) / 2


def text_alignment(features: Tensor, text: Tensor) -> Tensor:
    """A hundred times the cosine of each frame's features, [f, d], to a text's, [d]: [f] (CLIPScore's, 2104.08718)."""
    return 100 * F.cosine_similarity(features, text[None], dim=-1)
