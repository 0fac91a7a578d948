"""Other nodes and packs around an inflated MODEL: the video is computed right, or the run says by name why not.

Each stand-in does in a few lines what a public pack does, or is the host's own node.
"""

from dataclasses import replace
from functools import partial

import comfy.ldm.modules.attention
import comfy.samplers
import pytest
import torch
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import inflation
from tune_a_video.tav_core.method.attention import SparseCausal
from tune_a_video.tav_core.method.windows import Windows
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights

CLIP = {"samples": torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * 5}


def patched(core, name, model, *values):
    """The model after one of the host's nodes."""
    node = core[name]
    if hasattr(node, "define_schema"):
        return node.execute(model, *values).result[0]
    return getattr(node(), node.FUNCTION)(model, *values)[0]


def edit(model, prompts, steps=2, latents=CLIP, cfg=3.0):
    with torch.inference_mode():
        inverted, _noise, _sigmas = editing.invert(model, latents, prompts[0], steps)
        return editing.sample_video(model, inverted, prompts[1], prompts[0], steps, cfg)["samples"]


def distance(a, b):
    """Relative L2 distance."""
    return float((a - b).norm() / b.norm())


def core_sampling(core, model, prompts, latents=CLIP):
    with torch.inference_mode():
        return core["KSampler"]().sample(model, 7, 2, 3.0, "euler", "normal", prompts[1], prompts[0], latents)[0][
            "samples"
        ]


@pytest.fixture
def tuned(model, make_weights):
    return apply_weights(host.inflate(model, "video"), make_weights(model, frames=6))


def with_function(model, function):
    """A MODEL whose UNet calls go through another pack's function, as TiledDiffusion and DeepCache do it."""
    changed = model.clone()
    changed.set_model_unet_function_wrapper(function)
    return changed


# --- a call holds whole videos (W2) ---


def call(apply_model, args, x):
    """The UNet of a batch that is made of several copies of the call's own."""
    copies = len(x) // len(args["input"])
    c = {key: value.repeat(copies, *[1] * (value.ndim - 1)) if torch.is_tensor(value) else value
         for key, value in args["c"].items()}  # fmt: skip
    return apply_model(x, args["timestep"].repeat(copies), **c)


def tiles_together(apply_model, args):
    """Two overlapping tiles in one batch, averaged."""
    x, out, count = args["input"], torch.zeros_like(args["input"]), torch.zeros_like(args["input"])
    places = [slice(0, 10), slice(6, 16)]
    tiles = call(apply_model, args, torch.cat([x[..., place] for place in places]))
    for place, tile in zip(places, tiles.chunk(2), strict=True):
        out[..., place] += tile
        count[..., place] += 1
    return out / count


def tiles_alone(apply_model, args):
    x, out, count = args["input"], torch.zeros_like(args["input"]), torch.zeros_like(args["input"])
    for place in (slice(0, 10), slice(6, 16)):
        out[..., place] += apply_model(x[..., place], args["timestep"], **args["c"])
        count[..., place] += 1
    return out / count


def twice(apply_model, args):
    return call(apply_model, args, torch.cat([args["input"]] * 2))[: len(args["input"])]


def plain(apply_model, args):
    return apply_model(args["input"], args["timestep"], **args["c"])


def prompt_by_prompt(apply_model, args):
    """The batch in one part a prompt, without a word to the transformer options."""
    prompts = len(args["cond_or_uncond"])
    parts = [tensor.chunk(prompts) for tensor in (args["input"], args["timestep"], args["c"]["c_crossattn"])]
    return torch.cat(
        [apply_model(x, t, **{**args["c"], "c_crossattn": text}) for x, t, text in zip(*parts, strict=True)]
    )


@pytest.mark.parametrize(
    "function, same_as",
    [(tiles_together, tiles_alone), (twice, plain), (prompt_by_prompt, plain)],
    ids=["tiles", "copies", "prompts"],
)
def test_any_number_of_whole_videos_is_computed_right(core, tuned, prompts, function, same_as):
    results = [core_sampling(core, with_function(tuned, f), prompts) for f in (function, same_as)]
    assert distance(*results) < 1e-4
    assert distance(*(edit(with_function(tuned, f), prompts) for f in (function, same_as))) < 1e-4


