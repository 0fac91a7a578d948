"""Stable Diffusion XL on the host's own classes: its topology, narrow, of random weights."""

import faulthandler
import itertools
import re
import time
from types import SimpleNamespace

import comfy.cli_args
import comfy.model_base
import comfy.supported_models
import folder_paths
import measure
import pytest
import torch
from checkpoint import write_xl_checkpoint
from comfy.sdxl_clip import SDXLTokenizer
from equal import same_weights
from pack import PROJECT
from small import FULL_XL, SHALLOW_XL, XL, build_xl, meta_unet
from tune_a_video.nodes import DDIMInvert, ExportPublished, InflateUNet, LoadPublished, OneShotTune, SampleVideo
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import memory, tuning
from tune_a_video.tav_core.method.guidance import Steering
from tune_a_video.tav_core.method.inflation import LAYERS, LIGHT, TemporalLayers
from tune_a_video.tav_core.method.low_rank import LowRankQueries
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.method.windows import Windows
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights, check_base
from tune_a_video.tav_core.pipeline.network import TrainingUNet, estimate_step
from tune_a_video.tav_core.pipeline.one_shot import Saving, Validation, one_shot_tune
from tune_a_video.tav_core.store.weights import load_file, save_file


def blank(config):
    """A MODEL of the host's SDXL class without weights."""
    supported = comfy.supported_models.SDXL({**config})
    supported.unet_config = {**config, "dtype": torch.float32}
    cpu = torch.device("cpu")
    return host.ModelPatcher(comfy.model_base.SDXL(supported, device=torch.device("meta")), cpu, cpu)


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return build_xl()


@pytest.fixture
def inflated(model, request):
    return host.inflate(model, "video", layers=getattr(request, "param", "auto"))


@pytest.fixture
def prompts():
    """Two CONDITIONINGs as CLIP Text Encode makes them for SDXL, narrow."""
    generator = torch.Generator().manual_seed(2)
    return [
        [[torch.randn(1, 7, 16, generator=generator), {"pooled_output": torch.randn(1, 16, generator=generator)}]]
        for _ in range(2)
    ]


@pytest.fixture
def clip():
    """LATENT of three frames, no square."""
    return {"samples": torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(1)) * 5}


def tuned(model, clip, caption, steps=2, **options):
    with torch.inference_mode():
        return one_shot_tune(
            model, clip, caption, Recipe(steps, learning_rate=1e-3), "fp32", "nothing", lambda _step: None, **options
        )


