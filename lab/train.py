"""Train the demo's models from nothing: autoencoder, classifier, text-to-image.

  python run.py train --out FOLDER [--minutes N]

Start it again to go on where it stopped; --minutes stops it in time. The finished models lie in FOLDER, beside
checkpoints and sample grids.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..demo import world
from ..tav_core.method import metrics
from ..tav_core.store.files import write_whole
from . import classifier, networks
from .optimizer import Muon, has_bfloat16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HELD_OUT = 1  # seed of the pictures that no training sees; training sees seed 0


@dataclass(frozen=True)
class Stage:
    """How long and how a model is trained.

    Attributes:
        pictures: how many different ones it sees.
        average: time constant of the averaged weights, in steps.
    """

    steps: int
    batch: int
    pictures: int
    lr: float
    average: int = 300


RECIPES = {
    "cpu": {
        "autoencoder": Stage(steps=1500, batch=16, pictures=3000, lr=2e-3, average=100),
        "classifier": Stage(steps=1200, batch=48, pictures=10000, lr=2e-3),
        "text_to_image": Stage(steps=6000, batch=16, pictures=12000, lr=2e-3),
        "open_colours": Stage(steps=700, batch=16, pictures=12000, lr=1e-3, average=100),
    },
    "cuda": {
        "autoencoder": Stage(steps=8000, batch=64, pictures=20000, lr=2e-3),
        "classifier": Stage(steps=6000, batch=256, pictures=50000, lr=2e-3),
        "text_to_image": Stage(steps=20000, batch=512, pictures=100000, lr=2e-3, average=1000),
        "open_colours": Stage(steps=2000, batch=512, pictures=100000, lr=1e-3, average=300),
    },
}


class OutOfTime(Exception):
    """The time that --minutes gives is over; a checkpoint has been written."""


# --- the loop that all stages share ---------------------------------------------------------------------------------


class Trainer:
    """A model in training, with everything that is needed to go on later.

    Args:
        file: the checkpoint, read if it exists.
        deadline: time.time() at which to stop.
    """

    def __init__(self, model: nn.Module, stage: Stage, file: Path, deadline: float):
        self.model, self.stage, self.file, self.deadline = model, stage, file, deadline
        self.step = 0
        self.optimizer = Muon(model.parameters(), lr=stage.lr)
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        if file.exists():
            state = torch.load(file, map_location=DEVICE, weights_only=True)
            self.step = state["step"]
            model.load_state_dict(state["model"])
            self.average = state["average"]
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"].cpu())
            if DEVICE.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())

    def save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if DEVICE.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        write_whole(self.file, partial(torch.save, state))

    def run(self, loss: Callable[[], Tensor], show: Callable[[], Any], every: float = 300) -> None:
        """Minimise `loss`; checkpoint and `show` every so many seconds. The model ends with its averaged weights."""
        last, losses = time.time(), []
        with tqdm(total=self.stage.steps, initial=self.step, desc=self.file.stem, mininterval=MININTERVAL) as bar:
            while self.step < self.stage.steps:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.stage.lr * self.schedule()
                value = loss()
                value.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                self.update_average()
                losses.append(value.detach())
                bar.update()
                if time.time() > min(last + every, self.deadline):
                    bar.set_postfix(loss=f"{torch.stack(losses).mean():.4f}")
                    last, losses = time.time(), []
                    self.save()
                    if time.time() > self.deadline:
                        raise OutOfTime
                    self.with_average(show)
        self.save()
        self.model.load_state_dict(self.average, strict=False)

    def schedule(self) -> float:
        """The learning rate's factor: a short rise, a plateau, and a fall to zero over the last third."""
        done = self.step / self.stage.steps
        return min((self.step + 1) / 200, 1.0, (1 - done) * 3)

    def update_average(self) -> None:
        # Early averages are short, so that the random start is soon forgotten.
        weight = max(1 / self.stage.average, 9 / (9 + self.step))
        for average, parameter in zip(self.average.values(), self.model.parameters(), strict=True):
            average.lerp_(parameter.detach(), weight)

    def with_average(self, show: Callable[[], Any]) -> None:
        """Call `show` while the model has its averaged weights."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.load_state_dict(self.average, strict=False)
        show()
        self.model.load_state_dict(own, strict=False)


# --- pictures -------------------------------------------------------------------------------------------------------


def _picture(index: int, seed: int) -> np.ndarray:
    return world.render(world.random_scene(seed, index))


def pictures(start: int, count: int, seed: int = 0, picture: Callable[[int, int], np.ndarray] = _picture) -> Tensor:
    """Rendered scenes, uint8 [count, 3, side, side]; on a GPU machine every core renders.

    Args:
        picture: from its number and the seed, uint8 [side, side, 3]; a function at the top of a module.
    """
    indices = range(start, start + count)
    if DEVICE.type == "cuda":
        with ProcessPoolExecutor() as pool:
            rendered = list(pool.map(partial(picture, seed=seed), indices, chunksize=64))
    else:
        rendered = [picture(index, seed) for index in tqdm(indices, "pictures", mininterval=MININTERVAL)]
    return torch.from_numpy(np.stack(rendered)).permute(0, 3, 1, 2)


def unit(pictures: Tensor) -> Tensor:
    """uint8 pictures as the models take them: float in 0 … 1, on the device."""
    return pictures.to(DEVICE).float().div(255).contiguous(memory_format=torch.channels_last)


def save_grid(rows: Sequence[Tensor], file: Path) -> None:
    """A PNG of rows of pictures, each [n, 3, h, w] in 0 … 1."""
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).float().clamp(0, 1)
    image = Image.fromarray((grid.permute(1, 2, 0).cpu().numpy() * 255).astype(np.uint8))
    write_whole(file, partial(image.save, format="PNG"))


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=has_bfloat16(DEVICE))


# --- autoencoder ----------------------------------------------------------------------------------------------------


def on_device(network: Any) -> Any:
    """The network where it trains, in the layout in which convolutions are fastest."""
    return network.to(DEVICE, memory_format=torch.channels_last)


def train_autoencoder(stage: Stage, out: Path, deadline: float) -> None:
    """Train on random quarters of pictures; then scale latents to unit variance in SD's latent format."""
    torch.manual_seed(0)
    vae = on_device(networks.new_vae())
    pool = pictures(0, stage.pictures)
    start_scale(vae, unit(pool[:64]))
    fit_autoencoder(vae, stage, out, deadline, pool, unit(pictures(0, 32, HELD_OUT)))


