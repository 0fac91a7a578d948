"""Previews of an edit while tuning."""

from itertools import count
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from equal import same_weights
from tune_a_video.nodes import OneShotTune, tune_view
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.pictures.plot import EDIT, HEIGHT, WIDTH
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.one_shot import VALIDATION_CFG, VALIDATION_STEPS, Saving, Validation, one_shot_tune


@pytest.fixture
def tune(inflated, clip, prompts):
    def run(validation=None, steps=4, model=inflated, **kwargs):
        with torch.inference_mode():
            return one_shot_tune(
                model,
                clip,
                prompts[1],
                Recipe(steps, learning_rate=1e-3),
                "fp32",
                "all",
                lambda _step: None,
                validation=validation,
                **kwargs,
            )

    return run


@pytest.fixture
def shown():
    return []


@pytest.fixture
def validation(prompts, shown):
    def make(every=2, negative=None):
        return Validation(prompts[0], negative, every, lambda step, frames: shown.append((step, frames)))

    return make


def test_previews_change_nothing(tune, validation, shown, inflated, unchanged):
    state = torch.get_rng_state()
    with unchanged(inflated):
        plain, seen = tune(), tune(validation())
    assert torch.equal(torch.get_rng_state(), state)
    assert plain.losses == seen.losses
    assert same_weights(plain, seen)
    assert [step for step, _frames in shown] == [2, 4]
    assert all(len(frames) == 5 and frames[0].size == (8, 8) for _step, frames in shown)


def test_a_preview_is_what_the_nodes_make_of_the_same_weights(tune, validation, shown, inflated, clip, prompts):
    weights = tune(validation(every=4, negative=prompts[1]))
    with torch.inference_mode():
        tuned = apply_weights(inflated, weights)
        latents, *_ = editing.invert(tuned, clip, prompts[1], VALIDATION_STEPS)
        video = editing.sample_video(tuned, latents, prompts[0], prompts[1], VALIDATION_STEPS, VALIDATION_CFG)
        expected = host.pictures_of(inflated, video["samples"])
    ((step, frames),) = shown
    assert step == 4
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in expected]


def test_without_a_prompt_nothing_is_sampled(tune, monkeypatch):
    def work(*_args, **_kwargs):
        raise AssertionError("sampled")

    monkeypatch.setattr(host, "run_sampler", work)
    tune()


def test_out_of_memory_in_a_preview_does_not_stop_the_tune(tune, validation, shown, monkeypatch):
    calls, told = [], []

    def scarce(*_args, **_kwargs):
        calls.append(1)
        raise torch.cuda.OutOfMemoryError("injected")

    plain = tune()
    monkeypatch.setattr(host, "run_sampler", scarce)
    weights = tune(validation(), tell=told.append)
    assert weights.losses == plain.losses and len(calls) == 1 and not shown
    assert told == ["no preview at step 2: out of memory; tuning goes on without previews"]


def test_any_error_in_a_preview_does_not_stop_the_tune(tune, validation, shown, inflated, caplog):
    """Another pack's, for one; it would come back at every resume."""

    def broken(_apply_model, _args):
        raise RuntimeError("the sizes do not match")

    spoilt, told = inflated.clone(), []
    spoilt.set_model_unet_function_wrapper(broken)
    weights = tune(validation(), model=spoilt, tell=told.append)
    assert weights.losses == tune().losses and not shown
    problem = "no preview at step 2: RuntimeError: the sizes do not match; tuning goes on without previews"
    assert [line for line in told if "preview" in line] == [problem]
    assert "Traceback" in caplog.text


def test_cancel_in_a_preview_saves_and_resumes(tune, validation, tmp_path, monkeypatch):
    plain, saving, told = tune(), Saving(tmp_path), []

    def cancelled(*_args, **_kwargs):
        raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(host, "run_sampler", cancelled)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tune(validation(), saving=saving)
    assert tune(validation(), saving=saving, tell=told.append).losses == plain.losses
    assert told == ["resumed after step 2"]


def test_a_prompt_of_another_model_is_refused_before_step_1(tune, shown):
    wide = Validation([[torch.zeros(1, 7, 32), {}]], None, 2, lambda *_args: None)
    with pytest.raises(ValueError, match="validation_prompt is 32 wide"):
        tune(wide)


def test_the_node_plays_the_preview_beside_the_curve(inflated, clip, prompts, monkeypatch):
    pictures = []
    monkeypatch.setattr(tune_view, "time", SimpleNamespace(monotonic=lambda: 1.0))  # the second step comes at once
    monkeypatch.setattr(host, "progress", lambda _steps: lambda _done, picture=None: pictures.append(picture))
    values = {"steps": 3, "learning_rate": 1e-4, "seed": 0, "precision": "fp32"}
    values |= {"weight_decay": 0.01, "max_grad_norm": 1.0, "validation_prompt": prompts[0], "validation_every": 2}
    with torch.inference_mode():
        OneShotTune.execute(inflated, clip, prompts[1], **values)
    pictures = [picture for picture in pictures if picture is not None]
    assert [picture.size for picture in pictures] == [(512, 320)] * 3
    square = (WIDTH - EDIT, (HEIGHT - EDIT) // 2, WIDTH, (HEIGHT + EDIT) // 2)
    colours = [len(picture.crop(square).getcolors(EDIT**2)) for picture in pictures]
    assert colours[0] < 500 < min(colours[1:]), "the curve alone, then with a frame of the edit"


def test_the_node_shows_every_frame_of_a_preview_in_turn(inflated, clip, prompts, monkeypatch):
    """However long a step takes."""
    shown = []
    seconds = count(step=3.0)
    monkeypatch.setattr(tune_view, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(tune_view, "curve_with_edit", lambda _losses, _steps, frame, _label: shown.append(frame))
    values = {"steps": 12, "learning_rate": 1e-4, "seed": 0, "precision": "fp32"}
    values |= {"weight_decay": 0.01, "max_grad_norm": 1.0, "validation_prompt": prompts[0], "validation_every": 6}
    with torch.inference_mode():
        OneShotTune.execute(inflated, clip, prompts[1], **values)
    first, *_ = frames = shown[:5]  # from step 6 on
    assert len({id(frame) for frame in frames}) == 5
    assert shown[5] is first
