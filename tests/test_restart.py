"""A tune outlives the server: killed in the middle, started again, and run once more with ComfyUI's cache off."""

import re

import pytest
from aiohttp import ClientError
from equal import same_tensors
from live_server import Server
from prompts import node
from safetensors.torch import load_file

STEPS = 8


def graph(steps=STEPS):
    """The demo's clip, tuned and saved."""
    return {
        "model": node("TAVLoadDemoModel"),
        "clip": node("TAVDemoClip", motion="arc", object="red car", background="beach", frames=4, size=64, seed=0),
        "latents": node("VAEEncode", pixels=["clip", 0], vae=["model", 2]),
        "caption": node("CLIPTextEncode", text=["clip", 2], clip=["model", 1]),
        "inflate": node("TAVInflateUNet", model=["model", 0], group_norm="video"),
        "tune": node(
            "TAVOneShotTune",
            model=["inflate", 0],
            latents=["latents", 0],
            caption=["caption", 0],
            steps=steps,
            learning_rate=1e-4,
            seed=1,
            precision="fp32",
            weight_decay=0.01,
            max_grad_norm=1.0,
            save_every=2,
        ),
        "save": node("TAVSaveWeights", weights=["tune", 1], filename_prefix="w", precision="fp32"),
    }


def says(history):
    """What One-Shot Tune shows when it is done."""
    assert history["status"]["status_str"] == "success", history["status"]["messages"]
    return history["outputs"]["tune"]["text"][0]


def test_a_tune_goes_on_after_the_server_was_killed_and_is_reused_with_the_cache_off(tmp_path):
    base = tmp_path / "killed"

    def kill_at_step_3(kind, data):
        if kind == "progress" and data["max"] == STEPS and data["value"] == 3:
            server.process.kill()  # it may have come a little further by then

    with Server(base) as server, pytest.raises((OSError, ClientError, KeyError)):
        server.run(graph(), kill_at_step_3)
    assert not list((base / "models").glob("tune_a_video/*"))

    with Server(base, "--cache-none") as server:
        assert re.fullmatch("resumed after step [246]", says(server.run(graph())))
        assert says(server.run(graph())) == f"reused: all {STEPS} steps were saved"
        assert says(server.run(graph(STEPS + 1))) == f"resumed after step {STEPS}"

    with Server(tmp_path / "undisturbed") as server:
        assert says(server.run(graph())) == f"trained {STEPS} steps"
    expected = load_file(tmp_path / "undisturbed" / "models" / "tune_a_video" / "w_00001.safetensors")
    for number in (1, 2):
        got = load_file(base / "models" / "tune_a_video" / f"w_0000{number}.safetensors")
        assert same_tensors(got, expected)