def of_frames(size):
    def function(apply_model, args):
        """A window of the frames after the other, for all prompts at once."""
        prompts = len(args["cond_or_uncond"])
        inputs = args["input"], args["timestep"], args["c"]["c_crossattn"]
        windows = zip(*(t.unflatten(0, (prompts, -1)).split(size, 1) for t in inputs), strict=True)
        out = []
        for window in windows:
            x, t, text = (part.flatten(0, 1) for part in window)
            out.append(apply_model(x, t, **{**args["c"], "c_crossattn": text}).unflatten(0, (prompts, -1)))
        return torch.cat(out, 1).flatten(0, 1)

    return function


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_part_of_a_video_is_refused(core, tuned, prompts, size):
    with pytest.raises(
        ValueError, match="another node calls this MODEL with .* no whole videos of 6 frames.*test_strangers"
    ):
        core_sampling(core, with_function(tuned, of_frames(size)), prompts)
    with pytest.raises(ValueError, match="no whole videos of 6 frames"):
        edit(with_function(tuned, of_frames(size)), prompts)


# --- the inflation is used (W1) ---


def walk(unet, x, t, context, options):
    """The UNet's own forward, block by block, as packs write it again that keep a part of it for later."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding

    emb = unet.time_embed(timestep_embedding(t, unet.model_channels).to(x.dtype))
    skips, h = [], x
    for number, module in enumerate(unet.input_blocks):
        options["block"] = ("input", number)
        h = forward_timestep_embed(module, h, emb, context, options)
        skips.append(h)
    options["block"] = ("middle", 0)
    h = forward_timestep_embed(unet.middle_block, h, emb, context, options)
    for number, module in enumerate(unet.output_blocks):
        options["block"] = ("output", number)
        skip = skips.pop()
        shape = skips[-1].shape if skips else None
        h = forward_timestep_embed(module, torch.cat([h, skip], 1), emb, context, options, shape)
    return unet.out(h)


def walking(from_step=0, options=None):
    steps = 0

    def function(apply_model, args):
        nonlocal steps
        steps += 1
        if steps <= from_step:
            return plain(apply_model, args)
        model, sigma, x, c = apply_model.__self__, args["timestep"], args["input"], args["c"]
        xc, t = model.model_sampling.calculate_input(sigma, x), model.model_sampling.timestep(sigma).float()
        given = c["transformer_options"] if options is None else dict(options)
        out = walk(model.diffusion_model, xc, t, c["c_crossattn"], given)
        return model.model_sampling.calculate_denoised(sigma, out, x)

    return function


@pytest.mark.parametrize("from_step", [0, 1])
@pytest.mark.parametrize("options", [None, {}])
def test_a_node_that_walks_the_unet_itself_is_refused(core, model, tuned, prompts, unchanged, from_step, options):
    with unchanged(model):
        for sample in (lambda m: core_sampling(core, m, prompts), lambda m: edit(m, prompts)):
            with pytest.raises(ValueError, match="without its inflation.*test_strangers"):
                sample(with_function(tuned, walking(from_step, options)))


def test_a_node_that_never_calls_the_unet_is_refused(core, tuned, prompts):
    cached = with_function(tuned, lambda _apply_model, args: args["input"] * 0.9)
    with pytest.raises(ValueError, match="never computed.*test_strangers"):
        core_sampling(core, cached, prompts)


def test_a_node_that_takes_the_inflation_away_is_noticed(tuned, prompts):
    stripped = tuned.clone()
    stripped.wrappers = {}
    with pytest.raises(ValueError, match="is not inflated"):
        edit(stripped, prompts)


def test_a_model_that_is_not_inflated_may_be_walked(core, model, prompts):
    walked = core_sampling(core, with_function(model, walking()), prompts)
    assert distance(walked, core_sampling(core, model, prompts)) < 1e-4


# --- attention of other nodes (W4, W5) ---


def test_merged_tokens(core, tuned, prompts, monkeypatch):
    """ToMe merges queries and no keys: as if each merged token asked alone."""
    generator = torch.Generator().manual_seed(0)
    attention = SparseCausal(4)
    k, v = (f(torch.randn(8, 64, 32, generator=generator)) for f in (attention.keys, attention.values))
    q = torch.randn(8, 45, 32, generator=generator)

    def sdpa(q, k, v, _heads):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    torch.testing.assert_close(attention.attend(sdpa, q, k, v, 1), sdpa(q, k, v, 1), rtol=1e-5, atol=1e-5)
    merged = patched(core, "TomePatchModel", tuned, 0.3)

    def plainly(_self, function, *args, **kwargs):
        return function(*args, **kwargs)

    def seeded():
        torch.manual_seed(0)  # which tokens are merged is drawn
        return edit(merged, prompts)

    ours = seeded()
    monkeypatch.setattr(SparseCausal, "attend", plainly)
    assert distance(ours, seeded()) < 1e-4


@pytest.mark.parametrize("name, values", [("PerturbedAttentionGuidance", [3.0]), ("SelfAttentionGuidance", [0.5, 2.0])])
def test_guidance_by_other_attention_works(core, tuned, prompts, name, values):
    guided = edit(patched(core, name, tuned, *values), prompts)
    assert torch.isfinite(guided).all() and not torch.allclose(guided, edit(tuned, prompts), rtol=0.01)


@pytest.mark.parametrize("frames", [1, 2, 6])
def test_an_attention_that_returns_values_returns_each_frames_own(tuned, prompts, frames):
    """As PAG does; the same through a patch of the output, which sees the values by the way."""
    latents = {"samples": CLIP["samples"][:frames]}
    own, replaced, expected = [], tuned.clone(), tuned.clone()
    for model in (replaced, expected):
        model.attachments = {**model.attachments, host.KEY: replace(host.inflation_of(model), frames=None)}
    replaced.set_model_attn1_replace(lambda _q, _k, v, _options: v, "input", 1)
    attn1 = host.parts_of(host.unet_of(tuned)).blocks["input_blocks.1.1.transformer_blocks.0"].attn1

    def values(_q, k, _v, options):
        own[:] = [k] if options["block"] == ("input", 1) else []
        return _q, k, _v

    expected.set_model_attn1_patch(values)
    expected.set_model_attn1_output_patch(lambda out, _o: attn1.to_out(own[0] @ attn1.to_v.weight.T) if own else out)
    assert distance(*(edit(m, prompts, latents=latents) for m in (replaced, expected))) < 1e-5


def test_guidance_of_no_strength_changes_nothing(core, tuned, prompts):
    without = patched(core, "SelfAttentionGuidance", tuned, 0.0, 2.0)
    assert distance(edit(without, prompts), edit(tuned, prompts)) < 1e-4


def test_what_notes_scores_notes_those_of_one_frame(tuned, prompts):
    noted = []

    def attention(q, k, v, options):
        noted.append((q.shape[1], k.shape[1]))
        return comfy.ldm.modules.attention.attention_basic(q, k, v, options["n_heads"])

    noting = tuned.clone()
    noting.set_model_attn1_replace(attention, "input", 1)
    assert distance(edit(noting, prompts), edit(tuned, prompts)) < 1e-4
    assert set(noted[1::2]) == {(256, 256)} and set(noted[::2]) == {(256, 512)}


# --- an inversion is without guidance (W6, W7) ---


@pytest.mark.parametrize(
    "add",
    [
        lambda core, m, p: patched(core, "SelfAttentionGuidance", m, 0.5, 2.0),
        lambda core, m, p: patched(core, "PerturbedAttentionGuidance", m, 3.0),
        lambda core, m, p: patched(core, "PerpNeg", m, p[0], 1.0),
        lambda core, m, p: patched(core, "RescaleCFG", m, 0.7),
    ],
    ids=["SAG", "PAG", "PerpNeg", "RescaleCFG"],
)
def test_guidance_nodes_change_no_inversion(core, tuned, prompts, add):
    with torch.inference_mode():
        models = tuned, add(core, tuned, prompts)
        plain, other = (editing.invert(m, CLIP, prompts[0], 3)[0]["samples"] for m in models)
    assert distance(other, plain) < 1e-4


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches_take_no_part_in_an_inversion(core, tuned, prompts, name):
    cached = patched(core, name, tuned, 0.2, 0.15, 0.95, False)
    with torch.inference_mode():
        inverted = [editing.invert(m, CLIP, prompts[0], 12)[0] for m in (tuned, cached)]
        assert torch.equal(*(latent["samples"] for latent in inverted))
        video = editing.sample_video(cached, inverted[1], prompts[1], prompts[0], 12, 3.0)
    assert torch.isfinite(video["samples"]).all()


@pytest.mark.parametrize("windows", [Windows(), Windows(4), Windows(5, 1)])
def test_a_cache_is_of_the_whole_clip_wherever_it_is_put(core, model, make_weights, prompts, windows):
    """EasyCache keeps the UNet's last change: of one window, it would be added to another's frames."""
    weights = make_weights(model, frames=6)
    plain = apply_weights(model, weights, windows=windows)
    cache = partial(patched, core, "EasyCache")
    before = apply_weights(cache(model, 3.0, 0.15, 0.95, False), weights, windows=windows)
    wrapped = [list(kind) for kind in plain.wrappers.values()]
    cached = [edit(m, prompts, 12) for m in (before, cache(plain, 3.0, 0.15, 0.95, False))]
    assert torch.equal(*cached)
    assert not torch.allclose(cached[0], edit(plain, prompts, 12), rtol=0.01), "it was used"
    assert [list(kind) for kind in plain.wrappers.values()] == wrapped


def test_nan_is_blamed_on_what_made_it(tuned, prompts):
    spoilt = tuned.clone()
    spoilt.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * torch.nan)
    with torch.inference_mode():
        inverted, _noise, _sigmas = editing.invert(spoilt, CLIP, prompts[0], 2)
        with pytest.raises(ValueError, match="predictions became NaN or infinite.*test_strangers") as error:
            editing.sample_video(spoilt, inverted, prompts[1], prompts[0], 2, 3.0)
    assert "VAE" not in str(error.value)


# --- masks (W3) ---


@pytest.fixture
def right_half():
    mask = torch.zeros(6, 128, 128)
    mask[:, :, 64:] = 1
    return mask


def masked_ways(core, model, prompts, mask, steps=6):
    """The core's sampler with our NOISE, and Sample Video with the mask before and after DDIM Invert."""
    with torch.inference_mode():
        masked = core["SetLatentNoiseMask"]().set_mask(CLIP, mask)[0]
        inverted, noise, sigmas = editing.invert(model, masked, prompts[0], steps)
        later = core["SetLatentNoiseMask"]().set_mask(editing.invert(model, CLIP, prompts[0], steps)[0], mask)[0]
        guider = host.guided(model, prompts[1], prompts[0], 5.0)
        sampler = comfy.samplers.ksampler("euler")
        theirs = core["SamplerCustomAdvanced"].execute(noise, guider, sampler, sigmas, masked).result[0]["samples"]
        ours = [editing.sample_video(model, latent, *prompts[::-1], steps, 5.0) for latent in (inverted, later)]
    return theirs, *(latent["samples"] for latent in ours)


