"""Published models, in and out."""

import json
import logging
import pickle
import shutil
import struct
import zipfile
from dataclasses import replace

import comfy.model_base
import comfy.model_detection
import pytest
import torch
from baseline import SD15, VideoUNet
from comfy.model_patcher import ModelPatcher
from diffusers import UNet2DConditionModel
from equal import same_weights
from safetensors.torch import load_file, save_file
from small import TINY, meta_unet
from tune_a_video.nodes import ApplyWeights, ExportPublished, LoadPublished, OneShotTune
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.tuning import not_finite
from tune_a_video.tav_core.pipeline import editing, library
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.store import published

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHAPES = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": [1, 4]},
    "deep": {
        "layers_per_block": 2,
        "block_out_channels": [32, 64, 32],
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D", "CrossAttnUpBlock3D"],
    },
}


def make_base(make_model, shape):
    """A MODEL with the heads that a configuration asks for, per level."""
    config = {**TINY, **shape}
    model = make_model(**shape)
    heads = published.heads_per_block(config, host.own_names(model))
    for name, block in host.parts_of(host.unet_of(model)).blocks.items():
        host.set_heads(block, heads[name])
    return model


@pytest.fixture
def exported(model, make_weights, folder):
    """The folder of a published model of the tiny base."""
    (name,) = ExportPublished.execute(model, make_weights(model), "mine").result
    assert name == "mine_00001"
    return folder / name / "unet"


def load(model, name="mine_00001"):
    return LoadPublished.execute(model, name).result


@pytest.mark.parametrize("shape", SHAPES)
def test_out_and_in_again_is_exact(make_model, shape, clip, prompts, folder):
    model = make_base(make_model, SHAPES[shape])
    with torch.inference_mode():
        learned = OneShotTune.execute(
            host.inflate(model, "video"), clip, prompts[1], 2, 1e-2, 7, "fp32", 0.01, 1.0
        ).result[1]
        (name,) = ExportPublished.execute(model, learned, "sub/mine").result
        assert name in LoadPublished.define_schema().inputs[1].options
        back, report = load(model, name)
    assert same_weights(back, learned)
    assert report == f"{len(back.queries)} queries and {len(back.temporal)} temporal tensors were read."
    assert (back.base_family, back.base_fingerprint) == (learned.base_family, learned.base_fingerprint)
    assert (back.group_norm, back.frames) == ("video", None)
    applied = [ApplyWeights.execute(model, weights, 1.0, 1.0).result[0] for weights in (learned, back)]
    with torch.inference_mode():
        latents = [editing.invert(tuned, clip, prompts[0], 3)[0]["samples"] for tuned in applied]
    assert torch.equal(*latents)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_implementation_reads_the_export_and_computes_the_same(make_model, make_weights, shape, folder):
    model = make_base(make_model, SHAPES[shape])
    learned = make_weights(model)
    (name,) = ExportPublished.execute(model, learned, "mine").result
    config = json.loads((folder / name / "unet" / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == "UNet3DConditionModel"
    wanted = {**TINY, "use_linear_projection": False, **SHAPES[shape]}
    heads = wanted.pop("attention_head_dim")
    assert {key: config[key] for key in wanted} == wanted
    wanted["attention_head_dim"] = config["attention_head_dim"]
    # Levels without attention have any number.
    if shape != "deep":
        assert config["attention_head_dim"] == heads

    reference = VideoUNet(wanted).double()
    reference.unet.load_state_dict(load_file(folder / name / "unet" / WEIGHTS), strict=True)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, 3, 8, 8, generator=generator)
    context = torch.randn(1, 7, 16, generator=generator)
    expected = reference(latents.double(), torch.tensor([400]), context.double())[0].transpose(0, 1)
    applied = apply_weights(model, learned)
    with torch.inference_mode():
        host.load(applied)
        out = applied.model.diffusion_model(
            latents[0].transpose(0, 1),
            torch.full((3,), 400),
            context=context.expand(3, -1, -1),
            transformer_options={"wrappers": applied.wrappers, "cond_or_uncond": [0]},
        )
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_loads_the_image_unet_of_an_export(make_model, make_weights, shape, folder):
    """All but the temporal layers: diffusers has no class of the reference's UNet."""
    model = make_base(make_model, SHAPES[shape])
    learned = make_weights(model)
    (name,) = ExportPublished.execute(model, learned, "mine").result
    file = folder / name / "unet" / "config.json"
    config = file.read_text(encoding="utf-8").replace("Block3D", "Block2D")
    file.write_text(config, encoding="utf-8")
    unet, told = UNet2DConditionModel.from_pretrained(file.parent, output_loading_info=True, local_files_only=True)
    assert not (told["missing_keys"] or told["mismatched_keys"] or told["error_msgs"])
    assert len(told["unexpected_keys"]) == len(learned.temporal)
    assert all("_temp." in key for key in told["unexpected_keys"])

    generator = torch.Generator().manual_seed(5)
    picture, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 16, generator=generator)
    without = apply_weights(model, learned, motion=0.0)  # the tuned queries alone
    with torch.inference_mode():
        host.load(without)
        options = {"wrappers": without.wrappers, "cond_or_uncond": [0]}
        timestep = torch.tensor([400])
        out = without.model.diffusion_model(picture, timestep, context=text, transformer_options=options)
        expected = unet(picture, timestep, encoder_hidden_states=text).sample
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "50KB"}, {"safe_serialization": False}, {"variant": "fp16"}]
)
def test_what_diffusers_saves_is_read(model, exported, folder, options):
    expected, _report = load(model)
    theirs = VideoUNet({**TINY, "use_linear_projection": False}).unet
    theirs.load_state_dict(load_file(exported / WEIGHTS), strict=True)
    theirs.save_pretrained(folder / "theirs" / "unet", **options)
    assert (len(list((folder / "theirs" / "unet").iterdir())) > 2) == ("max_shard_size" in options)
    assert "theirs" in library.published_list()
    learned, report = load(model, "theirs")
    assert same_weights(learned, expected)
    assert "differ" not in report


