"""One-shot tuning on the host's own UNet."""

from types import SimpleNamespace

import comfy.model_base
import comfy.model_management
import comfy.supported_models
import pytest
import torch
from baseline import SD15
from equal import same_weights
from small import meta_unet
from torch.utils._python_dispatch import TorchDispatchMode
from tune_a_video.nodes import ApplyWeights, InflateUNet
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import inflation, tuning
from tune_a_video.tav_core.method.attention import PAPERS
from tune_a_video.tav_core.method.inflation import RECOMPUTE, TemporalLayers
from tune_a_video.tav_core.method.tuning import Recipe, Step
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.network import TrainingUNet
from tune_a_video.tav_core.pipeline.one_shot import one_shot_tune
from tune_a_video.tav_core.store import published


def tuned(model, clip, prompts, steps=3, precision="fp32", recompute="all", on_step=lambda _step: None, **recipe):
    """Tune inside inference mode, as nodes run."""
    with torch.inference_mode():
        return one_shot_tune(model, clip, prompts[1], Recipe(steps, **recipe), precision, recompute, on_step)


def test_same_seed_gives_the_same_result_and_disturbs_nobody(inflated, clip, prompts, unchanged):
    state = torch.get_rng_state()
    with unchanged(inflated):
        first = tuned(inflated, clip, prompts)
        torch.manual_seed(99)
        second = tuned(inflated, clip, prompts)
        torch.set_rng_state(state)
        other = tuned(inflated, clip, prompts, seed=34)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first, second) and first.losses == second.losses
    assert not same_weights(first, other)


def test_every_trainable_tensor_trains_and_no_other(inflated, clip, prompts):
    weights = tuned(inflated, clip, prompts, steps=2)
    start = host.inflation_of(inflated).temporal.named()
    assert len(weights.queries) == 8 and weights.temporal.keys() == start.keys() != set()
    assert all(delta.any() for delta in weights.queries.values())
    for name, tensor in weights.temporal.items():
        assert torch.equal(tensor, start[name]) == ("norm_temp" in name), name
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in weights.queries.values())


def test_stable_diffusion_1_trains_112_tensors_of_74_million_parameters():
    unet = meta_unet(published.to_unet_config(SD15))
    temporal = TemporalLayers(host.parts_of(unet), device="meta")
    named = {**dict(unet.named_parameters()), **temporal.named()}
    trainable = [p.numel() for name, p in named.items() if tuning.trains(name)]
    assert len(trainable) == 112
    assert round(sum(trainable) / 1e6, 2) == 74.35
    assert round(sum(p.numel() for p in named.values()) / 1e6, 1) == 909.1


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
@pytest.mark.parametrize(
    ("attends", "precision"), [(PAPERS, "fp32"), (PAPERS, "bf16"), ("first_own_previous", "fp32"), ("all", "fp32")]
)
def test_recomputing_changes_nothing_but_memory(model, clip, prompts, recompute, attends, precision):
    video = host.inflate(model, "video", attends=attends)
    reports = []
    for way in ("nothing", recompute):
        steps: list[Step] = []
        weights = tuned(video, clip, prompts, precision=precision, recompute=way, on_step=steps.append)
        reports.append((weights, steps))
    (plain, steps), (recomputed, steps_again) = reports
    assert steps == steps_again
    assert same_weights(plain, recomputed)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("linear", "recompute"), [(False, "all"), (True, "all"), (True, "nothing"), (True, "linear")])
def test_gradients_by_finite_differences(make_model, prediction_type, linear, recompute):
    """In float64, through the host's UNet with everything attached."""
    model = make_model(prediction_type=prediction_type, use_linear_projection=linear)
    layers = TemporalLayers(host.parts_of(host.unet_of(model)))
    generator = torch.Generator().manual_seed(4)
    layers.assign({name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in layers.named().items()})
    context = torch.randn(3, 7, 16, generator=generator)
    video = host.video_of(host.with_inflation(model, host.Inflation(layers, "video")))
    network = TrainingUNet(video, 3, "fp32", recompute, context)
    network.context = context.double()
    network.unet.double()
    network.unet.dtype = torch.float64
    network.temporal.double()
    trainable = {
        **{name: p for name, p in network.unet.named_parameters() if p.requires_grad},
        **{name: p for name, p in network.temporal.named().items() if p.requires_grad},
    }
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    noisy, target = tuning.diffuse(x, noise, 1.5, prediction_type)

    def loss():
        return ((network(noisy, torch.tensor(500)) - target) ** 2).mean()

    loss().backward()
    for name in sorted(trainable)[::3]:
        parameter = trainable[name]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            values = []
            for step in (1e-4, -2e-4):
                parameter += step * direction
                values.append(float(loss()))
            parameter += 1e-4 * direction
        numeric = (values[0] - values[1]) / 2e-4
        assert float((parameter.grad * direction).sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-9), name


