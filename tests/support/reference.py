"""Golden numbers in the form that `run.py parity` reads, from the benchmark's baseline in float64.

It shares no code with the pack. Latents are [b, c, f, h, w].
"""

import json

import torch
from baseline import TRAINED, VideoUNet, invert, make_scheduler, sample, tune
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file


def write_golden(folder, config, seed=0):
    """Write a parity folder of random weights for `config`; returns its golden numbers."""
    model = VideoUNet({key: value for key, value in config.items() if key != "prediction_type"}, seed).double()
    golden = {}
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    text = (5, config["cross_attention_dim"])
    for case, shape in {"f1": (1, 4, 1, 8, 8), "b2f3": (2, 4, 3, 8, 8), "f4_odd": (1, 4, 4, 6, 10)}.items():
        inputs = randn(*shape), torch.randint(1000, shape[:1], generator=generator), randn(shape[0], *text)
        for name, tensor in zip(("latents", "timesteps", "context"), inputs, strict=True):
            golden[f"forward.{case}.{name}"] = tensor
        inputs = [tensor.double() for tensor in inputs]
        golden[f"forward.{case}.out"] = model(*inputs)
        norms = video_norms(model)
        for norm in norms:
            norm.forward = per_frame(norm.forward)
        golden[f"forward.{case}.out_per_frame_groupnorm"] = model(*inputs)
        for norm in norms:
            del norm.forward

    scheduler = make_scheduler(4, config["prediction_type"])
    x0, uncond, cond = randn(1, 4, 3, 8, 8) * 0.8, randn(1, *text), randn(1, *text)
    inversion = [x0.double(), *invert(model, scheduler, x0.double(), uncond.double())]
    sampling = list(sample(model, scheduler, inversion[-1], uncond.double(), cond.double(), 12.5))
    golden |= {
        "ddim.x0": x0,
        "ddim.uncond": uncond,
        "ddim.cond": cond,
        "ddim.timesteps": scheduler.timesteps,
        "ddim.inversion": torch.stack(inversion),
        "ddim.sampling_cfg12.5": torch.stack(sampling),
    }
    noise = randn(5, 1, 4, 3, 8, 8)
    timesteps = torch.randint(1000, (5, 1), generator=generator)
    weights = {name: tensor.float().contiguous() for name, tensor in model.unet.state_dict().items()}
    golden |= train(model, scheduler, randn(1, 4, 3, 8, 8) * 0.8, randn(1, *text), noise, timesteps)

    save_file(weights, folder / "unet3d.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in golden.items()}, folder / "golden.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return golden


def video_norms(model):
    """The group norms that see a whole video."""
    resnets = [module for module in model.modules() if isinstance(module, ResnetBlock2D)]
    return [model.unet.conv_norm_out, *(norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2))]


def per_frame(forward):
    return lambda x: torch.stack([forward(frame) for frame in x.unbind(2)], dim=2)


def train(model, scheduler, latents, context, noise, timesteps):
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    draws = zip(noise.double(), timesteps, strict=True)
    steps = torch.tensor(list(tune(model, scheduler, latents.double, context.double(), draws)), dtype=torch.float64)
    after = model.unet.state_dict()
    trained = [name for name in before if any(part in name for part in TRAINED)]
    return {
        "train.latents": latents,
        "train.context": context,
        "train.noise": noise,
        "train.timesteps": timesteps,
        "train.loss": steps[:, 0],
        "train.grad_norm": steps[:, 1],
        **{f"train.update.{name}": (after[name] - before[name]).float() for name in trained},
    }