SD = {**SD15, "use_linear_projection": False}
DETECTED = {
    "Stable Diffusion 1.x (epsilon)": SD,
    "Stable Diffusion 2.x (epsilon)": {
        **SD,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}


@pytest.mark.parametrize("family", DETECTED)
def test_full_size_models_as_the_host_detects_them(family):
    wanted = DETECTED[family]
    config = comfy.model_detection.model_config_from_unet(meta_unet(published.to_unet_config(wanted)).state_dict(), "")
    with torch.device("meta"):
        base = comfy.model_base.BaseModel(config)
    model = ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
    assert host.family_of(model) == family
    blocks = host.parts_of(host.unet_of(model)).blocks
    names = host.own_names(model)
    assert len(names) == 686
    heads = {name: block.n_heads for name, block in blocks.items()}
    written = published.from_unet_config(base.model_config.unet_config, heads, names)
    assert {key: written[key] for key in wanted} == wanted


def test_export_over_a_lora_or_another_base(model, make_model, make_weights, folder, caplog):
    learned = make_weights(model)
    name = "input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
    patched = model.clone()
    weight = dict(host.unet_of(model).named_parameters())[name]
    patched.add_patches({f"diffusion_model.{name}": ("diff", (torch.full_like(weight, 0.5),))})
    with caplog.at_level(logging.INFO):
        (merged,) = ExportPublished.execute(patched, learned, "merged").result
    assert "another base of this family" in caplog.text
    # Read over the plain base, the merge is what differs; over the patched one nothing does.
    assert "1 of 200 other tensors differ from this base" in load(model, merged)[1]
    assert "differ" not in load(patched, merged)[1]


def test_a_lora_that_the_weights_would_take_back_is_told(core, model, make_model, make_weights, folder, caplog):
    """Read over it, the change of the queries is what leads from the LoRA's to the published ones."""
    learned = make_weights(model)
    (name,) = ExportPublished.execute(model, learned, "mine").result
    query = "input_blocks.1.1.transformer_blocks.0.attn2.to_q.weight"
    patched = model.clone()
    patched.add_patches({f"diffusion_model.{query}": ("diff", (torch.full_like(learned.queries[query], 0.5),))})
    weights, report = load(patched, name)
    assert "changes 1 of these queries" in report and "connect the checkpoint's own MODEL here" in report
    assert "connect the checkpoint's own MODEL here" in caplog.text
    assert not torch.allclose(weights.queries[query], learned.queries[query])
    merged = core["ModelMergeSimple"]().merge(model, make_model(seed=1), 0.5)[0]
    with torch.inference_mode():
        assert "these queries" not in load(merged, name)[1], "a merge is a checkpoint"


def test_export_of_a_tuned_model_would_add_its_queries_twice(model, make_weights, folder):
    learned = make_weights(model)
    with pytest.raises(ValueError, match="has other tuned weights already: connect the MODEL from before"):
        ExportPublished.execute(apply_weights(model, learned), learned, "mine")
    assert not any(folder.rglob("*.safetensors"))


def test_per_frame_norms_are_warned_of(model, make_weights, folder, caplog):
    ExportPublished.execute(model, make_weights(model, group_norm="per_frame"), "mine")
    assert "group norm per frame, which the paper's code has not" in caplog.text


# --- forms in which models are published ------------------------------------------------------------------------


def test_forms(model, exported, folder):
    expected, _ = load(model)
    tensors = load_file(exported / WEIGHTS)
    half = {name: tensor.half() for name, tensor in tensors.items()}

    def make(name, files, config=True):
        target = folder / name
        target.mkdir(parents=True)
        if config:
            shutil.copy(exported / "config.json", target)
        for file, save in files.items():
            save(target / file)
        return name

    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": i for i in (1, 2)}
    pieces = {file: dict(list(tensors.items())[i - 1 :: 2]) for file, i in shards.items()}
    index = {"weight_map": {name: file for file, piece in pieces.items() for name in piece}}
    sharded = {file: (lambda p, file=file: save_file(pieces[file], p)) for file in pieces}
    names = [
        make("pipe/unet", {WEIGHTS: lambda p: save_file(tensors, p)}).removesuffix("/unet"),
        make("flat", {WEIGHTS: lambda p: save_file(tensors, p)}),
        make("bin", {"diffusion_pytorch_model.bin": lambda p: torch.save(tensors, p)}),
        make(
            "sharded", {**sharded, f"{WEIGHTS}.index.json": lambda p: p.write_text(json.dumps(index), encoding="utf-8")}
        ),
    ]
    singles = {
        "one.safetensors": lambda p: save_file(tensors, p),
        "one.bin": lambda p: torch.save(tensors, p),
        "sub/one.pt": lambda p: torch.save({"state_dict": tensors, "step": 3}, p),
    }
    (folder / "sub").mkdir()
    for name, save in singles.items():
        save(folder / name)
    assert library.published_list() == sorted([*names, *singles, "mine_00001"])
    for name in [*names, *singles]:
        learned, report = load(model, name)
        assert same_weights(learned, expected), name
        assert "differ" not in report
    make("half", {"diffusion_pytorch_model.fp16.safetensors": lambda p: save_file(half, p)})
    learned, report = load(model, "half")
    assert "differ" not in report  # rounding is no difference
    assert learned.temporal.keys() == expected.temporal.keys()


@pytest.mark.parametrize(
    "files",
    [
        ["diffusion_pytorch_model.non_ema.safetensors"],
        ["diffusion_pytorch_model.non_ema.bin"],
        ["diffusion_pytorch_model.fp16.non_ema.safetensors"],
        ["diffusion_pytorch_model.bf16.bin"],
        # The first is read, the others are not.
        ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.non_ema.safetensors"],
        [WEIGHTS, "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"],
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"],
    ],
)
def test_weights_of_any_variant_are_found(model, exported, files):
    expected, report = load(model)
    tensors = load_file(exported / WEIGHTS)
    (exported / WEIGHTS).unlink()
    for file in files:
        written = tensors if file == files[0] else {"other": torch.zeros(1)}
        (save_file if file.endswith("safetensors") else torch.save)(written, exported / file)
    learned, again = load(model)
    assert same_weights(learned, expected)
    assert again == report


@pytest.mark.parametrize(
    "index, part",
    [
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "diffusion_pytorch_model.fp16-{}-of-00002.safetensors"),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", "diffusion_pytorch_model-{}-of-00002.fp16.safetensors"),
        ("diffusion_pytorch_model.fp16.safetensors.index.json", "{}.safetensors"),
    ],
)
def test_an_index_of_any_variant_is_found(model, exported, index, part):
    expected, report = load(model)
    tensors = load_file(exported / WEIGHTS)
    (exported / WEIGHTS).unlink()
    pieces = {part.format(f"0000{i}"): dict(list(tensors.items())[i - 1 :: 2]) for i in (1, 2)}
    for file, piece in pieces.items():
        save_file(piece, exported / file)
    with pytest.raises(ValueError, match=f"but '{part.format('00001')}': fetch all files of the model"):
        load(model)
    weight_map = {name: file for file, piece in pieces.items() for name in piece}
    (exported / index).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    learned, again = load(model)
    assert same_weights(learned, expected)
    assert again == report