def test_a_mask_is_honoured_as_in_the_core(core, tuned, prompts, right_half):
    theirs, before, after = masked_ways(core, tuned, prompts, right_half)
    assert torch.equal(before, after)
    assert torch.equal(before[..., :8], CLIP["samples"][..., :8])
    torch.testing.assert_close(theirs[..., :7], CLIP["samples"][..., :7])
    assert distance(before, theirs) < 1e-4
    plain = edit(tuned, prompts, 6, cfg=5.0)
    assert not torch.allclose(before[..., 8:], plain[..., 8:], rtol=0.01), "what is kept is seen by what is edited"


def test_a_soft_mask_blends_once_as_in_the_core(core, tuned, prompts, right_half):
    soft = right_half * 0.5 + 0.25
    for model in (tuned, patched(core, "DifferentialDiffusion", tuned)):
        theirs, ours, _later = masked_ways(core, model, prompts, soft)
        assert distance(ours, theirs) < 1e-4


def test_a_finished_video_is_not_taken_for_noise(core, tuned, prompts):
    with torch.inference_mode():
        inverted, _noise, _sigmas = editing.invert(tuned, CLIP, prompts[0], 10)
        (finished,) = core["KSamplerAdvanced"]().sample(
            tuned, "disable", 0, 10, 1.0, "euler", "ddim_uniform", *prompts, inverted, 0, 10000, "disable"
        )
        finished["samples"] = CLIP["samples"]  # what a trained model would end at
        with pytest.raises(ValueError, match="not noise"):
            editing.sample_video(tuned, finished, *prompts, 10, 3.0)
        flipped = inverted | {"samples": inverted["samples"].flip(-1)}
        assert torch.isfinite(editing.sample_video(tuned, flipped, *prompts, 10, 3.0)["samples"]).all()