def test_diffuse_is_the_schedulers_forward_process():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, noise = torch.randn(2, 3, 4, 8, 8)
    for timestep in (0, 1, 500, 999):
        alpha = scheduler.alphas_cumprod[timestep]
        t = torch.tensor([timestep])
        for kind, target in (("epsilon", noise), ("v_prediction", scheduler.get_velocity(x, noise, t))):
            noisy, wanted = tuning.diffuse(x, noise, float(((1 - alpha) / alpha).sqrt()), kind)
            torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, t))
            torch.testing.assert_close(wanted, target)


def test_draws_cover_all_timesteps_and_are_independent_per_frame():
    draws = tuning.Draws(torch.Size([2, 1, 2, 2]), 10, seed=0)
    noises, timesteps, _frames = zip(*(next(draws) for _ in range(400)), strict=True)
    assert set(timesteps) == set(range(10))
    noise = torch.stack(noises).flatten(2)
    assert abs(torch.corrcoef(torch.stack([noise[:, 0].flatten(), noise[:, 1].flatten()]))[0, 1]) < 0.1


def test_learns_the_clip(inflated, clip, prompts):
    losses = tuned(inflated, clip, prompts, steps=60, learning_rate=3e-3).losses
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_lora_composes_and_strength_scales_and_all_is_restored(inflated, clip, prompts, unchanged):
    weights = tuned(inflated, clip, prompts, learning_rate=1e-2)
    name = next(iter(weights.queries))
    key = f"diffusion_model.{name}"
    base = inflated.model.state_dict()[key].clone()
    lora = torch.full_like(base, 0.25)
    with unchanged(inflated):
        styled = inflated.clone()
        styled.add_patches({key: ("diff", (lora,))}, 0.5)
        both = apply_weights(styled, weights, content=2.0)
        host.load(both)
        loaded = both.model.state_dict()[key]
        torch.testing.assert_close(loaded, base + 0.5 * lora + 2 * weights.queries[name])
        both.unpatch_model(both.offload_device)
        assert torch.equal(both.model.state_dict()[key], base)


def test_tuning_starts_from_the_effective_weights(inflated, clip, prompts):
    """A LoRA in front of the tune is part of the model that is tuned."""
    styled = inflated.clone()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight"
    styled.add_patches({key: ("diff", (torch.ones_like(inflated.model.state_dict()[key]),))}, 0.3)
    assert tuned(styled, clip, prompts, steps=1).losses != tuned(inflated, clip, prompts, steps=1).losses
    # Whether the host has the patched model loaded makes no difference.
    before = tuned(styled, clip, prompts)
    host.load(styled)
    assert same_weights(tuned(styled, clip, prompts), before)
    host.load(inflated)
    assert same_weights(tuned(styled, clip, prompts), before)


def test_zero_strength_is_the_untuned_model(inflated, clip, prompts, core):
    weights = tuned(inflated, clip, prompts, learning_rate=1e-2)

    def out(model):
        with torch.inference_mode():
            return editing.invert(model, clip, prompts[0], 3)[0]["samples"]

    assert torch.equal(out(apply_weights(inflated, weights, 0.0, 0.0)), out(inflated))
    strengths = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]
    outs = [out(apply_weights(inflated, weights, *strength)) for strength in strengths]
    assert not torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_interrupt_stops_within_a_step_and_leaves_a_usable_host(inflated, clip, prompts, unchanged):
    seen: list[Step] = []

    def press_cancel(step):
        seen.append(step)
        if step.number == 2:
            comfy.model_management.interrupt_current_processing()

    with unchanged(inflated):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tuned(inflated, clip, prompts, steps=50, on_step=press_cancel)
        assert len(seen) == 2
        assert len(tuned(inflated, clip, prompts, steps=2).losses) == 2