def rounded_base(model, kind):
    """The same MODEL as from a checkpoint that is stored in `kind`."""
    with torch.inference_mode():
        for parameter in host.unet_of(model).parameters():
            parameter.copy_(parameter.to(kind).float())
    return model


KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["in the file", "in the file, kept as fp32", "in the base", "in both"])
def test_rounding_is_no_other_checkpoint(make_model, exported, folder, kind, where):
    tensors = {name: tensor.to(KINDS[kind]) for name, tensor in load_file(exported / WEIGHTS).items()}
    if where == "in the file, kept as fp32":
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if where != "in the base":
        save_file(tensors, exported / WEIGHTS)
    base = make_model()
    report = load(rounded_base(base, torch.float16) if where in ("in the base", "in both") else base)[1]
    assert "differ" not in report


def test_tensors_of_tiny_numbers_are_rounded_too(model, exported):
    name = "out.2.weight"
    theirs = {own: theirs for theirs, own in host.own_names(model).items()}[name]
    with torch.inference_mode():
        weight = dict(host.unet_of(model).named_parameters())[name]
        weight.mul_(1e-7 / weight.abs().max())
    change(exported, **{theirs: weight.clone()})
    save_file({name: tensor.half() for name, tensor in load_file(exported / WEIGHTS).items()}, exported / WEIGHTS)
    assert "differ" not in load(model)[1]


