"""The demo's measures on clips whose figures are known."""

import numpy as np
import pytest
import torch
from tune_a_video.lab import measure
from tune_a_video.tav_core.method import metrics

PATH = np.array([[20.0, 60.0], [40.0, 64.0], [60.0, 70.0], [90.0, 70.0]])


def clip(looks=(200, 200, 200, 200), places=PATH):
    """A square of one grey a frame, on black."""
    pictures = torch.zeros(4, 128, 128, 3)
    for picture, grey, (x, y) in zip(pictures, looks, places, strict=True):
        picture[int(y) - 8 : int(y) + 8, int(x) - 8 : int(x) + 8] = grey / 255
    return pictures


def test_flicker_is_change_of_look_and_not_motion():
    assert measure.flicker(clip(), PATH) == 0
    # A quarter of the square of 32 pixels changes by 30.
    assert measure.flicker(clip((200, 230, 200, 230)), PATH, half=16) == pytest.approx(30 / 4)
    assert measure.flicker(clip(places=PATH[::-1]), PATH) > 1


def test_motion_and_place():
    assert measure.motion_correlation(PATH, PATH) == pytest.approx(1)
    assert measure.motion_correlation(PATH[::-1], PATH) == pytest.approx(-1, abs=0.1)
    assert np.isnan(measure.motion_correlation(PATH, np.ones_like(PATH)))
    assert measure.position_error(PATH + np.array([3, 4]), PATH) == pytest.approx(5)
    assert metrics.change_correlation(clip(), clip((100, 100, 100, 100))) == pytest.approx(1)
    assert metrics.psnr(clip(), clip() + 0.1).tolist() == pytest.approx([20] * len(clip()))