@pytest.mark.parametrize("direction", ["invert", "sample"])
def test_interrupt_stops_sampling_within_a_step(inflated, clip, prompts, direction, unchanged):
    steps = []

    def press_cancel(i, *_args):
        steps.append(i)
        comfy.model_management.interrupt_current_processing()

    def run():
        if direction == "invert":
            editing.invert(inflated, clip, prompts[0], 20, press_cancel)
        else:
            editing.sample_video(
                inflated, {**clip, host.KEY: {"steps": 20}}, prompts[1], prompts[0], 20, 5.0, press_cancel
            )

    interrupted = pytest.raises(comfy.model_management.InterruptProcessingException)
    with unchanged(inflated), torch.inference_mode(), interrupted:
        run()
    assert steps == [0]


def test_a_loss_that_is_not_finite_stops_the_tune(inflated, clip, prompts, unchanged):
    huge = {"samples": clip["samples"] * 1e25}
    with unchanged(inflated), pytest.raises(FloatingPointError, match="at step 1.*Lower learning_rate"):
        tuned(inflated, huge, prompts)


def test_half_precision_base_keeps_float32_deltas(make_model, clip, prompts):
    model = make_model()
    model.model.diffusion_model.half()
    model.model.diffusion_model.dtype = torch.float16
    weights = tuned(host.inflate(model, "video"), clip, prompts, learning_rate=1e-5)
    delta = next(iter(weights.queries.values()))
    assert delta.dtype == torch.float32 and 0 < delta.abs().max() < 1e-4


def test_bf16_autocast_is_close_to_fp32(inflated, clip, prompts):
    exact, fast = (tuned(inflated, clip, prompts, precision=precision) for precision in ("fp32", "bf16"))
    assert fast.losses == pytest.approx(exact.losses, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"area": (4, 4, 0, 0)},
        {"mask": torch.ones(1, 8, 8), "mask_strength": 1.0, "set_area_to_bounds": False},
        {"strength": 0.5},
        {"start_percent": 0.1},
        {"end_percent": 0.3},
        {"clip_start_percent": 0.5},
        {"timestep_start": 999.0},
        {"control": object(), "control_apply_to_uncond": True},
        {"gligen": ("position", None, [])},
        {"hooks": object()},
        {"concat_latent_image": torch.ones(1)},
        {"unclip_conditioning": [{}]},
        {"reference_latents": [torch.ones(1)]},
        {"default": True},
        {"an option of another pack": 1},
    ],
)
def test_what_a_caption_carries_and_a_tune_cannot_use_is_refused(inflated, clip, prompts, options):
    text = prompts[1][0][0]
    with pytest.raises(ValueError, match=f"caption carries {next(iter(options))}.*CLIP Text Encode"):
        tuned(inflated, clip, [None, [[text, {"pooled_output": torch.ones(1, 4), **options}]]])


def test_what_changes_nothing_in_a_caption_is_accepted(inflated, clip, prompts):
    plain = {
        "pooled_output": torch.ones(1, 4),
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "hooks": None,
    }
    caption = [[prompts[1][0][0], {**plain, "clip_start_percent": 0.0, "clip_end_percent": 1.0, "mask": None}]]
    assert same_weights(tuned(inflated, clip, [None, caption], 1), tuned(inflated, clip, prompts, 1))


def told_by(model, clip, prompts, **latent):
    """What a tune says before its first step."""
    told = []

    def stop(_step):
        raise KeyboardInterrupt

    with torch.inference_mode(), pytest.raises(KeyboardInterrupt):
        one_shot_tune(model, {**clip, **latent}, prompts[1], Recipe(1), "fp32", "all", stop, tell=told.append)
    return told


def with_options(model, **options):
    model.model_options["transformer_options"] |= options


