"""A tuned model beside the host's other means: LoRA, ControlNet, saving."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file
from small import TINY
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.guidance import Steering
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.one_shot import Validation, one_shot_tune
from tune_a_video.tav_core.store import published

BLOCK = "input_blocks_1_1_transformer_blocks_0"


@pytest.fixture
def tuned(inflated, clip, prompts):
    """The weights of a short, strong tune, and the tuned model."""
    with torch.inference_mode():
        recipe = Recipe(steps=3, learning_rate=1e-2)
        weights = one_shot_tune(inflated, clip, prompts[1], recipe, "fp32", "all", lambda _step: None)
        return weights, apply_weights(inflated, weights)


def lora_for(layer, width=32, rank=2):
    up, down = torch.randn(2, width, rank, generator=torch.Generator().manual_seed(0))
    name = f"lora_unet_{BLOCK}_{layer}"
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down.T.contiguous()}, up @ down.T


@pytest.mark.parametrize("order", ["before the tune is applied", "after"])
def test_lora_on_a_tuned_query_adds_up(inflated, tuned, unchanged, order):
    weights, tuned_model = tuned
    lora, change = lora_for("attn1_to_q")
    key = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    with unchanged(inflated), torch.inference_mode():
        base = inflated.model.diffusion_model.state_dict()[key].clone()
        if order == "after":
            both, _ = comfy.sd.load_lora_for_models(tuned_model, None, lora, 0.5, 0)
        else:
            styled, _ = comfy.sd.load_lora_for_models(inflated, None, lora, 0.5, 0)
            both = apply_weights(styled, weights)
        host.load(both)
        loaded = both.model.diffusion_model.state_dict()[key]
        torch.testing.assert_close(loaded, base + 0.5 * change + weights.queries[key])


def test_fingerprint_follows_what_is_computed(make_model, inflated, tuned):
    lora, _ = lora_for("attn1_to_q")
    models = [
        inflated,
        make_model(seed=1),
        tuned[1],
        comfy.sd.load_lora_for_models(inflated, None, lora, 0.5, 0)[0],
        comfy.sd.load_lora_for_models(inflated, None, lora, 0.6, 0)[0],
    ]
    prints = [host.fingerprint(model) for model in models]
    assert len(set(prints)) == len(models)
    with torch.inference_mode():
        host.load(models[3])
    again = comfy.sd.load_lora_for_models(make_model(), None, lora_for("attn1_to_q")[0], 0.5, 0)[0]
    assert [host.fingerprint(model) for model in models] == prints
    assert host.fingerprint(again) == prints[3], "another process gives the same"


@pytest.fixture
def control():
    of_unets_only = ("out_channels", "use_temporal_attention")
    config = {key: value for key, value in published.to_unet_config(TINY).items() if key not in of_unets_only}
    operations = comfy.ops.disable_weight_init
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float32, operations=operations)
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))


def test_controlnet_steers_the_video(core, tuned, control, clip, prompts):
    _, model = tuned
    with torch.inference_mode():
        hints = torch.rand(5, 64, 64, 3, generator=torch.Generator().manual_seed(2))
        inverted, _, _ = editing.invert(model, clip, prompts[0], 3)

        def sample(image, steering=editing.PLAIN):
            positive, negative = prompts[1], prompts[0]
            if image is not None:
                node = core["ControlNetApplyAdvanced"]()
                positive, negative = node.apply_controlnet(positive, negative, control, image, 1.0, 0.0, 1.0)
            return editing.sample_video(model, inverted, positive, negative, 3, 3.0, steering=steering)["samples"]

        plain, steered, backwards = sample(None), sample(hints), sample(hints.flip(0))
        shared = [sample(image, Steering(structure=0.4, cfg_until=0.7, freedom=0.1)) for image in (hints, None)]
    assert torch.isfinite(steered).all() and torch.isfinite(shared[0]).all()
    assert not torch.allclose(*shared, rtol=0.1), "it still steers where structure is shared"
    assert not torch.allclose(steered, plain, rtol=0.1)
    assert not torch.allclose(steered, backwards, rtol=0.1), "every frame has its own hint"


def test_a_controlnets_pictures_are_one_a_frame_or_one(core, inflated, tuned, control, clip, prompts):
    """Of ten for five frames the host gives the negative prompt the first five and the positive one the others."""
    _, model = tuned
    pictures = torch.rand(10, 64, 64, 3, generator=torch.Generator().manual_seed(2))

    def steered(positive, negative, count):
        node = core["ControlNetApplyAdvanced"]()
        return node.apply_controlnet(positive, negative, control, pictures[:count], 1.0, 0.0, 1.0)

    with torch.inference_mode():
        inverted, _, _ = editing.invert(model, clip, prompts[0], 2)
        for count in (1, 5):
            positive, negative = steered(prompts[1], prompts[0], count)
            editing.sample_video(model, inverted, positive, negative, 2, 3.0)
        for count in (3, 9, 10):
            positive, negative = steered(*steered(prompts[1], prompts[0], count), 5)  # the second of two
            refused = pytest.raises(ValueError, match=f"positive has a ControlNet with {count} pictures.* 5 frames")
            with refused:
                editing.sample_video(model, inverted, positive, prompts[0], 2, 3.0)
            with refused:
                core["KSampler"]().sample(model, 7, 2, 3.0, "euler", "normal", positive, prompts[0], clip)
            with pytest.raises(ValueError, match=f"prompt has a ControlNet with {count}"):
                editing.invert(model, clip, negative, 2)
            with pytest.raises(ValueError, match=f"validation_prompt has a ControlNet with {count}"):
                validation = Validation(positive, None, 1, lambda *_args: None)
                one_shot_tune(inflated, clip, prompts[1], Recipe(1), "fp32", "all", step_1, validation=validation)


def step_1(_step):
    raise AssertionError("it began")


def test_core_saves_a_tuned_model_and_restores_the_base(inflated, tuned, unchanged, tmp_path):
    """A checkpoint holds the patched weights; the model in memory is what it was."""
    weights, model = tuned
    with unchanged(inflated), torch.inference_mode():
        base = {name: tensor.clone() for name, tensor in inflated.model.diffusion_model.state_dict().items()}
        copy = model.clone()
        assert host.inflation_of(copy) is host.inflation_of(model)
        comfy.sd.save_checkpoint(str(tmp_path / "tuned.safetensors"), copy)
    saved = load_file(tmp_path / "tuned.safetensors")
    # The temporal layers are no part of an image checkpoint.
    assert saved.keys() == {f"model.diffusion_model.{name}" for name in base}
    for name, tensor in base.items():
        expected = tensor + weights.queries[name] if name in weights.queries else tensor
        torch.testing.assert_close(saved[f"model.diffusion_model.{name}"], expected)


def edit(model, clip, prompts):
    """One guided step from the inverted clip."""
    with torch.inference_mode():
        inverted, _noise, _sigmas = editing.invert(model, clip, prompts[0], 1)
        return editing.sample_video(model, inverted, prompts[1], prompts[0], 1, 3.0)["samples"]


def test_another_packs_attention_computes_the_videos(inflated, clip, prompts):
    seen = set()

    def override(function, q, k, *args, **kwargs):
        seen.add((tuple(q.shape[:2]), tuple(k.shape[:2])))
        return function(q, k, *args, **kwargs)

    patched = inflated.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    # The host's attention on a CPU and torch's round in another order.
    torch.testing.assert_close(edit(patched, clip, prompts), edit(inflated, clip, prompts), rtol=1e-4, atol=1e-4)
    # Each video, five frames of 64 tokens: the first two on one frame's keys, the others on two frames'.
    assert {((1, 128), (1, 64)), ((3, 64), (3, 128))} <= seen


def test_a_replaced_attention_sees_all_keys(inflated, clip, prompts):
    seen = set()

    def replacement(q, k, v, options):
        seen.add((tuple(q.shape[:2]), tuple(k.shape[:2])))
        return comfy.ldm.modules.attention.attention_basic(q, k, v, options["n_heads"])

    replaced = inflated.clone()
    replaced.set_model_attn1_replace(replacement, "input", 1)
    torch.testing.assert_close(edit(replaced, clip, prompts), edit(inflated, clip, prompts), rtol=1e-4, atol=1e-4)
    assert {((5, 64), (5, 128)), ((10, 64), (10, 128))} <= seen


def test_a_compiled_unet_is_inflated_anew(model, make_weights, clip, prompts):
    """The compiler keeps what it traced of a module, and takes no notice of what is attached to it later."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")  # as TorchCompileModel, whose backends need a compiler
    temporal = host.inflation_of(apply_weights(host.inflate(model, "video"), make_weights(model))).temporal
    for norm in ("video", "per_frame", "video"):
        inflation = host.Inflation(temporal, norm)
        plain, fast = (edit(host.with_inflation(base, inflation), clip, prompts) for base in (model, compiled))
        assert torch.equal(plain, fast)
