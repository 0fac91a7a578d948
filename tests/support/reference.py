"""A second, naive implementation of the method to test against: diffusers' image UNet made a video UNet.

It shares no code with the pack, computes in float64, and writes what it computes in the form that `run.py parity`
reads. Latents are [b, c, f, h, w].
"""

import json

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import save_file

TRAINED = ("attn1.to_q", "attn2.to_q", "attn_temp.")


class VideoUNet(torch.nn.Module):
    """Called with latents, timesteps [b] and context [b, tokens, width]; returns what the network predicts."""

    def __init__(self, config, seed=0):
        super().__init__()
        kinds = {
            key: [kind.replace("3D", "2D") for kind in config[key]] for key in ("down_block_types", "up_block_types")
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.unet = UNet2DConditionModel(**{**config, **kinds})
            for block in self.blocks():
                heads, width = block.attn1.heads, block.norm1.normalized_shape[0]
                block.norm_temp = torch.nn.LayerNorm(width)
                block.attn_temp = Attention(width, heads=heads, dim_head=width // heads)
        self.double().requires_grad_(False)
        self.frames, self.video_norm = 1, True
        for block in self.blocks():
            block.attn1.set_processor(self.sparse_causal)
            block.register_forward_hook(self.temporal)
        for resnet in (module for module in self.unet.modules() if isinstance(module, ResnetBlock2D)):
            for norm in (resnet.norm1, resnet.norm2):
                self.normalise_video(norm)
        self.normalise_video(self.unet.conv_norm_out)

    def blocks(self):
        return [module for module in self.unet.modules() if isinstance(module, BasicTransformerBlock)]

    def sparse_causal(self, attention, x, encoder_hidden_states=None, attention_mask=None, **_kwargs):
        out = []
        for i, frame in enumerate(x):
            first = i - i % self.frames
            previous = max(i - 1, first)
            seen = torch.cat([x[first], x[previous]])
            out.append(multi_head(attention, frame, seen))
        return torch.stack(out)

    def temporal(self, block, _args, x):
        videos = block.norm_temp(x).split(self.frames)
        tracks = [video.transpose(0, 1) for video in videos]  # what each position shows over time
        return x + torch.cat([multi_head(block.attn_temp, track, track).transpose(0, 1) for track in tracks])

    def normalise_video(self, norm):
        per_frame = norm.forward

        def forward(x):
            if not self.video_norm:
                return per_frame(x)
            video = x.unflatten(0, (-1, self.frames)).transpose(1, 2)
            return F.group_norm(video, 32, norm.weight, norm.bias, norm.eps).transpose(1, 2).flatten(0, 1)

        norm.forward = forward

    def forward(self, latents, timesteps, context):
        self.frames = latents.shape[2]
        x = latents.transpose(1, 2).flatten(0, 1)
        timesteps, context = (t.repeat_interleave(self.frames, 0) for t in (timesteps, context))
        out = self.unet(x.double(), timesteps, encoder_hidden_states=context.double()).sample
        return out.unflatten(0, (-1, self.frames)).transpose(1, 2)


def multi_head(attention, queries, seen):
    """[..., n, c] attending to [..., m, c]."""
    q, k, v = (
        project(x).unflatten(-1, (attention.heads, -1)).transpose(-3, -2)
        for project, x in ((attention.to_q, queries), (attention.to_k, seen), (attention.to_v, seen))
    )
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return attention.to_out[0]((weights @ v).transpose(-3, -2).flatten(-2))


def write_golden(folder, config, seed=0):
    """Write a parity folder of random weights for `config`; returns its golden numbers."""
    model = VideoUNet({key: value for key, value in config.items() if key != "prediction_type"}, seed)
    kind = config["prediction_type"]
    golden = {}
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    text = (5, config["cross_attention_dim"])
    for case, shape in {"f1": (1, 4, 1, 8, 8), "b2f3": (2, 4, 3, 8, 8), "f4_odd": (1, 4, 4, 4, 12)}.items():
        inputs = randn(*shape), torch.randint(1000, shape[:1], generator=generator), randn(shape[0], *text)
        for name, tensor in zip(("latents", "timesteps", "context"), inputs, strict=True):
            golden[f"forward.{case}.{name}"] = tensor
        for name, video_norm in (("out", True), ("out_per_frame_groupnorm", False)):
            model.video_norm = video_norm
            golden[f"forward.{case}.{name}"] = model(*inputs)
    model.video_norm = True

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False, prediction_type=kind,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    golden |= loops(model, scheduler, kind, randn(1, 4, 3, 8, 8) * 0.8, randn(1, *text), randn(1, *text))
    noise = randn(5, 1, 4, 3, 8, 8)
    timesteps = torch.randint(1000, (5, 1), generator=generator)
    weights = {name: tensor.float().contiguous() for name, tensor in model.unet.state_dict().items()}
    golden |= train(model, scheduler, kind, randn(1, 4, 3, 8, 8) * 0.8, randn(1, *text), noise, timesteps)

    save_file(weights, folder / "unet3d.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, folder / "golden.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return golden


def loops(model, scheduler, kind, x0, uncond, cond):
    abar = scheduler.alphas_cumprod.double()
    x, ascending = x0.double(), scheduler.timesteps.flip(0)
    inversion = [x]
    for i, t in enumerate(ascending):
        low, high = abar[ascending[i - 1] if i else 0], abar[t]
        out = model(x, t[None], uncond)
        epsilon = out if kind == "epsilon" else high.sqrt() * out + (1 - high).sqrt() * x
        x = high.sqrt() * (x - (1 - low).sqrt() * epsilon) / low.sqrt() + (1 - high).sqrt() * epsilon
        inversion.append(x)
    sampling = []
    for t in scheduler.timesteps:
        out = [model(x, t[None], text) for text in (uncond, cond)]
        x = scheduler.step(out[0] + 12.5 * (out[1] - out[0]), int(t), x).prev_sample
        sampling.append(x)
    return {
        "ddim.x0": x0,
        "ddim.uncond": uncond,
        "ddim.cond": cond,
        "ddim.timesteps": scheduler.timesteps,
        "ddim.inversion": torch.stack(inversion),
        "ddim.sampling_cfg12.5": torch.stack(sampling),
    }


def train(model, scheduler, kind, latents, context, noise, timesteps):
    trained = {name: p for name, p in model.unet.named_parameters() if any(part in name for part in TRAINED)}
    before = {name: p.clone() for name, p in trained.items()}
    for parameter in trained.values():
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-5)
    losses, norms = [], []
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    for drawn, t in zip(noise.double(), timesteps, strict=True):
        clean = latents.double()
        target = drawn if kind == "epsilon" else scheduler.get_velocity(clean, drawn, t)
        loss = F.mse_loss(model(scheduler.add_noise(clean, drawn, t), t, context), target)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0))
        optimizer.step()
        losses.append(loss.detach())
    updates = {f"train.update.{name}": (p.detach() - before[name]).float() for name, p in trained.items()}
    return {
        "train.latents": latents,
        "train.context": context,
        "train.noise": noise,
        "train.timesteps": timesteps,
        "train.loss": torch.stack(losses),
        "train.grad_norm": torch.stack(norms),
        **updates,
    }
