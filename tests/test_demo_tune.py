"""The demo's model is like any other: every option of One-Shot Tune, files, and published models, by the nodes."""

import shutil

import pytest
import torch
from equal import same_weights
from tune_a_video.nodes import (
    ApplyWeights,
    DDIMInvert,
    DemoClip,
    ExportPublished,
    InflateUNet,
    LoadDemoModel,
    LoadPublished,
    LoadWeights,
    OneShotTune,
    SampleVideo,
    SaveWeights,
)

DEFAULTS = {
    "steps": 3,
    "learning_rate": 5e-4,
    "seed": 7,
    "precision": "fp32",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}
EQUAL = [  # to the defaults, to the bit
    {},
    {"memory": "low"},
    {"memory": "fast"},
    {"reuse": "restart"},
    {"save_every": 1},
    {"precision": "auto"},  # fp32 on a CPU
]
OTHER = [
    {"seed": 8},
    {"learning_rate": 1e-4},
    {"weight_decay": 0.5},
    {"max_grad_norm": 1e-3},
    {"precision": "bf16"},
    {"group_norm": "per_frame"},
]


@pytest.fixture(scope="module")
def demo():
    """MODEL, CLIP, LATENT of four frames, and CONDITIONING by text."""
    with torch.inference_mode():
        model, clip, vae = LoadDemoModel.execute().args
        frames, _fps, caption = DemoClip.execute("arc", "red car", "beach", 4, 64, 0).args
        latents = {"samples": vae.encode(frames)}

        def encode(text):
            return [[clip.encode_from_tokens(clip.tokenize(text)), {}]]

        yield model, latents, caption, encode


@pytest.fixture
def tune(demo, user_folder):
    model, latents, caption, encode = demo

    def run(group_norm="video", **options):
        shutil.rmtree(user_folder / "runs", ignore_errors=True)  # each trains; none is reused
        with torch.inference_mode():
            inflated = InflateUNet.execute(model, group_norm).args[0]
            return OneShotTune.execute(inflated, latents, encode(caption), **{**DEFAULTS, **options}).args

    return run


@pytest.fixture
def edit(demo):
    """Sample an edit with a tuned model; LATENT samples."""
    _, latents, _, encode = demo

    def run(tuned):
        with torch.inference_mode():
            inverted = DDIMInvert.execute(tuned, latents, encode(""), 4).args[0]
            return SampleVideo.execute(tuned, inverted, encode("a dog on the beach"), encode(""), 4, 3.0).args[0][
                "samples"
            ]

    return run


def test_options_that_change_how_and_not_what(tune):
    reference = tune()[1]
    for options in EQUAL:
        assert same_weights(tune(**options)[1], reference), options


def test_options_that_change_the_result(tune):
    reference = tune()[1]
    for options in OTHER:
        weights = tune(**options)[1]
        assert not same_weights(weights, reference), options
        assert all(tensor.isfinite().all() for tensor in [*weights.queries.values(), *weights.temporal.values()])


def test_previews_are_shown_and_change_nothing(tune, demo):
    encode = demo[3]
    previewed = tune(
        validation_prompt=encode("a dog on the beach"), validation_negative=encode(""), validation_every=2
    )[1]
    assert same_weights(tune()[1], previewed)


def test_a_file_and_a_published_model_give_the_same_edit(tune, edit, demo, folder):
    model = demo[0]
    tuned, weights, *_ = tune()
    expected = edit(tuned)
    name = SaveWeights.execute(weights, "demo", "fp32").args[0]
    published = ExportPublished.execute(model, weights, "published").args[0]
    for loaded in (LoadWeights.execute(name).args[0], LoadPublished.execute(model, published).args[0]):
        applied = ApplyWeights.execute(model, loaded, 1.0, 1.0).args[0]
        assert torch.equal(edit(applied), expected)