def test_a_mask_of_all_changes_nothing(tuned, prompts, right_half):
    with torch.inference_mode():
        inverted, _noise, _sigmas = editing.invert(tuned, CLIP, prompts[0], 4)
        results = [
            editing.sample_video(tuned, latent, prompts[1], prompts[0], 4, 3.0)["samples"]
            for latent in (inverted, inverted | {"noise_mask": torch.ones_like(right_half)})
        ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_a_mask_that_would_keep_noise_is_refused(core, tuned, prompts, right_half):
    with torch.inference_mode():
        inverted, _noise, _sigmas = editing.invert(tuned, CLIP | {"noise_mask": right_half}, prompts[0], 3)
        with pytest.raises(ValueError, match="would stay the noise that it is. Use Sample Video"):
            core["KSamplerAdvanced"]().sample(
                tuned, "disable", 0, 3, 3.0, "euler", "ddim_uniform", *prompts, inverted, 0, 10000, "disable"
            )
        changed = inverted | {"samples": inverted["samples"].flip(-1)}
        for latent in (changed, {"samples": inverted["samples"], "noise_mask": right_half}):
            with pytest.raises(ValueError, match="what it should keep of the clip is not known"):
                editing.sample_video(tuned, latent, *prompts, 3, 3.0)


def test_a_mask_of_other_frames_is_refused(tuned, prompts, right_half):
    with pytest.raises(ValueError, match="mask has 4 frames, the clip has 6"), torch.inference_mode():
        editing.invert(tuned, CLIP | {"noise_mask": right_half[:4]}, prompts[0], 3)


@pytest.mark.parametrize("count, size, message", [
    (4, (128, 128), "mask has 4 frames, the clip has 6"),
    (12, (128, 128), "mask has 12 frames, the clip has 6"),
    (6, (64, 128), "mask is 128 x 64, another shape"),
])  # fmt: skip
def test_a_prompts_mask_is_one_a_frame_or_one(core, tuned, prompts, count, size, message):
    """Of twelve for six frames the host takes the first six; four are an error of torch's."""

    def masked(shape):
        return core["ConditioningSetMask"]().append(prompts[1], torch.rand(shape), "default", 1.0)[0]

    spoilt = prompts[0], prompts[1] + masked((count, *size))
    for sample in (edit, partial(core_sampling, core)):
        with pytest.raises(ValueError, match=f"positive's {message}"):
            sample(tuned, spoilt)
        for shape in ((128, 128), (1, 128, 128), (6, 64, 64)):
            assert torch.isfinite(sample(tuned, (prompts[0], prompts[1] + masked(shape)))).all()
    with pytest.raises(ValueError, match=f"prompt's {message}"), torch.inference_mode():
        editing.invert(tuned, CLIP, spoilt[1], 2)


# --- where sampling starts (W9) ---


def test_another_noise_schedule_is_refused(core, tuned, prompts):
    with torch.inference_mode():
        inverted, _noise, _sigmas = editing.invert(tuned, CLIP, prompts[0], 4)
        for kind, zsnr in (("eps", True), ("v_prediction", True)):
            other = patched(core, "ModelSamplingDiscrete", tuned, kind, zsnr)
            with pytest.raises(ValueError, match="inverted to noise level .* this MODEL samples from"):
                editing.sample_video(other, inverted, *prompts, 4, 3.0)


# --- merged models (W15) ---


def test_two_tuned_models_that_were_merged_are_refused(core, model, make_weights, prompts):
    plain, first = host.inflate(model, "video"), apply_weights(model, make_weights(model, 3, frames=6))
    second = apply_weights(model, make_weights(model, 4, frames=6))
    merge = core["ModelMergeSimple"]().merge
    for one, other in ((first, second), (plain, second)):
        for sample in (edit, partial(core_sampling, core)):
            with pytest.raises(ValueError, match="merged with a tuned one"):
                sample(merge(one, other, 0.5)[0], prompts)
    for one, other in ((first, model), (first, first.clone())):
        assert torch.isfinite(edit(merge(one, other, 0.5)[0], prompts)).all()


# --- nothing of the caller's is changed (L9) ---


def test_the_callers_layers_stay_as_they_are(make_model):
    half = make_model()
    half.model.manual_cast_dtype = torch.bfloat16
    layers = host.inflation_of(host.inflate(make_model(), "video")).temporal
    layers.requires_grad_(True)
    host.with_inflation(half, host.Inflation(layers, "video"))
    assert {(p.dtype, p.requires_grad) for p in layers.parameters()} == {(torch.float32, True)}


def test_an_error_while_attaching_leaves_nothing_behind(inflated, prompts, unchanged, monkeypatch):
    last, real = host.parts_of(host.unet_of(inflated)).video_norms[-1], inflation._over_videos

    def failing(norm, frames):
        if norm is last:
            raise TypeError("at the last of all")
        return real(norm, frames)

    with unchanged(inflated), monkeypatch.context() as broken:
        broken.setattr(inflation, "_over_videos", failing)
        with pytest.raises(TypeError, match="at the last of all"):
            edit(inflated, prompts)