def fit_autoencoder(
    vae: networks.TAESD, stage: Stage, out: Path, deadline: float, pool: Tensor, held_out: Tensor
) -> None:
    """Train it on pictures, show it on others, and write it with its latents' scale.

    Args:
        pool: uint8 [n, 3, h, w]; a fourth channel, if there is one, is 255 where errors count three times.
        held_out: [n, 3, h, w] in 0 … 1.
    """
    trainer = Trainer(vae, stage, out / "autoencoder.pt", deadline)

    def loss() -> Tensor:
        picks = torch.randint(len(pool), (stage.batch,))
        x = unit(torch.stack([random_quarter(pool[i]) for i in picks]))
        x, weight = (x[:, :3], 1 + 2 * x[:, 3:]) if x.shape[1] > 3 else (x, 1)
        with autocast():
            latents = vae.taesd_encoder(x)
            y = vae.taesd_decoder(latents + 0.05 * torch.randn_like(latents)).float()
        latents = latents.float()
        error = weight * (y - x)
        # Errors between neighbours: what blur does to edges.
        edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
        spread = (latents.std((0, 2, 3)) - 1).square().mean() + latents.mean((0, 2, 3)).square().mean()
        colours = F.avg_pool2d(error, 8).abs().mean()
        return error.abs().mean() + 5 * error.square().mean() + 0.3 * edges + colours + 0.05 * spread

    def show() -> None:
        y = reconstruct(vae, held_out)
        tqdm.write(f"autoencoder step {trainer.step}: {metrics.psnr(y, held_out).mean():.2f} dB")
        save_grid([held_out[:8], y[:8], held_out[8:16], y[8:16]], out / "autoencoder.png")

    trainer.run(loss, show)
    show()
    with torch.inference_mode(), autocast():
        latents = vae.taesd_encoder(unit(pool[:512, :3])).float()
    with torch.no_grad():
        vae.vae_scale.copy_(networks.LATENT_SCALE * latents.std())
        vae.vae_shift.copy_(-latents.mean() / vae.vae_scale)
    write_whole(out / "vae.pt", partial(torch.save, vae.state_dict()))


def start_scale(vae: networks.TAESD, x: Tensor) -> None:
    """Latents of unit variance from the first step on."""
    with torch.no_grad():
        vae.taesd_encoder[-1].weight /= vae.taesd_encoder(x).std()


def random_quarter(picture: Tensor) -> Tensor:
    """A random part of half the picture's height and width, mirrored or not; [3, h, w] -> [3, h / 2, w / 2]."""
    half = picture.shape[-1] // 2
    top, left, mirror = torch.randint(half + 1, (3,)).tolist()
    part = picture[:, top : top + half, left : left + half]
    return part.flip(2) if mirror % 2 else part


