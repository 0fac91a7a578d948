"""Compare this pack with the reference implementation's golden numbers, through the host's own UNet.

    python run.py parity FOLDER…

A folder holds a published Tune-A-Video UNet (`config.json`, `unet3d.safetensors`) and `golden.safetensors`: what
the reference computed with it. Prints one line a figure, the relative L2 distance to it, and exits with 1 when
one is past its tolerance. Figures for which the folder has no numbers are skipped, by name. `published.roundtrip` is
what a tune loses by being exported as a published model and read again: nothing.
"""

import json
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from einops import rearrange
from measure import distance
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent.parent / "tools"))
from pack import load_pack

load_pack()
from tune_a_video.tav_core import host  # noqa: E402
from tune_a_video.tav_core.method import ddim  # noqa: E402
from tune_a_video.tav_core.method.inflation import TemporalLayers  # noqa: E402
from tune_a_video.tav_core.method.tuning import Draw, Recipe, trains  # noqa: E402
from tune_a_video.tav_core.pipeline import editing, library  # noqa: E402
from tune_a_video.tav_core.pipeline.one_shot import one_shot_tune  # noqa: E402
from tune_a_video.tav_core.store import published  # noqa: E402

TOLERANCES = {"forward": 2e-6, "inversion": 1e-5, "sampling": 1e-4, "loss": 1e-5, "grad_norm": 1e-5, "update": 5e-3}
TOLERANCES["roundtrip"] = 0.0
LOOPS = ("ddim.timesteps", "ddim.x0", "ddim.uncond", "ddim.cond", "ddim.inversion")  # the last is where sampling starts
TUNING = ("train.noise", "train.timesteps", "train.latents", "train.context")


def main(folders: list[str]) -> int:
    if not folders:
        print("parity: name one folder or more, with config.json, unet3d.safetensors and golden.safetensors in it.")
        return 2
    failed = compared = skipped = 0
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
            if isinstance(error, str):
                skipped += 1
                print(f"{name} skipped: golden.safetensors has no {error}", flush=True)
                continue
            compared += 1
            limit = TOLERANCES[next(kind for kind in TOLERANCES if kind in name)]
            ok = error <= limit  # also false for NaN
            failed += not ok
            print(f"{name} {error:.1e}{'' if ok else f'  FAILED, the tolerance is {limit:.0e}'}", flush=True)
    if not compared:
        print("parity: nothing was compared.")
        return 1
    result = f"{failed} figures out of tolerance" if failed else f"all {compared} figures within tolerance"
    print(f"{result}, {skipped} skipped" if skipped else result)
    return int(failed > 0)


def figures(folder: Path):
    """Yield (name, relative L2 error) of each figure, or (name, what the folder's golden numbers lack for it)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    golden = load_file(folder / "golden.safetensors")
    names = host.published_names(published.to_unet_config(config))
    base, temporal_weights = published.to_unet(load_file(folder / "unet3d.safetensors"), names)
    model = host.build_model(
        published.to_unet_config(config),
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
    yield "published.roundtrip", roundtrip(model, tuned) if tuned else missing(golden, *TUNING)


def missing(golden, *names: str) -> str:
    """Which of these names the golden numbers lack, in words."""
    return ", ".join(name for name in names if not any(f"{key}.".startswith(f"{name}.") for key in golden))


def forward(models, golden):
    cases = sorted({key.split(".")[1] for key in golden if key.startswith("forward.")})
    for case, mode in product(cases, models):
        name = f"forward.{case}{'' if mode == 'video' else '.' + mode}"
        suffix = "out" if mode == "video" else "out_per_frame_groupnorm"
        needs = [f"forward.{case}.{part}" for part in ("latents", "timesteps", "context", suffix)]
        if lacks := missing(golden, *needs):
            yield name, lacks
            continue
        latents, timesteps, context, expected = (golden[need] for need in needs)
        videos, frames = latents.shape[0], latents.shape[2]
        with torch.inference_mode():
            out = call_unet(
                models[mode],
                fold(latents),
                timesteps.repeat_interleave(frames),
                context.repeat_interleave(frames, dim=0),
                videos,
            )
        yield name, distance(out, fold(expected))


def call_unet(model, x, timesteps, context, videos):
    """One call of the host's UNet with the model's wrappers, as its sampler makes it."""
    host.load(model)
    options = {"wrappers": model.wrappers, "cond_or_uncond": list(range(videos))}
    device = model.load_device
    unet = model.model.diffusion_model
    return unet(x.to(device), timesteps.to(device), context=context.to(device), transformer_options=options)


def loops(model, golden):
    if lacks := missing(golden, *LOOPS):
        yield from ((name, lacks) for name in ("ddim.inversion", "ddim.sampling_cfg12.5"))
        return
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

    if lacks := missing(golden, "ddim.sampling_cfg12.5"):
        yield "ddim.sampling_cfg12.5", lacks
        return
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
    prefix = "train.checkpointed." if recompute == "all" else "train."
    if lacks := missing(golden, *TUNING):
        yield from ((f"{prefix}{kind}", lacks) for kind in ("loss", "grad_norm", "update"))
        return None
    noises, timesteps = [fold(noise) for noise in golden["train.noise"]], golden["train.timesteps"].flatten().tolist()
    steps = []
    weights = one_shot_tune(
        model,
        {"samples": model.model.process_latent_out(fold(golden["train.latents"]))},
        [[golden["train.context"], {}]],
        Recipe(steps=len(noises)),
        "fp32",
        recompute,
        steps.append,
        lambda: map(Draw, noises, timesteps),
    )
    for kind in ("loss", "grad_norm"):
        if lacks := missing(golden, f"train.{kind}"):
            yield f"{prefix}{kind}", lacks
            continue
        for step, theirs in zip(steps, golden[f"train.{kind}"].tolist(), strict=True):
            yield f"{prefix}{kind}.{step.number}", abs(getattr(step, kind) - theirs) / theirs
    if lacks := missing(golden, "train.update"):
        yield f"{prefix}update", lacks
        return weights
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
