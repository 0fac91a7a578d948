"""A graph of core nodes gives the same to the bit without the pack, and with it after it has tuned that checkpoint."""

import pytest
from checkpoint import write_checkpoint
from live_server import Server
from prompts import node
from safetensors.torch import load

CHECKPOINT = {
    "ckpt": node("CheckpointLoaderSimple", ckpt_name="sd15.ckpt"),
    "dog": node("CLIPTextEncode", text="a dog", clip=["ckpt", 1]),
    "empty": node("CLIPTextEncode", text="", clip=["ckpt", 1]),
}
SAMPLER = {"seed": 5, "steps": 2, "cfg": 5.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0}
CORE = {
    **CHECKPOINT,
    "latent": node("EmptyLatentImage", width=64, height=64, batch_size=2),
    "sample": node(
        "KSampler", model=["ckpt", 0], positive=["dog", 0], negative=["empty", 0], latent_image=["latent", 0], **SAMPLER
    ),
    "decode": node("VAEDecode", samples=["sample", 0], vae=["ckpt", 2]),
    "pictures": node("SaveImage", images=["decode", 0], filename_prefix="core"),
    "latents": node("SaveLatent", samples=["sample", 0], filename_prefix="core"),
}
OURS = {
    **CHECKPOINT,
    "frames": node("EmptyImage", width=64, height=64, batch_size=2, color=0x336699),
    "clip": node("VAEEncode", pixels=["frames", 0], vae=["ckpt", 2]),
    "inflate": node("TAVInflateUNet", model=["ckpt", 0], group_norm="video"),
    "tune": node(
        "TAVOneShotTune",
        model=["inflate", 0],
        latents=["clip", 0],
        caption=["dog", 0],
        steps=1,
        learning_rate=1e-3,
        seed=1,
        precision="fp32",
        weight_decay=0.01,
        max_grad_norm=1.0,
    ),
    "invert": node("TAVDDIMInvert", model=["tune", 0], latents=["clip", 0], prompt=["empty", 0], steps=1),
    "edit": node("VAEDecode", samples=["invert", 0], vae=["ckpt", 2]),
    "show": node("PreviewImage", images=["edit", 0]),
}


def run(server, prompt):
    history = server.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]["messages"]
    return history["outputs"]


@pytest.fixture
def base(tmp_path):
    checkpoints = tmp_path / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_checkpoint(checkpoints / "sd15.ckpt")
    return tmp_path


def result(server):
    """The files of the pictures and of the latents; both runs write the same metadata into them."""
    outputs = run(server, CORE)
    return [server.download(file) for file in (*outputs["pictures"]["images"], *outputs["latents"]["latents"])]


def test_core_nodes_give_the_same_with_and_without_the_pack(base):
    with Server(base, "--whitelist-custom-nodes", "no_pack_at_all") as server:
        assert not [name for name in server.get("/object_info") if name.startswith("TAV")]
        expected = result(server)
    with Server(base) as server:
        run(server, OURS)
        assert result(server) == expected
    latents = load(expected[-1])["latent_tensor"]
    assert len(expected) == 3 and latents.isfinite().all() and latents.std() > 0.1