@torch.inference_mode()
def reconstruct(vae: networks.TAESD, x: Tensor) -> Tensor:
    """Pictures through the autoencoder, 0 … 1 -> 0 … 1."""
    return torch.cat([vae.decode(vae.encode(part * 2 - 1)) for part in x.split(32)]).div(2).add(0.5).clamp(0, 1)


# --- classifier -----------------------------------------------------------------------------------------------------


def train_classifier(stage: Stage, out: Path, deadline: float) -> None:
    """Train on rendered pictures, made worse at random, and write it with its accuracy on pictures never seen."""
    torch.manual_seed(2)
    network = on_device(classifier.Classifier())
    trainer = Trainer(network, stage, out / "classifier.pt", deadline)
    pool, truth = pictures(0, stage.pictures), truths(0, stage.pictures, 0)
    held_out, held_out_truth = pictures(0, 1000, HELD_OUT), truths(0, 1000, HELD_OUT)

    def loss() -> Tensor:
        picks = torch.randint(len(pool), (stage.batch,))
        with autocast():
            seen = network(spoilt(unit(pool[picks])))
        *labels, place = (t[picks].to(DEVICE) for t in truth)
        wrong = sum(F.cross_entropy(scores.float(), label) for scores, label in zip(seen[:3], labels, strict=True))
        return wrong + 30 * (seen.place.float() - place).square().mean()

    @torch.inference_mode()
    def show() -> dict[str, str]:
        parts = [network(unit(part)) for part in held_out.split(100)]
        *labels, place = (t.to(DEVICE) for t in held_out_truth)
        best = [torch.cat(scores).argmax(1) for scores in zip(*(part[:3] for part in parts), strict=True)]
        right = [(a == b).float().mean().item() for a, b in zip(best, labels, strict=True)]
        away = (torch.cat([part.place for part in parts]) - place).norm(dim=1).mean().item() * world.SIDE
        report = {name: f"{share:.4f}" for name, share in zip(classifier.HEADS, right, strict=True)} | {
            "pixels_away": f"{away:.2f}"
        }
        tqdm.write(f"classifier step {trainer.step}, held-out accuracy: {report}")
        return report

    trainer.run(loss, show)
    network.half().float()  # judged as it is kept
    write_whole(out / "classifier.safetensors", lambda file: classifier.save(network, file, show()))


def truths(start: int, count: int, seed: int) -> list[Tensor]:
    """Object, background and style as class numbers [count], and centres [count, 2], of the pictures of `seed`."""
    scenes = [world.random_scene(seed, i) for i in range(start, start + count)]
    labels = ([names.index(getattr(scene, head)) for scene in scenes] for head, names in classifier.HEADS.items())
    return [*map(torch.tensor, labels), torch.tensor([(scene.x, scene.y) for scene in scenes])]


def spoilt(x: Tensor) -> Tensor:
    """Pictures with the faults of generated ones: half of them blurred, all a little off in colour, light and grain."""
    n = len(x)
    blurred = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
    x = x.lerp(blurred, (torch.rand(n, 1, 1, 1, device=x.device) * 1.6 - 0.8).clamp(min=0))
    contrast, light = (torch.rand(n, 3, 1, 1, device=x.device) for _ in range(2))
    x = (x - 0.5) * (0.85 + 0.3 * contrast) + 0.5 + 0.12 * (light - 0.5)
    return (x + 0.04 * torch.rand(n, 1, 1, 1, device=x.device) * torch.randn_like(x)).clamp(0, 1)


# --- text to image --------------------------------------------------------------------------------------------------


def train_text_to_image(stage: Stage, out: Path, deadline: float) -> None:
    """Train UNet and text encoder together to find the noise in noisy latents."""
    train_on_captions(stage, out, deadline, "text_to_image", 0)


def train_open_colours(stage: Stage, out: Path, deadline: float) -> None:
    """Go on with half of the captions not telling the object's colour, so that "a car" may be any."""
    train_on_captions(stage, out, deadline, "open_colours", 0.5, out / STAGES["text_to_image"][1])