@pytest.mark.parametrize("kind, percent", [(torch.float32, 0.01), (torch.float16, 0.3), (torch.bfloat16, 2.0)])
def test_what_is_more_than_rounding_is_said(model, exported, kind, percent):
    tensors = {name: tensor.to(kind) for name, tensor in load_file(exported / WEIGHTS).items()}
    tensors["conv_in.weight"] = (tensors["conv_in.weight"].float() * (1 + percent / 100)).to(kind)
    save_file(tensors, exported / WEIGHTS)
    assert "1 of 200 other tensors differ from this base" in load(model)[1]


def test_a_model_of_another_base_is_reported(make_model, exported):
    _, report = load(make_model(seed=1))
    count, total = report.split(". ")[1].split(" other")[0].split(" of ")
    assert 20 < int(count) <= int(total)
    assert "was tuned on another checkpoint" in report


def change(exported, **changes):
    """Rewrite the exported tensors: name → tensor, or None to leave it out."""
    tensors = {**load_file(exported / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, exported / WEIGHTS)


def test_what_is_missing_or_unknown_is_said(model, exported):
    names = load_file(exported / WEIGHTS).keys()
    change(exported, **{"conv_in.bias": None, "extra.thing": torch.zeros(3)})
    report = load(model)[1]
    assert "1 tensors of the image UNet are not in it and are left as in the base." in report
    assert "1 tensors have no place here and were ignored, the first is 'extra.thing'." in report
    query = next(name for name in names if name.endswith("attn2.to_q.weight"))
    change(exported, **{query: None})
    with pytest.raises(ValueError, match=f"1 of 8 query tensors are missing, the first is {query}"):
        load(model)
    temporal = next(name for name in names if name.endswith("attn_temp.to_out.0.bias"))
    change(exported, **{temporal: None})
    with pytest.raises(ValueError, match=f"1 of 28 temporal tensors are missing, the first is {temporal}"):
        load(model)
    change(exported, **{name: None for name in names if "_temp." in name})
    with pytest.raises(ValueError, match=r"no temporal attention \(attn_temp\): this is a plain image UNet"):
        load(model)
    save_file({"lora.weight": torch.zeros(2)}, exported / WEIGHTS)
    with pytest.raises(ValueError, match="none of its tensors has a name of a diffusers Stable Diffusion UNet"):
        load(model)


def fatezeros(tensors, low_rank=False):
    """In FateZero's layout: other names, and a temporal convolution that does nothing after each 3 x 3 convolution."""
    theirs = {name.replace("_temp.", "_temporal."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 4 and tensor.shape[-1] == 3:
            layer, width = name.removesuffix("weight") + "conv_temporal", tensor.shape[0]
            if low_rank:
                theirs[f"{layer}.down.weight"] = torch.randn(2, width, 3)
                theirs[f"{layer}.up.weight"] = torch.zeros(width, 2, 3)
            else:
                theirs[f"{layer}.weight"] = torch.nn.init.dirac_(torch.empty(width, width, 3))
                theirs[f"{layer}.bias"] = torch.zeros(width)
    return theirs


@pytest.mark.parametrize("low_rank", [False, True])
def test_fatezeros_layout_is_read_where_it_is_tune_a_videos(model, exported, low_rank):
    expected, report = load(model)
    save_file(fatezeros(load_file(exported / WEIGHTS), low_rank), exported / WEIGHTS)
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    config |= {"_class_name": "UNetPseudo3DConditionModel", "lora": 2, "SparseCausalAttention_index": [-1, "first"]}
    (exported / "config.json").write_text(json.dumps(config), encoding="utf-8")
    learned, again = load(model)
    assert same_weights(learned, expected)
    assert again == report


@pytest.mark.parametrize("low_rank", [False, True])
def test_fatezeros_own_layers_are_named(model, exported, folder, low_rank):
    tensors = fatezeros(load_file(exported / WEIGHTS), low_rank)
    layers = [name for name in tensors if "conv_temporal" in name and not name.endswith("down.weight")]
    huge = torch.zeros(1).as_strided((1 << 20, 1 << 20, 3), (0, 0, 0))
    for name in (layers[0], layers[-1]):
        for other in (tensors[name] + 0.01, huge):
            torch.save({**tensors, name: other}, folder / "x.bin")
            with pytest.raises(ValueError, match=f"FateZero's code and temporal convolutions.* the first is '{name}'"):
                load(model, "x.bin")
    without = {name: tensor for name, tensor in tensors.items() if "conv_temporal" not in name}
    torch.save(without, folder / "x.bin")
    with pytest.raises(ValueError, match="has FateZero's names .* without its temporal convolutions"):
        load(model, "x.bin")


@pytest.mark.parametrize("option", [{"SparseCausalAttention_index": ["mid"]}, {"least_sc_channel": 640}])
def test_fatezeros_other_attention_is_named(model, exported, option):
    config = json.loads((exported / "config.json").read_text(encoding="utf-8")) | option
    (exported / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=f"config.json asks for {min(option)}, an option of FateZero's code"):
        load(model)


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.weight",
        "down_blocks.0.temp_convs.0.conv1.2.weight",
        "transformer_in.temporal.weight",
    ],
)
def test_another_kind_of_video_model_is_no_plain_image_unet(model, exported, name):
    tensors = {name: tensor for name, tensor in load_file(exported / WEIGHTS).items() if "_temp." not in name}
    save_file({**tensors, name: torch.zeros(2)}, exported / WEIGHTS)
    with pytest.raises(ValueError, match=f"has not, the first is '{name}': it is another kind of video model"):
        load(model)


def test_wrong_shapes_heads_and_values(make_model, model, exported):
    with pytest.raises(ValueError, match=r"has shape \(\d+, 16\) in the published model, \(\d+, 24\) in this MODEL"):
        load(make_model(cross_attention_dim=24))
    other_heads = make_base(make_model, {"attention_head_dim": 4})
    with pytest.raises(ValueError, match="config.json gives 2 attention heads where this MODEL has 4"):
        load(other_heads)
    name = next(name for name in load_file(exported / WEIGHTS) if name.endswith("attn_temp.to_q.weight"))
    change(exported, **{name: torch.full((32, 32), torch.inf)})
    with pytest.raises(ValueError, match="holds NaN or infinite values in"):
        load(model)


@pytest.mark.parametrize(
    "config", ["", "[]", "{}", '{"attention_head_dim": "x"}', '{"attention_head_dim": [1], "block_out_channels": 3}']
)
def test_wrong_config(model, exported, config):
    (exported / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json (is not a JSON object|does not describe)"):
        load(model)


def test_folders_without_a_model(model, exported):
    (exported / WEIGHTS).rename(exported / "other.safetensors")
    with pytest.raises(ValueError, match=f"mine_00001 has no {WEIGHTS} or diffusion_pytorch_model.bin in unet"):
        load(model)
    (exported / "config.json").unlink()
    with pytest.raises(ValueError, match="has no unet/config.json: it is not a diffusers folder"):
        load(model)


@pytest.mark.parametrize(
    "index, message",
    [
        ("[]", "is not a JSON object"),
        ('{"weight_map": 3}', "has no weight_map of file names"),
        ('{"weight_map": {"a": 3}}', "has no weight_map of file names"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "'gone.safetensors', which .* names, is not there"),
        ('{"weight_map": {"a": "../../../outside.safetensors"}}', "hidden part or a step upwards"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "is absolute"),
        ('{"weight_map": {"a": "config.json"}}', "is of no kind that holds a published model"),
    ],
)
def test_indices_of_strangers(model, exported, folder, index, message):
    (exported / WEIGHTS).rename(folder.parent / "outside.safetensors")
    (exported / f"{WEIGHTS}.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(model)


# --- pickles ----------------------------------------------------------------------------------------------------


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def zip_of(path, parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(f"archive/{name}", data)


def zip_after(path, value):
    """A file of torch before 1.6, with a zip at its end, where zipfile looks for one."""
    archive = path.with_suffix(".zip")
    zip_of(archive, {"data.pkl": b""})
    torch.save(value, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + archive.read_bytes())
    archive.unlink()


def test_no_pickle_is_read_by_a_torch_that_cannot(model, folder, monkeypatch):
    torch.save({"conv_in.weight": torch.zeros(2)}, folder / "old.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(ValueError, match=r"a pickle, which torch 2.5.1\+cu121 cannot read safely: update torch"):
        load(model, "old.bin")


@pytest.mark.parametrize("ending", ["bin", "pt"])
def test_no_pickle_is_loaded_unsafely(model, folder, tmp_path, ending, monkeypatch):
    mark = tmp_path / "ran"
    path = folder / f"evil.{ending}"
    evil = {"conv_in.weight": torch.zeros(2), "x": Evil(str(mark))}
    attempts = [
        lambda: torch.save(evil, path),
        lambda: torch.save(evil, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(evil)),
        lambda: zip_of(path, {"data.pkl": pickle.dumps(evil), "version": b"3\n"}),
        lambda: zip_after(path, evil),
        lambda: zip_after(path, {"conv_in.weight": torch.zeros(2)}),
    ]
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # a user's, for other software
    for attempt in attempts:
        attempt()
        with pytest.raises(ValueError, match="and was refused|not a file of torch 1.6") as error:
            load(model, path.name)
        assert "\n" not in str(error.value)
    assert not mark.exists()


def stride_bomb():
    return {"conv_in.weight": torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))}


BINS = {
    "web page": (
        lambda p: p.write_text("<!DOCTYPE html>\n<title>404</title>", encoding="utf-8"),
        "is a web page, not a model",
    ),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "lfs pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8"),
        "Git LFS pointer",
    ),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 9), "is truncated, or not a file of torch"),
    "a list": (lambda p: torch.save([torch.zeros(2)], p), "is not a state dict of floating-point tensors"),
    "numbers": (lambda p: torch.save({"a": 3}, p), "is not a state dict of floating-point tensors"),
    "integers": (lambda p: torch.save({"a": torch.zeros(2, dtype=torch.int64)}, p), "floating-point tensors"),
    "sparse": (lambda p: torch.save({"a": torch.zeros(2).to_sparse()}, p), "floating-point tensors|holds more than"),
    "meta": (lambda p: torch.save({"a": torch.zeros(1 << 40, device="meta")}, p), "floating-point tensors|refused"),
    "shape of terabytes": (lambda p: torch.save(stride_bomb(), p), "has shape|no temporal attention"),
    "bomb": (
        lambda p: zip_of(p, {"data.pkl": b"", "data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED),
        "its parts are larger than the file. Refused",
    ),
    "zip": (lambda p: zip_of(p, {"readme": b"\0"}), "is damaged and could not be read"),
}


@pytest.mark.parametrize("kind", BINS)
def test_bins_that_are_no_models(model, folder, kind):
    make, message = BINS[kind]
    make(folder / "x.bin")
    with pytest.raises(ValueError, match=message) as error:
        load(model, "x.bin")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_tensor_that_claims_terabytes_in_a_whole_model(model, exported, folder):
    tensors = load_file(exported / WEIGHTS)
    tensors["conv_in.weight"] = torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))
    torch.save(tensors, folder / "x.bin")
    with pytest.raises(ValueError, match=r"has shape \(1048576, 1048576\)"):
        load(model, "x.bin")


