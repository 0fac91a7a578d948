"""The inflated UNet inside the host: what it computes, and that nothing else in the graph notices."""

import copy
from contextlib import contextmanager

import comfy.model_management
import pytest
import torch
from einops import rearrange
from host_node import outputs_of
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import inflation
from tune_a_video.tav_core.method.inflation import TemporalLayers
from tune_a_video.tav_core.method.windows import WHOLE, Windows
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.network import TrainingUNet


def sample(core, model, prompts, latent, cfg=3.0, seed=7):
    """What a core KSampler makes of it."""
    with torch.inference_mode():
        (out,) = core["KSampler"]().sample(
            model, seed, 3, cfg, "euler", "normal", prompts[1], prompts[0], latent, denoise=1.0
        )
    return out["samples"]


def with_random_temporal_layers(model, group_norm="video", seed=3):
    temporal = TemporalLayers(host.parts_of(host.unet_of(model)))
    generator = torch.Generator().manual_seed(seed)
    temporal.assign({name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in temporal.named().items()})
    return host.with_inflation(model, host.Inflation(temporal, group_norm))


def test_other_branches_are_bit_identical_with_the_pack_in_use(core, model, prompts, clip, unchanged):
    before = sample(core, model, prompts, clip)
    with unchanged(model):
        video_model = with_random_temporal_layers(host.inflate(model, "video"))
        video = sample(core, video_model, prompts, clip)
        assert torch.equal(sample(core, model, prompts, clip), before)
        assert torch.equal(sample(core, video_model, prompts, clip), video)
    assert not torch.allclose(video, before, rtol=0.1)


def test_untuned_single_frame_is_the_image_model(core, model, prompts, clip):
    image = {"samples": clip["samples"][:1]}
    for mode in ("video", "per_frame"):
        assert torch.equal(sample(core, host.inflate(model, mode), prompts, image), sample(core, model, prompts, image))


def test_two_inflated_models_with_other_settings_in_one_graph(core, model, prompts, clip):
    a, b = (with_random_temporal_layers(model, mode, seed) for mode, seed in (("video", 1), ("per_frame", 2)))
    alone = [sample(core, m, prompts, clip) for m in (a, b)]
    assert not torch.allclose(*alone)
    again = [sample(core, m, prompts, clip) for m in (b, a, b, a)]
    assert all(torch.equal(x, alone[i]) for x, i in zip(again, (1, 0, 1, 0), strict=True))


def test_frames_see_each_other_only_through_the_video(core, model, prompts, clip):
    """Changing a later frame changes an earlier one through temporal attention and the video's group norm."""
    changed = copy.deepcopy(clip)
    changed["samples"][4] += 3

    # denoise below 1 keeps the latents' content in the noise's company
    def first_frame(m, latent):
        with torch.inference_mode():
            args = (m, 0, 2, 1.0, "euler", "normal", prompts[1], prompts[0], latent)
            return core["KSampler"]().sample(*args, denoise=0.5)[0]["samples"][0]

    untuned = host.inflate(model, "per_frame")
    assert torch.equal(first_frame(untuned, clip), first_frame(untuned, changed))
    for other in (host.inflate(model, "video"), with_random_temporal_layers(model, "per_frame")):
        assert not torch.equal(first_frame(other, clip), first_frame(other, changed))


@pytest.mark.parametrize("mode", ["video", "per_frame"])
def test_prompts_computed_together_or_apart_give_the_same(core, model, prompts, clip, monkeypatch, mode):
    """Short of memory, the host computes the two prompts of a guided step one after the other."""
    video_model = with_random_temporal_layers(model, mode)
    together = sample(core, video_model, prompts, clip)
    monkeypatch.setattr(model.model, "memory_required", lambda *_args, **_kwargs: 1 << 60)
    calls = []
    unet = host.unet_of(model)
    hook = unet.input_blocks[0][0].register_forward_hook(lambda _m, args, _o: calls.append(args[0].shape[0]))
    apart = sample(core, video_model, prompts, clip)
    hook.remove()
    assert set(calls) == {5}, "the host did not split the batch"
    assert (apart - together).norm() / together.norm() < 1e-4


def test_regional_and_per_frame_prompts(core, model, prompts, clip):
    """An area, a mask and a batch of prompts each reach the video model as the host means them."""
    video_model = with_random_temporal_layers(model)
    plain = sample(core, video_model, prompts, clip)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    whole, empty = prompts[1], prompts[0]
    for options in ({"area": (4, 8, 0, 0), "strength": 1.0}, {"mask": mask, "mask_strength": 1.0}):
        regional = [*whole, [empty[0][0] * 2, options]]
        out = sample(core, video_model, (empty, regional), clip)
        assert torch.isfinite(out).all() and not torch.allclose(out, plain)
    repeated = [[whole[0][0].repeat(5, 1, 1), {}]]
    torch.testing.assert_close(sample(core, video_model, (empty, repeated), clip), plain, rtol=1e-4, atol=1e-4)


def test_a_feed_forward_takes_a_part_of_the_frames_at_a_time(core, model, prompts, clip, monkeypatch, unchanged):
    """And computes what it computes with all of them; a `forward` that somebody else has put there is called."""
    video_model = with_random_temporal_layers(model)
    block = next(iter(host.parts_of(host.unet_of(model)).blocks.values()))
    frames = []
    monkeypatch.setattr(inflation, "LEAST_TOKENS", 1)
    forward = block.ff.forward
    block.ff.forward = lambda x: frames.append(x.shape[0]) or forward(x)
    theirs = block.ff.forward
    in_parts = sample(core, video_model, prompts, clip)
    assert block.ff.forward is theirs and 0 < max(frames) <= 3 and sum(frames) == 3 * 10  # two prompts of five frames
    del block.ff.forward
    with unchanged(model):
        sample(core, video_model, prompts, clip)
    monkeypatch.setattr(inflation, "PARTS", 1)
    whole = sample(core, video_model, prompts, clip)
    assert (in_parts - whole).norm() / whole.norm() < 1e-5