def train_on_captions(
    stage: Stage, out: Path, deadline: float, name: str, colourless: float, start: Path | None = None
) -> None:
    """Train UNet and text encoder together, and write the finished model.

    Args:
        colourless: share of captions that leave the object's colour open.
        start: the model to go on from; None starts from nothing.
    """
    vae = on_device(networks.new_vae())
    vae.load_state_dict(torch.load(out / "vae.pt", map_location=DEVICE, weights_only=True))
    latents = encoded(vae, stage.pictures, out / "latents", 0)
    held_out = encoded(vae, 256, out / "latents_held_out", HELD_OUT)
    vocabulary = networks.Vocabulary(world.captions())
    rows = caption_rows(vocabulary, stage.pictures, 0)
    open_rows = caption_rows(vocabulary, stage.pictures, 0, world.colourless)
    held_out_rows = caption_rows(vocabulary, 256, HELD_OUT)

    torch.manual_seed(1)
    text, unet = networks.new_text_encoder(len(vocabulary)), networks.new_unet()
    if start is not None:
        networks.load(unet, text, start)

    def captioned() -> tuple[Tensor, Tensor]:
        picks = torch.randint(len(latents), (stage.batch,)).to(DEVICE)
        told = torch.rand(stage.batch, 1, device=DEVICE) >= colourless
        return latents[picks].float(), torch.where(told, rows[picks], open_rows[picks])

    prompts = [world.caption(o, b, s) for o, b, s in sample_prompts(open_colours=colourless > 0)]
    network = nn.ModuleDict({"text": text, "unet": unet})
    held_out_pairs = (held_out, held_out_rows)
    fit_captions(network, stage, out, deadline, name, captioned, held_out_pairs, vocabulary, vae, prompts)
    metadata = {"steps": str(stage.steps), "batch": str(stage.batch), "pictures": str(stage.pictures)}
    write_whole(out / STAGES[name][1], lambda file: networks.save(unet, text, vocabulary.ids, vae, file, metadata))