UNUSED = {
    "patches output_block_patch": lambda model: model.set_model_output_block_patch(print),
    "patches attn2_patch": lambda model: model.set_model_attn2_patch(print),
    "patches_replace attn2": lambda model: model.set_model_attn2_replace(print, "middle", 0),
    "patches_replace attn1": lambda model: model.set_model_attn1_replace(print, "input", 1, 0),
    "optimized_attention_override": lambda model: with_options(model, optimized_attention_override=print),
    "an option of another pack": lambda model: with_options(model, **{"an option of another pack": 0.5}),
    "model_function_wrapper": lambda model: model.set_model_unet_function_wrapper(print),
    "diffusion_model wrapper other": lambda model: model.add_wrapper_with_key("diffusion_model", "other", print),
    "apply_model wrapper": lambda model: model.add_wrapper("apply_model", print),
    "object_patches diffusion_model.out.0.forward": lambda model: model.add_object_patch(
        "diffusion_model.out.0.forward", print
    ),
    "weight_wrapper_patches diffusion_model.out.2.weight": lambda model: model.add_weight_wrapper(
        "diffusion_model.out.2.weight", print
    ),
    "context_handler": lambda model: model.model_options.update(
        context_handler=SimpleNamespace(dim=0, context_length=16)
    ),
    "injections other": lambda model: model.set_injections("other", [print]),
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_a_model_carries_and_a_tune_does_not_use_is_said(inflated, clip, prompts, name):
    UNUSED[name](inflated)
    assert told_by(inflated, clip, prompts) == [f"not used while it tunes, only when it samples: {name}"]


def test_what_only_guides_needs_no_word(inflated, clip, prompts, core):
    guided = core["RescaleCFG"]().patch(inflated, 0.7)[0]
    guided.set_model_sampler_post_cfg_function(print, disable_cfg1_optimization=True)
    guided.set_model_denoise_mask_function(print)
    guided.add_wrapper_with_key("outer_sample", "other", print)
    guided.set_model_patch(print, "nothing")
    guided.model_options["transformer_options"]["patches"]["nothing"].clear()
    guided = core["ModelSamplingDiscrete"]().patch(guided, "eps", False)[0]
    assert told_by(guided, clip, prompts) == []


def test_a_mask_is_said_to_be_unused(inflated, clip, prompts):
    told = told_by(inflated, clip, prompts, noise_mask=torch.ones(5, 64, 64))
    assert told == ["the latents' mask is not used: a tune learns whole frames"]


class Packed(torch.Tensor):
    """As a GGUF loader holds weights: bytes that claim the shape of what they stand for."""

    @property
    def shape(self):
        return torch.Size((64, 64))

    def detach(self):
        return self


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16])
@pytest.mark.parametrize("node", [InflateUNet, ApplyWeights])
def test_packed_weights_are_refused_in_a_clear_line(model, make_weights, dtype, node):
    weights = make_weights(model)
    packed = torch.zeros(64, 34, dtype=dtype).as_subclass(Packed)
    model.model.diffusion_model.time_embed[2].weight = torch.nn.Parameter(packed, requires_grad=False)
    inputs = {InflateUNet: (model, "video"), ApplyWeights: (model, weights, 1.0, 1.0)}[node]
    with pytest.raises(ValueError, match=r"weights are quantised \(time_embed.2.weight .* Use the fp16 checkpoint"):
        node.execute(*inputs)


def scaled_fp8(model, scale):
    """The model as the host loads a checkpoint of scaled float8 weights, and with the same values in float32."""
    config = comfy.supported_models.SD15({**model.model.model_config.unet_config})
    config.unet_config, config.scaled_fp8 = {**model.model.model_config.unet_config}, torch.float8_e4m3fn
    base = comfy.model_base.BaseModel(config)
    base.diffusion_model.load_state_dict(model.model.diffusion_model.state_dict(), strict=False)
    for name, layer in base.diffusion_model.named_modules():
        if hasattr(layer, "scale_weight"):
            layer.scale_weight.data.fill_(scale)
            own = model.model.diffusion_model.get_submodule(name)
            own.weight.data.copy_(layer.weight.data.float() * scale)
            if own.bias is not None:
                own.bias.data.copy_(layer.bias.data.float())
    return host.ModelPatcher(base, model.load_device, model.offload_device), model


@torch.inference_mode()
def test_scaled_fp8_weights_are_tuned_as_what_they_stand_for(model, clip, prompts):
    scaled, plain = scaled_fp8(model, 0.5)
    losses = [tuned(host.inflate(either, "video"), clip, prompts, 2).losses for either in (scaled, plain)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "recipe",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": 2.0},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0.0},
    ],
)
def test_recipe_out_of_range(recipe):
    with pytest.raises(ValueError, match=next(iter(recipe))):
        Recipe(**recipe)


class SparseCausalCalls(TorchDispatchMode):
    """Counts forward attentions with more keys than queries."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in inflation._ATTENTIONS and args[1].shape[-2] > args[0].shape[-2]
        return func(*args, **(kwargs or {}))


def test_recomputing_does_not_repeat_sparse_causal_attention(inflated, clip, prompts):
    blocks = len(host.parts_of(host.unet_of(inflated)).blocks)
    for recompute in RECOMPUTE:
        with SparseCausalCalls() as calls:
            # One token of text: its attention never has more keys than queries.
            one_shot_tune(inflated, clip, [[prompts[1][0][0][:, :1], {}]], Recipe(2), "fp32", recompute, print)
        assert calls.count == 2 * blocks
