"""Compare this pack with the reference implementation's golden numbers, through the host's own UNet.

    python run.py parity FOLDER…

A folder holds a published Tune-A-Video UNet (`config.json`, `unet3d.safetensors`) and `golden.safetensors`: what
the reference computed with it. Prints one line a figure, the relative L2 distance to it, and exits with 1 when
one is past its tolerance. `published.roundtrip` is what a tune loses by being exported as a published model and read
again: nothing.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from einops import rearrange
from pack import load_pack
from safetensors.torch import load_file

load_pack()
from tune_a_video.tav_core import ddim, editing, host, library, published  # noqa: E402
from tune_a_video.tav_core.inflation import TemporalLayers  # noqa: E402
from tune_a_video.tav_core.one_shot import one_shot_tune  # noqa: E402
from tune_a_video.tav_core.tuning import Recipe, trains  # noqa: E402

TOLERANCES = {"forward": 2e-6, "inversion": 1e-5, "sampling": 1e-4, "loss": 1e-5, "grad_norm": 1e-5, "update": 5e-3}
TOLERANCES["roundtrip"] = 0.0


def main(folders: list[str]) -> int:
    if not folders:
        print("parity: name one folder or more, with config.json, unet3d.safetensors and golden.safetensors in it.")
        return 2
    failed = 0
    for folder in folders:
        missing = [
            name
            for name in ("config.json", "unet3d.safetensors", "golden.safetensors")
            if not (Path(folder) / name).is_file()
        ]
        if missing:
            print(f"parity: {folder} has no {', '.join(missing)}: it is not a parity folder.")
            return 2
        print(f"# {folder}")
        for name, error in figures(Path(folder)):
            limit = TOLERANCES[next(kind for kind in TOLERANCES if kind in name)]
            ok = error <= limit  # also false for NaN
            failed += not ok
            print(f"{name} {error:.1e}{'' if ok else f'  FAILED, the tolerance is {limit:.0e}'}", flush=True)
    print(f"{failed} figures out of tolerance" if failed else "all figures within tolerance")
    return int(failed > 0)


def figures(folder: Path):
    """Yield (name, relative L2 error) of everything that the folder's golden numbers cover."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    golden = load_file(folder / "golden.safetensors")
    names = host.published_names(published.unet_config(config))
    base, temporal_weights = published.split(load_file(folder / "unet3d.safetensors"), names)
    model = host.build_model(
        published.unet_config(config),
        base,
        config.get("prediction_type", "epsilon"),
        published.heads_per_block(config, names),
    )
    temporal = TemporalLayers(host.parts_of(host.unet_of(model)))
    temporal.assign(temporal_weights)
    models = {mode: host.with_inflation(model, host.Inflation(temporal, mode)) for mode in ("video", "per_frame")}
    yield from forward(models, golden)
    yield from loops(models["video"], golden)
    own_names = {own: name for name, own in published.all_names(names).items()}
    for recompute in ("nothing", "all"):
        tuned = yield from training(models["video"], golden, own_names, recompute)
    yield "published.roundtrip", roundtrip(model, tuned)


def forward(models, golden):
    for case in sorted({key.split(".")[1] for key in golden if key.startswith("forward.")}):
        data = {key.split(".")[2]: tensor for key, tensor in golden.items() if key.startswith(f"forward.{case}.")}
        videos, frames = data["latents"].shape[0], data["latents"].shape[2]
        for mode, suffix in (("video", "out"), ("per_frame", "out_per_frame_groupnorm")):
            with torch.inference_mode():
                out = call_unet(
                    models[mode],
                    fold(data["latents"]),
                    data["timesteps"].repeat_interleave(frames),
                    data["context"].repeat_interleave(frames, dim=0),
                    videos,
                )
            expected = fold(data[suffix])
            yield f"forward.{case}{'' if mode == 'video' else '.' + mode}", distance(out, expected)


def call_unet(model, x, timesteps, context, videos):
    """One call of the host's UNet with the model's wrappers, as its sampler makes it."""
    host.load(model)
    options = {"wrappers": model.wrappers, "cond_or_uncond": list(range(videos))}
    device = model.load_device
    unet = model.model.diffusion_model
    return unet(x.to(device), timesteps.to(device), context=context.to(device), transformer_options=options)