def test_truncated_at_any_length(model, exported, folder):
    torch.save(load_file(exported / WEIGHTS), folder / "whole.bin")
    for whole, name in ((folder / "whole.bin", "x.bin"), (exported / WEIGHTS, "x.safetensors")):
        data = whole.read_bytes()
        for length in range(600, len(data), len(data) // 20):
            (folder / name).write_bytes(data[:length])
            with pytest.raises(ValueError, match="truncated") as error:
                load(model, name)
            assert "\n" not in str(error.value)


def test_bits_that_flipped(model, exported, folder):
    torch.save(load_file(exported / WEIGHTS), folder / "whole.bin")
    data = bytearray((folder / "whole.bin").read_bytes())
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(60):
        spoiled = bytearray(data)
        for at in torch.randint(len(data), (40,), generator=generator).tolist():
            spoiled[at] ^= 0x55
        (folder / "x.bin").write_bytes(spoiled)
        try:
            learned, _report = load(model, "x.bin")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert not not_finite(learned.queries) and not not_finite(learned.temporal)
    assert 0 < refused < 60


def test_a_changed_folder_is_read_again(model, exported):
    before = LoadPublished.fingerprint_inputs(None, "mine_00001")
    assert LoadPublished.fingerprint_inputs(None, "mine_00001") == before
    (exported / "config.json").write_text(
        (exported / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8"
    )
    assert LoadPublished.fingerprint_inputs(None, "mine_00001") != before
    assert LoadPublished.validate_inputs("mine_00001") is True
    assert "there is no 'other'" in str(LoadPublished.validate_inputs("other"))


def test_weights_and_published_models_are_told_apart(model, make_weights, exported, folder):
    from tune_a_video.nodes import LoadWeights
    from tune_a_video.tav_core.store.weights import save_file as save_weights

    with pytest.raises(ValueError, match="is a published model: read it with Load Published Model"):
        LoadWeights.execute(f"mine_00001/unet/{WEIGHTS}")
    with pytest.raises(ValueError, match="mine_00001 is not a .safetensors file"):
        LoadWeights.execute("mine_00001")
    save_weights(replace(make_weights(model)), folder / "w.safetensors", "fp32")
    with pytest.raises(ValueError, match="Weights of this pack are read with Load Weights"):
        load(model, "w.safetensors")


def test_a_header_of_terabytes(model, folder):
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 42) + b"{}")
    with pytest.raises(ValueError, match="its header claims 4398046511104 bytes"):
        load(model, "x.safetensors")
