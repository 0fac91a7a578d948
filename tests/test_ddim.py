"""DDIM through the host's samplers, against diffusers' schedulers around the same network."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import ddim
from tune_a_video.tav_core.pipeline import editing

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def network(model, x, timestep, context):
    """The UNet's raw output for one prompt, past all of the host's sampling code."""
    host.load(model)
    options = {"wrappers": model.wrappers, "cond_or_uncond": [0]}
    frames = x.shape[0]
    return model.model.diffusion_model(
        x, torch.full((frames,), float(timestep)), context=context.expand(frames, -1, -1), transformer_options=options
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [8, 10])
def test_both_directions_equal_diffusers(make_model, clip, prompts, prediction_type, steps):
    model = host.inflate(make_model(prediction_type=prediction_type), "video")
    (empty, edit), cfg = prompts, 7.5
    into, out_of = model.model.process_latent_in, model.model.process_latent_out
    with torch.inference_mode():
        forward = DDIMScheduler(**SCHEDULE, prediction_type=prediction_type)
        forward.set_timesteps(steps)
        inverse = DDIMInverseScheduler(**SCHEDULE)
        inverse.set_timesteps(steps)
        x = into(clip["samples"])
        for timestep in inverse.timesteps:
            # The network is at `timestep`, so a velocity is turned into noise there, by the sampling scheduler.
            # The inverse scheduler would do it at the lower level, which reconstructs less closely.
            alpha = forward.alphas_cumprod[timestep]
            clean = forward.step(network(model, x, timestep, empty[0][0]), timestep, x).pred_original_sample
            epsilon = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            x = inverse.step(epsilon, timestep, x).prev_sample
        inverted, _, _ = editing.invert(model, clip, empty, steps)
        sigma = ddim.ddim_sigmas(host.model_sigmas(model), steps)[-1]
        # The host's latents are in sigma space, diffusers' at the variance of the training data.
        torch.testing.assert_close(into(inverted["samples"]) / (1 + sigma**2).sqrt(), x, rtol=1e-4, atol=1e-4)

        for timestep in forward.timesteps:
            uncond, cond = (network(model, x, timestep, p[0][0]) for p in (empty, edit))
            x = forward.step(uncond + cfg * (cond - uncond), timestep, x).prev_sample
        video = editing.sample_video(model, inverted, edit, empty, steps, cfg)
        torch.testing.assert_close(video["samples"], out_of(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [steps for steps in range(1, ddim.MAX_STEPS + 1) if 1000 % steps == 0])
def test_timesteps_equal_diffusers_where_it_rounds_nothing(steps):
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    assert ddim.ddim_timesteps(steps).tolist() == scheduler.timesteps.flip(0).tolist()


@pytest.mark.parametrize("steps", [0, -1, ddim.MAX_STEPS + 1])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="DDIM takes 1 to"):
        ddim.ddim_timesteps(steps)


def test_every_step_count_spans_the_schedule_evenly():
    for steps in range(1, ddim.MAX_STEPS + 1):
        timesteps = ddim.ddim_timesteps(steps)
        assert timesteps[0] == 1 and timesteps[-1] < 1000
        assert ((timesteps.diff(append=torch.tensor([1001])) - 1000 / steps).abs() <= 1).all()


def test_more_steps_never_start_from_less_noise():
    last = [int(ddim.ddim_timesteps(steps)[-1]) for steps in range(1, ddim.MAX_STEPS + 1)]
    assert last == sorted(last) and last[49] == 981


def test_more_steps_reconstruct_closer(inflated, clip, prompts):
    with torch.inference_mode():
        inflated.model.diffusion_model.out[2].weight *= 0.1  # a smooth path, which random weights alone have not
    errors = []
    for steps in (5, 20, 80):
        with torch.inference_mode():
            inverted, _, _ = editing.invert(inflated, clip, prompts[0], steps)
            back = editing.sample_video(inflated, inverted, prompts[0], prompts[0], steps, 1.0)
        errors.append(float((back["samples"] - clip["samples"]).norm() / clip["samples"].norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.1


def test_core_samplers_start_from_the_inverted_clip(inflated, clip, prompts, core):
    """NOISE and SIGMAS through SamplerCustomAdvanced, the LATENT through KSampler (Advanced)."""
    steps, (empty, edit) = 10, prompts
    with torch.inference_mode():
        inverted, noise, sigmas = editing.invert(inflated, clip, empty, steps)
        ours = editing.sample_video(inflated, inverted, edit, empty, steps, 3.0)["samples"]
        assert sigmas[-1] == 0 and len(sigmas) == steps + 1

        (guider,) = core["CFGGuider"].execute(inflated, edit, empty, 3.0).args
        (sampler,) = core["KSamplerSelect"].execute("euler").args
        images = [torch.zeros_like(clip["samples"]), clip["samples"], torch.rand_like(clip["samples"])]
        for image in images:
            out, _ = core["SamplerCustomAdvanced"].execute(noise, guider, sampler, sigmas, {"samples": image}).args
            # The core ends at sigma 0, the reference's DDIM at the noise level of timestep 0.
            assert (out["samples"] - ours).norm() / ours.norm() < 0.02

        def off(sampler, scheduler, steps=steps):
            """As the node's tooltip has it, and otherwise."""
            (out,) = core["KSamplerAdvanced"]().sample(
                inflated, "disable", 0, steps, 3.0, sampler, scheduler, edit, empty, inverted, 0, 10000, "disable"
            )
            return float((out["samples"] - ours).norm() / ours.norm())

        assert max(off("euler", "ddim_uniform"), off("ddim", "ddim_uniform")) < 0.02
        assert min(off("euler", "normal"), off("euler", "karras"), off("euler", "ddim_uniform", 5)) > 0.05


def test_noise_at_the_very_top_of_the_schedule(inflated, clip):
    """There the host scales noise by sqrt(1 + sigma²) instead of sigma."""
    sampling = inflated.get_model_object("model_sampling")
    for sigma in (sampling.sigma_max, sampling.sigmas[-20]):
        noise = editing.InvertedNoise(inflated, clip["samples"], float(sigma)).generate_noise(clip)
        image = inflated.model.process_latent_in(clip["samples"])
        start = sampling.noise_scaling(sigma, noise, image, bool(sigma == sampling.sigma_max))
        torch.testing.assert_close(start, image)


def test_noise_refuses_another_number_of_frames(inflated, clip):
    noise = editing.InvertedNoise(inflated, clip["samples"], 10.0)
    with pytest.raises(ValueError, match="both need the same frames and size"):
        noise.generate_noise({"samples": clip["samples"][:3]})
