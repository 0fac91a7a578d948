"""Take steps with the reference's own checkout, in its own environment: `run.py bench --reference` starts this.

It reads a kind of step a line and answers with the seconds that it took, on weights and inputs of its own. Only what
the reference's environment has may be imported here. Attention is its own, or xformers' where that is installed.
"""

# Another diffusers is installed there:
# pyright: reportPrivateImportUsage=false, reportArgumentType=false, reportAttributeAccessIssue=false

import json
import sys
import time

import torch
import torch.nn.functional as F


def main(checkout: str, setting: str) -> None:
    sys.path.insert(0, checkout)
    from diffusers import AutoencoderKL, DDIMScheduler
    from einops import rearrange
    from tuneavideo.models.unet import UNet3DConditionModel

    case = json.loads(setting)
    device = torch.device(case["device"])
    half = torch.float16 if device.type == "cuda" else torch.float32
    unet = UNet3DConditionModel(**case["config"]).to(device).requires_grad_(False)
    vae = AutoencoderKL(**case["vae"]).to(device, half).requires_grad_(False)
    if device.type == "cuda":
        try:
            unet.enable_xformers_memory_efficient_attention()
        except Exception as error:  # not installed, or not for this GPU: then its own attention
            print(error, file=sys.stderr)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, clip_sample=False
    )  # fmt: skip
    scheduler.set_timesteps(50)
    frames, size = case["frames"], case["size"]
    pictures = torch.rand(frames, 3, size, size, device=device, dtype=half)
    latents = torch.randn(1, 4, frames, size // 8, size // 8, device=device)
    text = torch.randn(2, 77, case["config"]["cross_attention_dim"], device=device)
    trained = [
        parameter
        for name, parameter in unet.named_parameters()
        if any(part in name for part in ("attn1.to_q", "attn2.to_q", "attn_temp"))
    ]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-5)

    def sample(videos: int) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            out = unet(torch.cat([latents] * videos), 500, encoder_hidden_states=text[:videos]).sample
            if videos == 2:
                uncond, cond = out.chunk(2)
                out = uncond + 12.5 * (cond - uncond)
            scheduler.step(out, scheduler.timesteps[25], latents)

    def tune() -> None:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            with torch.no_grad():
                drawn = vae.encode(pictures).latent_dist.sample() * 0.18215
            clean = rearrange(drawn, "(b f) c h w -> b c f h w", f=frames)
            noise, t = torch.randn_like(clean), torch.randint(1000, (1,), device=device)
            out = unet(scheduler.add_noise(clean, noise, t), t, encoder_hidden_states=text[:1]).sample
            loss = F.mse_loss(out.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter  # as in measure.py
    for kind in map(str.strip, sys.stdin):
        tuning = kind.startswith("tuning")
        unet.train(tuning)
        for parameter in trained:
            parameter.requires_grad_(tuning)
        if tuning:
            unet.enable_gradient_checkpointing()
        start = clock()
        tune() if tuning else sample(2 if "guided" in kind else 1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(clock() - start, flush=True)


main(*sys.argv[1:])