def fit_captions(
    network: nn.ModuleDict,
    stage: Stage,
    out: Path,
    deadline: float,
    name: str,
    captioned: Callable[[], tuple[Tensor, Tensor]],
    held_out_pairs: tuple[Tensor, Tensor],
    vocabulary: networks.Vocabulary,
    vae: networks.TAESD,
    prompts: list[str],
) -> None:
    """Train a "text" encoder and a "unet" together.

    Args:
        name: of the checkpoint and the sample grids in `out`.
        captioned: a batch of latents, float [b, 4, h, w], and of their captions' rows, [b, 77].
        held_out_pairs: latents and rows that are never trained on.
        prompts: what to sample for the grids, rows of eight.
    """
    network.to(DEVICE)
    text, unet = network["text"], network["unet"]
    trainer = Trainer(network, stage, out / f"{name}.pt", deadline)
    sigmas = sd_sigmas().to(DEVICE)
    held_out, held_out_rows = held_out_pairs
    empty = vocabulary.rows([""])[0].to(DEVICE)

    def predict(noisy: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The noise in latents of variance 1."""
        with autocast():
            context = networks.encode_text(text, tokens)
            return unet(noisy, timesteps.float(), context=context, transformer_options=networks.DIFFERENTIABLE).float()

    def errors(x: Tensor, tokens: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        sigma = sigmas[timesteps].view(-1, 1, 1, 1)
        predicted = predict((x + sigma * noise) / (1 + sigma**2).sqrt(), timesteps, tokens)
        return (predicted - noise).square().mean((1, 2, 3))

    def loss() -> Tensor:
        x, tokens = captioned()
        # A tenth without caption, for guidance; a hundredth of the words unknown.
        words = (tokens != tokens[:, -1:]) & (torch.arange(tokens.shape[1], device=DEVICE) > 0)
        unknown = words & (torch.rand(tokens.shape, device=DEVICE) < 0.01)
        tokens = tokens.masked_fill(unknown, len(vocabulary) - 1)
        tokens = torch.where(torch.rand(stage.batch, 1, device=DEVICE) < 0.1, empty, tokens)
        # One timestep from each equal part of the range.
        timesteps = (
            ((torch.arange(stage.batch) + torch.rand(stage.batch)) * len(sigmas) / stage.batch).long().to(DEVICE)
        )
        # Between the noise's error and the picture's, which is sigma**2 as large: every level then matters alike.
        return (sigmas[timesteps].clamp(max=8) * errors(x, tokens, timesteps, torch.randn_like(x))).mean()

    @torch.inference_mode()
    def show() -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(held_out.shape, generator=generator).to(DEVICE)
        timesteps = torch.linspace(0, len(sigmas) - 1, len(held_out)).long().to(DEVICE)
        parts = [i.to(DEVICE) for i in torch.randperm(len(held_out), generator=generator).split(32)]
        error = torch.cat([errors(held_out[i].float(), held_out_rows[i], timesteps[i], noise[i]) for i in parts]).mean()
        tqdm.write(f"{name} step {trainer.step}: error of the noise {error:.4f}")
        x = sample(predict, vocabulary.rows(prompts).to(DEVICE), empty, sigmas, noise[: len(prompts)])
        save_grid((vae.decode(x / networks.LATENT_SCALE) / 2 + 0.5).split(8), out / f"{name}_{trainer.step:06d}.png")

    trainer.run(loss, show)
    show()


@torch.inference_mode()
def encoded(
    vae: networks.TAESD,
    count: int,
    folder: Path,
    seed: int,
    picture: Callable[[int, int], np.ndarray] = _picture,
    part: int = 1000,
) -> Tensor:
    """Latents of the first `count` pictures as the UNet sees them, float16 [count, 4, h, w]; kept in `folder`."""
    folder.mkdir(exist_ok=True)
    for start in range(0, count, part):
        file = folder / f"{start:07d}.pt"
        if not file.exists():
            batches = pictures(start, min(part, count - start), seed, picture).split(50)
            with autocast():
                latents = torch.cat([vae.encode(unit(batch) * 2 - 1) for batch in batches])
            write_whole(file, partial(torch.save, (latents * networks.LATENT_SCALE).half().cpu()))
    files = sorted(folder.glob("*.pt"))
    return torch.cat([torch.load(file, weights_only=True) for file in files])[:count].to(DEVICE)


def caption_rows(
    vocabulary: networks.Vocabulary, count: int, seed: int, called: Callable[[str], str] = lambda object: object
) -> Tensor:
    """Vocabulary rows of the captions of the first `count` pictures, [count, 77]; `called` names their objects."""
    number = {caption: i for i, caption in enumerate(world.captions())}
    scenes = (world.random_scene(seed, i) for i in range(count))
    captions = [number[replace(scene, object=called(scene.object)).caption] for scene in scenes]
    return vocabulary.rows(number)[captions].to(DEVICE)


def sd_sigmas() -> Tensor:
    """Stable Diffusion's noise levels, ascending, [1000]."""
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    return ((1 - kept) / kept).sqrt().float()


def sample_prompts(open_colours: bool) -> list[tuple[str, str, str]]:
    """Each object once, with backgrounds and styles in turn, and one more to fill the grid.

    Args:
        open_colours: names without a colour instead.
    """
    objects = [world.colourless(object) if open_colours else object for object in (*world.OBJECTS, world.OBJECTS[0])]
    return list(zip(objects, list(world.BACKGROUNDS) * 2, ["plain", "sketch", "plain", "sunset"] * 4, strict=True))


def sample(
    predict: Callable[..., Tensor],
    tokens: Tensor,
    empty: Tensor,
    sigmas: Tensor,
    x: Tensor,
    steps: int = 30,
    cfg: float = 5,
) -> Tensor:
    """Latents from noise x [n, 4, h, w] by DDIM with classifier-free guidance."""
    tokens = torch.cat([empty.expand_as(tokens), tokens])
    timesteps = torch.linspace(len(sigmas) - 1, 0, steps + 1).long().tolist()
    x = x * sigmas[-1]
    levels = torch.cat([sigmas[timesteps[:-1]], sigmas.new_zeros(1)])
    for i, now in enumerate(timesteps[:-1]):
        noisy = (x / (1 + levels[i] ** 2).sqrt()).repeat(2, 1, 1, 1)
        without, given = predict(noisy, torch.full((len(noisy),), now, device=x.device), tokens).chunk(2)
        noise = without + cfg * (given - without)
        x = x + (levels[i + 1] - levels[i]) * noise
    return x


STAGES = {  # and the file that each leaves behind
    "autoencoder": (train_autoencoder, "vae.pt"),
    "classifier": (train_classifier, "classifier.safetensors"),
    "text_to_image": (train_text_to_image, "colours_told.safetensors"),
    "open_colours": (train_open_colours, "model.safetensors"),
}


def main() -> None:
    run_stages(STAGES, RECIPES, __doc__)


def run_stages(
    stages: dict[str, tuple[Callable[[Stage, Path, float], Any], str]],
    recipes: dict[str, dict[str, Stage]],
    description: str | None,
) -> None:
    """The command line of a training: each stage by name, with the file that it leaves behind; what is there stays."""
    parser = argparse.ArgumentParser(
        prog="run.py train", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many minutes, to be resumed")
    parser.add_argument("--stages", nargs="+", choices=stages, default=list(stages))
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    deadline = time.time() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.stages:
            train, product = stages[name]
            if not (args.out / product).exists():
                train(recipes[DEVICE.type][name], args.out, deadline)
    except OutOfTime:
        print("Stopped in time; the same command goes on from here.")


MININTERVAL = 0.5 if sys.stderr.isatty() else 30
if __name__ == "__main__":
    main()