def loops(model, golden):
    steps = golden["ddim.timesteps"].numel()
    if not torch.equal(ddim.ddim_timesteps(steps), golden["ddim.timesteps"].sort().values.long()):
        raise ValueError("the golden loops have other timesteps than DDIM with an offset of 1")
    sigmas = ddim.ddim_sigmas(host.model_sigmas(model), steps)
    uncond, cond = [[golden["ddim.uncond"], {}]], [[golden["ddim.cond"], {}]]
    into, out_of = model.model.process_latent_in, model.model.process_latent_out

    def record(trace, levels):
        # Golden latents have the scale of their level, the host's samplers work in sigma space.
        return lambda i, _denoised, x, _n: trace.append(x.cpu() / (1 + levels[i] ** 2).sqrt())

    trace: list[torch.Tensor] = []
    latent = {"samples": out_of(fold(golden["ddim.x0"]))}
    with torch.inference_mode():
        inverted, _, _ = editing.invert(model, latent, uncond, steps, record(trace, sigmas))
    trace.append(into(inverted["samples"]) / (1 + sigmas[-1] ** 2).sqrt())
    yield (
        "ddim.inversion",
        max(distance(ours, fold(theirs)) for ours, theirs in zip(trace, golden["ddim.inversion"], strict=True)),
    )

    # From the reference's own noise, so that the two figures are independent.
    start = fold(golden["ddim.inversion"][-1]).float() * (1 + sigmas[-1] ** 2).sqrt()
    trace = []
    with torch.inference_mode():
        latent = {"samples": out_of(start), host.KEY: {"steps": steps}}
        final = editing.sample_video(model, latent, cond, uncond, steps, 12.5, record(trace, sigmas.flip(0)))
    trace = [*trace[1:], into(final["samples"])]
    yield (
        "ddim.sampling_cfg12.5",
        max(distance(ours, fold(theirs)) for ours, theirs in zip(trace, golden["ddim.sampling_cfg12.5"], strict=True)),
    )


def training(model, golden, names, recompute):
    noises, timesteps = [fold(noise) for noise in golden["train.noise"]], golden["train.timesteps"].flatten().tolist()
    steps = []
    weights = one_shot_tune(
        model,
        {"samples": model.model.process_latent_out(fold(golden["train.latents"]))},
        [[golden["train.context"], {}]],
        Recipe(steps=len(golden["train.loss"])),
        "fp32",
        recompute,
        steps.append,
        lambda: zip(noises, timesteps, strict=True),
    )
    prefix = "train.checkpointed." if recompute == "all" else "train."
    for step, loss, norm in zip(steps, golden["train.loss"], golden["train.grad_norm"], strict=True):
        yield f"{prefix}loss.{step.number}", abs(step.loss - float(loss)) / float(loss)
        yield f"{prefix}grad_norm.{step.number}", abs(step.grad_norm - float(norm)) / float(norm)
    start = host.inflation_of(model).temporal.named()
    updates = dict(weights.queries)
    updates |= {name: tensor - start[name].cpu() for name, tensor in weights.temporal.items() if trains(name)}
    expected = {key.removeprefix("train.update."): t for key, t in golden.items() if key.startswith("train.update.")}
    ours = {names[name]: tensor for name, tensor in updates.items()}
    if ours.keys() != expected.keys():
        raise ValueError(f"other tensors train than in the reference: {sorted(ours.keys() ^ expected.keys())[:3]}")
    yield f"{prefix}update", distance(*(flat(tensors) for tensors in (ours, expected)))
    return weights


def roundtrip(model, weights):
    """How far tuned weights are from themselves after export and import."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        library.write_published(model, weights, Path(folder))
        back, _ = library.read_published(model, Path(folder))
    return max(distance(flat(getattr(back, part)), flat(getattr(weights, part))) for part in ("queries", "temporal"))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All tensors as one vector, in the order of their names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def fold(latents: torch.Tensor) -> torch.Tensor:
    return rearrange(latents, "b c f h w -> (b f) c h w")


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance, in float64."""
    ours, theirs = ours.double().cpu(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