@pytest.mark.parametrize("group_norm", ["video", "per_frame"])
@pytest.mark.parametrize("sizes", [{}, {"width": 1024, "height": 640, "crop_w": 8, "target_width": 512}])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_training_network_computes_what_the_host_computes(model, clip, prompts, group_norm, sizes, batch):
    """With temporal layers that do something, and all of the conditioning, encoded by the host's own sampling."""
    layers = TemporalLayers(host.parts_of(host.unet_of(model)))
    generator = torch.Generator().manual_seed(4)
    layers.assign({name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in layers.named().items()})
    inflated = host.with_inflation(model, host.Inflation(layers, group_norm))
    [[text, options]] = prompts[0]
    text, pooled = (
        text.repeat(batch, 1, 1),
        torch.randn(batch, *options["pooled_output"].shape[1:], generator=generator),
    )
    caption = [[text, {**options, "pooled_output": pooled, **sizes}]]
    noisy, sigma = clip["samples"], host.model_sigmas(model)[500]
    taken = []

    def capture(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        taken.append((x, x - denoise(x, sigmas[0].expand(len(x)), **extra_args)))
        return x

    sigmas = torch.tensor([sigma, 0])
    with torch.inference_mode():
        host.run_sampler(host.unguided(inflated, caption), noisy, sigmas, lambda *_: None, sampler=capture)
    [(x, difference)] = taken
    theirs = difference / sigma  # epsilon
    own_x = x / (1 + sigma**2) ** 0.5

    with torch.inference_mode(False), torch.no_grad():
        vector = host.vector_of(inflated, caption, noisy)
        network = TrainingUNet(host.video_of(inflated), 3, "fp32", "nothing", text, vector)
        ours = network(own_x.clone(), torch.tensor(500))
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5


def test_the_vector_matters(model, clip, prompts):
    [[text, options]] = prompts[0]
    plain = host.vector_of(model, [[text, options]], clip["samples"])
    assert plain.shape == (1, XL["adm_in_channels"])
    given = {"width": 96, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 96, "target_height": 64}
    assert torch.equal(plain, host.vector_of(model, [[text, {**options, **given}]], clip["samples"]))  # the clip's
    assert not torch.equal(plain, host.vector_of(model, [[text, {**options, "crop_w": 8}]], clip["samples"]))


@pytest.mark.parametrize("inflated", LAYERS, indirect=True)
def test_tune_apply_invert_and_sample(inflated, clip, prompts, unchanged):
    negative, positive = prompts
    with unchanged(inflated):
        weights = tuned(inflated, clip, positive)
        applied = apply_weights(inflated, weights)
        with torch.inference_mode():
            inverted, _noise, _sigmas = editing.invert(applied, clip, negative, 2)
            edit = editing.sample_video(applied, inverted, positive, negative, 2, 5.0)
    assert edit["samples"].shape == clip["samples"].shape and edit["samples"].isfinite().all()


def test_structure_is_shared_with_the_source(inflated, clip, prompts):
    """The source's prompt has a vector of its own."""
    negative, positive = prompts
    with torch.inference_mode():
        inverted, *_ = editing.invert(inflated, clip, negative, 2)
        plain, steered = (
            editing.sample_video(inflated, inverted, positive, negative, 2, 5.0, steering=steering)["samples"]
            for steering in (editing.PLAIN, Steering(structure=0.5))
        )
    assert steered.isfinite().all() and not torch.equal(plain, steered)


def test_words_are_found_by_sdxls_tokenizer():
    clip = SimpleNamespace(tokenize=SDXLTokenizer().tokenize_with_weights)
    assert host.positions(clip, "a red car on the beach", "red car") == [2, 3]
    with pytest.raises(ValueError, match="the word 'boat' is not in the caption"):
        host.positions(clip, "a red car on the beach", "boat")


def test_the_papers_layers_can_be_published(model, clip, prompts, folder):
    learned = tuned(host.inflate(model, "video", layers="paper"), clip, prompts[0], 1)
    (name,) = ExportPublished.execute(model, learned, "xl").result
    weights, report = LoadPublished.execute(model, name).result
    assert same_weights(weights, learned) and "140 queries and 490 temporal tensors were read" in report


def test_windows_cut_the_vector_as_the_frames(model, prompts):
    """One pooled text a frame, which its window's call gets."""
    clip = {"samples": torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 5}
    [[text, _options]] = prompts[0]
    generator = torch.Generator().manual_seed(5)
    pooled = torch.randn(7, 16, generator=generator)
    each = [[text.repeat(7, 1, 1), {"pooled_output": pooled}]]
    inflated = host.inflate(model, "video", Windows(4, 1))
    inner = []
    label = inflated.model.diffusion_model.label_emb
    watch = label.register_forward_pre_hook(lambda _m, args: inner.append(args[0]))
    try:
        with torch.inference_mode():
            out = editing.invert(inflated, clip, each, 1)[0]["samples"]
    finally:
        watch.remove()
    assert out.isfinite().all()
    windows = Windows(4, 1).of(7)
    assert [len(y) for y in inner] == [len(window) for window in windows]
    for y, window in zip(inner, windows, strict=True):
        assert torch.equal(y[:, :16], pooled[list(window)].to(y))


def test_a_tune_in_windows(model, clip, prompts):
    clip = {"samples": clip["samples"].repeat(2, 1, 1, 1)}
    inflated = host.inflate(model, "video", Windows(4, 1))
    assert tuned(inflated, clip, prompts[0]).windows == Windows(4, 1)
    [[text, options]] = prompts[0]
    each = [[text, {"pooled_output": options["pooled_output"].repeat(6, 1)}]]
    with pytest.raises(ValueError, match="caption has one prompt for each frame, which a tune in windows cannot use"):
        tuned(inflated, clip, each)


def test_what_the_caption_says_beside_its_tokens_is_learned(inflated, clip, prompts):
    [[text, options]] = prompts[0]
    plain = tuned(inflated, clip, [[text, options]])
    assert same_weights(plain, tuned(inflated, clip, [[text, {**options, "width": 96, "height": 64}]]))
    for other in ({"width": 2048}, {"pooled_output": torch.zeros(1, 16)}):
        assert not same_weights(plain, tuned(inflated, clip, [[text, {**options, **other}]]))
    with pytest.raises(ValueError, match="caption carries area, which tuning cannot use"):
        tuned(inflated, clip, [[text, {**options, "area": (8, 8, 0, 0)}]])


@pytest.mark.parametrize(
    ("pooled", "message"),
    [
        ({}, "and has none"),
        ({"pooled_output": None}, "and has none"),
        ({"pooled_output": torch.zeros(1, 8)}, r"and has one of shape \(1, 8\)"),
        ({"pooled_output": torch.zeros(2, 16)}, r"and has one of shape \(2, 16\)"),
    ],
)
def test_a_prompt_of_another_clip(inflated, clip, prompts, pooled, message):
    wrong = [[prompts[0][0][0], pooled]]
    with pytest.raises(ValueError, match=f"caption must come with the text's pooled output .* {message}: encode it"):
        tuned(inflated, clip, wrong)
    with torch.inference_mode(), pytest.raises(ValueError, match=f"prompt must come with .* {message}"):
        editing.invert(inflated, clip, wrong, 2)


def test_a_preview_without_a_negative_prompt(inflated, clip, prompts):
    shown, told = [], []
    validation = Validation(prompts[1], None, 1, lambda step, frames: shown.append((step, len(frames))))
    tuned(inflated, clip, prompts[0], 1, validation=validation, tell=told.append)
    assert shown == [(1, 3)] and not told


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (comfy.model_base.SDXLRefiner, "is the SDXL refiner"),
        (comfy.model_base.SVD_img2vid, "is Stable Video Diffusion"),
        (comfy.model_base.SD21UNCLIP, "is unCLIP"),
        (comfy.model_base.BaseModel, "is a BaseModel with extra conditioning"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the host's own
def test_relatives_are_refused_by_name(kind, name):
    kinds = {"noise_aug_config": {"noise_schedule_config": {"timesteps": 1000}, "timestep_dim": 16}}
    build = (lambda *args: kind(*args, **kinds)) if kind is comfy.model_base.SD21UNCLIP else kind
    with pytest.raises(ValueError, match=rf"{name}\. Tune-A-Video needs a Stable Diffusion 1.x, 2.x or XL checkpoint"):
        InflateUNet.execute(build_xl(kind=build), "video")


def test_saved_weights_are_the_same_to_the_bit(inflated, clip, prompts, tmp_path):
    weights = tuned(inflated, clip, prompts[0])
    save_file(weights, tmp_path / "weights.safetensors", "fp32")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert same_weights(weights, loaded)
    check_base(inflated, loaded)
    with torch.inference_mode():
        noise = {"samples": 20 * torch.randn(3, 4, 8, 12)}
        first, second = (
            editing.sample_video(apply_weights(inflated, w), noise, *prompts, 2, 5.0)["samples"]
            for w in (weights, loaded)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("inflated", LAYERS, indirect=True)
def test_a_tune_goes_on_where_it_stopped(inflated, clip, prompts, tmp_path):
    whole = tuned(inflated, clip, prompts[0], 4)
    told = []
    for steps in (2, 4):
        parts = tuned(inflated, clip, prompts[0], steps, saving=Saving(tmp_path), tell=told.append)
    assert told == ["resumed after step 2"] and same_weights(whole, parts) and whole.losses == parts.losses
    # Of another pooled text and the same tokens there is nothing saved.
    [[text, options]] = prompts[0]
    tuned(
        inflated,
        clip,
        [[text, {"pooled_output": -options["pooled_output"]}]],
        saving=Saving(tmp_path),
        tell=told.append,
    )
    assert len(told) == 1


def test_families_are_told_apart(make_model, make_weights, model):
    whole = blank(FULL_XL)
    assert host.family_of(whole) == "Stable Diffusion XL (epsilon)"
    of_sd1 = make_weights(make_model(), base_family="Stable Diffusion 1.x (epsilon)")
    with pytest.raises(
        ValueError, match=r"on Stable Diffusion 1\.x \(epsilon\), this MODEL is Stable Diffusion XL \(eps"
    ):
        check_base(whole, of_sd1)
    with pytest.raises(ValueError, match="belong to another UNet"):
        apply_weights(model, of_sd1)


def test_light_trains_58_million_parameters_and_the_papers_choice_614():
    assert host.inflation_of(host.inflate(build_xl(), "video")).layers == LIGHT
    parts = host.parts_of(meta_unet(FULL_XL))
    counts = {}
    for layers in LAYERS:
        names = dict(meta_unet(FULL_XL).named_parameters()) | TemporalLayers(parts, "meta", layers).named()
        names |= LowRankQueries(parts, "meta").named() if layers == LIGHT else {}
        counts[layers] = sum(p.numel() for name, p in names.items() if tuning.trains(name, layers))
    assert {layers: round(count / 1e6, 1) for layers, count in counts.items()} == {"paper": 614.5, "light": 58.2}


@pytest.mark.parametrize(
    ("layers", "precision", "recompute"),
    [("light", "fp32", "nothing"), ("light", "bf16", "all"), ("paper", "bf16", "all")],
)
def test_the_estimate_is_what_a_tune_takes(prompts, layers, precision, recompute):
    inflated = host.inflate(build_xl(SHALLOW_XL), "video", layers=layers)
    shape = torch.Size((4, 4, 16, 24))

    def tune():
        latents = {"samples": torch.randn(shape)}
        one_shot_tune(inflated, latents, prompts[1], Recipe(2), precision, recompute, lambda _step: None)

    estimate = estimate_step(host.video_of(inflated), shape, 7, precision, recompute)
    assert estimate.total == pytest.approx(measure.peak(inflated.load_device, tune), rel=0.15)


def test_what_the_readme_promises_of_sdxl(monkeypatch):
    """By the estimate only: 16 frames in low, as on a GPU."""
    model = host.inflate(blank(FULL_XL), "video")
    monkeypatch.setattr(model, "load_device", torch.device("cuda"))
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    [(side, promised)] = re.findall(r"\| (768) . 768 \| ([\d.]+) GiB \|", readme)
    shape = torch.Size((16, 4, int(side) // 8, int(side) // 8))
    estimate = estimate_step(host.video_of(model), shape, 77, "bf16", "all")
    assert estimate.total * memory.HEADROOM / memory.GIB == pytest.approx(float(promised), rel=0.03)


def test_sdxl_of_full_size(request, core, tmp_path, monkeypatch):
    """Through the host's loaders and nodes: a tune, an inversion and an edit of one step, 2 frames of 64 x 64, bf16."""
    if not request.config.getoption("--full-size"):
        pytest.skip("needs --full-size, 16 GiB of memory and some minutes")
    import resource  # not on Windows

    faulthandler.cancel_dump_traceback_later()
    write_xl_checkpoint(tmp_path / "sdxl.ckpt")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".ckpt"}))
    monkeypatch.setattr(comfy.cli_args.args, "bf16_unet", True)
    times = [("start", time.monotonic())]

    def run(name, node, method, *args, **kwargs):
        out = getattr(node, method)(*args, **kwargs)
        times.append((name, time.monotonic()))
        return getattr(out, "result", out)

    with torch.inference_mode():
        model, text, vae = run("load", core["CheckpointLoaderSimple"](), "load_checkpoint", "sdxl.ckpt")[:3]
        assert type(model.model) is comfy.model_base.SDXL and model.model.get_dtype() == torch.bfloat16
        prompts = [run("encode", core["CLIPTextEncode"](), "encode", text, words)[0] for words in ("", "a man skis")]
        frames = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        (latents,) = core["VAEEncode"]().encode(vae, frames)
        model = model.clone()
        model.set_model_compute_dtype(torch.bfloat16)
        (inflated,) = run("inflate", InflateUNet, "execute", model, "video")
        inputs = inflated, latents, prompts[1], 1, 3e-5, 33, "bf16", 0.01, 1.0
        tuned, weights, *_ = run("tune", OneShotTune, "execute", *inputs)
        inverted, *_ = run("invert", DDIMInvert, "execute", tuned, latents, prompts[0], 1)
        (edit,) = run("sample", SampleVideo, "execute", tuned, inverted, prompts[1], prompts[0], 1, 7.5)
        (pictures,) = core["VAEDecode"]().decode(vae, edit)
    assert weights.base_family == "Stable Diffusion XL (epsilon)" and weights.layers == LIGHT
    assert round(sum(t.numel() for t in (*weights.queries.values(), *weights.temporal.values())) / 1e6) == 58
    assert pictures.shape == frames.shape and pictures.isfinite().all()
    size = (tmp_path / "sdxl.ckpt").stat().st_size / 1e6
    seconds = ", ".join(f"{name} {end - start:.0f} s" for (_, start), (name, end) in itertools.pairwise(times))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"checkpoint {size:.0f} MB; {seconds}; peak {peak:.1f} GiB")