def test_nothing_stays_attached_after_an_error(core, model, prompts, clip, unchanged):
    video_model = with_random_temporal_layers(model)

    class Stop(Exception):
        pass

    def stop(*_args):
        raise Stop

    with unchanged(model):
        broken = video_model.clone()
        broken.set_model_attn2_patch(stop)
        with pytest.raises(Stop):
            sample(core, broken, prompts, clip)
    assert torch.isfinite(sample(core, video_model, prompts, clip)).all()


def attended(attn1, x, frames, seen):
    """A reader's self-attention, `(b f) n c`, in float64: frame i attends to those of `seen(i)`, in equal measure."""
    weights = [layer.weight.double() for layer in (attn1.to_q, attn1.to_k, attn1.to_v)]
    q, k, v = (rearrange(x.double() @ w.T, "(b f) n (h d) -> b f h n d", f=frames, h=attn1.heads) for w in weights)
    out = []
    for i in range(frames):
        keys, values = (torch.cat([t[:, j] for j in seen(i)], dim=2) for t in (k, v))
        scores = q[:, i] @ keys.mT / q.shape[-1] ** 0.5
        out.append(rearrange(scores.softmax(-1) @ values, "b h n d -> b n (h d)"))
    project = attn1.to_out[0]
    return torch.stack(out, 1).flatten(0, 1) @ project.weight.double().T + project.bias.double()


@contextmanager
def noted(unet):
    """Every self-attention of a UNet inside this block: the module, what it was given and what it gave."""
    calls, handles = [], []
    for block in host.parts_of(unet).blocks.values():
        note = lambda attn1, args, out: calls.append((attn1, args[0].detach(), out.detach()))  # noqa: E731
        handles.append(block.attn1.register_forward_hook(note))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


SEEN = {"first_previous": lambda i: {0, max(i - 1, 0)}, "first_own_previous": lambda i: {0, i, max(i - 1, 0)}}


@pytest.mark.parametrize("attends", SEEN)
def test_a_frame_that_is_named_twice_counts_once(model, prompts, clip, attends):
    """Frame 0 is both the first and the previous of frame 1: in training as in sampling, whole and in windows."""

    def check(calls, frames):
        assert len(calls) >= 4
        for attn1, given, out in calls:
            expected = attended(attn1, given, frames, SEEN[attends])
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)

    for windows in (WHOLE, Windows(4, 1)):
        video = host.inflate(model, "video", windows, attends)
        with torch.inference_mode(), noted(model.model.diffusion_model) as calls:
            inverted, _noise, _sigmas = editing.invert(video, clip, prompts[0], 1)
            editing.sample_video(video, inverted, prompts[1], prompts[0], 1, 3.0)
            check(calls, windows.at_once(len(clip["samples"])))
    network = TrainingUNet(host.video_of(video), 5, "fp32", "nothing", prompts[1][0][0].clone())
    with noted(network.unet) as calls:
        network(clip["samples"].clone(), torch.tensor(500)).square().mean().backward()
        with torch.no_grad():
            check(calls, 5)
    assert all(parameter.grad is not None for parameter in network.trainable.values())


def test_a_node_that_cuts_frames_before_attention_is_named(core, model, prompts, clip):
    (tiled,) = outputs_of(core["HyperTile"], model=host.inflate(model, "video"), tile_size=32, swap_size=1)
    latent = {"samples": torch.randn(5, 4, 16, 16)}
    with pytest.raises(ValueError, match="HyperTile"):
        sample(core, tiled, prompts, latent)


def test_context_windows_are_refused_by_core_samplers_too(core, model, prompts, clip):
    def windowed(length, own=WHOLE):
        options = {"context_length": length, "context_overlap": 1, "context_schedule": "standard_static"}
        return outputs_of(core["ContextWindowsManual"], model=host.inflate(model, "video", own), **options)[0]

    refused = "context windows would cut the video.* Remove the context windows node .* set window in Inflate UNet"
    for own in (WHOLE, Windows(4, 1)):
        with pytest.raises(ValueError, match=refused):
            sample(core, windowed(4, own), prompts, clip)
    assert torch.isfinite(sample(core, windowed(5), prompts, clip)).all()
    # The way that the message names.
    assert torch.isfinite(sample(core, host.inflate(model, "video", Windows(4, 1)), prompts, clip)).all()


def test_temporal_layers_are_loaded_and_offloaded_by_the_host(core, model, prompts, clip):
    video_model = with_random_temporal_layers(model)
    sample(core, video_model, prompts, clip)
    (patcher,) = video_model.get_additional_models()
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert any(entry.model is patcher.model for entry in loaded)
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    assert torch.isfinite(sample(core, video_model, prompts, clip)).all()


def test_linear_projections_and_deeper_levels(core, make_model, prompts, clip):
    model = make_model(
        use_linear_projection=True,
        prediction_type="v_prediction",
        block_out_channels=[32, 64, 64],
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock3D"] * 2 + ["DownBlock3D"],
        up_block_types=["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 2,
    )
    video_model = host.inflate(model, "video")
    assert torch.isfinite(sample(core, video_model, prompts, clip)).all()
    assert host.prediction_type_of(video_model) == "v_prediction"


def test_inflating_leaves_the_global_random_state(model):
    state = torch.get_rng_state()
    host.inflate(model, "video")
    assert torch.equal(torch.get_rng_state(), state)
