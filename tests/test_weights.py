"""Weights as a file: saved, described, loaded, applied."""

import asyncio
import json
import logging
import struct
from dataclasses import replace
from types import SimpleNamespace

import comfy.utils
import folder_paths
import pytest
import torch
from comfy_api.latest._io import Hidden, HiddenHolder
from equal import same_weights
from execution import IsChangedCache
from prompts import node
from safetensors import safe_open
from safetensors.torch import save_file
from tune_a_video.nodes import (
    ApplyWeights,
    ExportPublished,
    InflateUNet,
    LoadPublished,
    LoadWeights,
    OneShotTune,
    SaveWeights,
    graph,
)
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.attention import PAPERS
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.method.windows import Windows
from tune_a_video.tav_core.pipeline import editing, library
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.one_shot import one_shot_tune
from tune_a_video.tav_core.store import files, weights
from tune_a_video.tav_core.store.weights import TunedWeights, difference


def sampled(model, clip, prompts):
    """The clip inverted and sampled again, as the graph does it."""
    with torch.inference_mode():
        inverted = editing.invert(model, clip, prompts[0], 3)[0]
        return editing.sample_video(model, inverted, prompts[1], prompts[0], 3, 5.0)["samples"]


@pytest.fixture
def tuned(inflated, clip, prompts):
    """A real tune of two steps: (its MODEL, its weights)."""
    with torch.inference_mode():
        return OneShotTune.execute(inflated, clip, prompts[1], 2, 1e-3, 7, "fp32", 0.01, 1.0).result[:2]


def test_reloaded_weights_sample_the_same_to_the_bit(tuned, model, clip, prompts, folder):
    tuned_model, learned = tuned
    (name,) = SaveWeights.execute(learned, "skiing/man", "fp32").result
    assert name == "skiing/man_00001.safetensors"
    assert name in LoadWeights.define_schema().inputs[0].options
    (reloaded,) = LoadWeights.execute(name).result
    assert same_weights(reloaded, learned)
    assert replace(reloaded, queries={}, temporal={}) == replace(learned, queries={}, temporal={})
    (applied,) = ApplyWeights.execute(model, reloaded, 1.0, 1.0).result
    assert torch.equal(sampled(applied, clip, prompts), sampled(tuned_model, clip, prompts))


def test_fp16_is_half_the_size_and_close(tuned, folder):
    _, learned = tuned
    names = [SaveWeights.execute(learned, "w", precision).result[0] for precision in ("fp32", "fp16")]
    assert names == ["w_00001.safetensors", "w_00002.safetensors"]
    large, small = ((folder / name).stat().st_size for name in names)
    assert small < 0.6 * large
    close = LoadWeights.execute(names[1]).result[0]
    assert close.temporal.keys() == learned.temporal.keys() != set()
    for name, tensor in learned.temporal.items():
        torch.testing.assert_close(close.temporal[name], tensor, rtol=1e-3, atol=1e-6)
    name = next(iter(learned.queries))
    with pytest.raises(ValueError, match="holds values that fp16 cannot: save as fp32"):
        SaveWeights.execute(replace(learned, queries={name: torch.full((2, 2), 1e6)}), "w", "fp16")


def test_a_person_can_read_how_it_was_tuned(tuned, inflated, folder):
    _, learned = tuned
    learned = replace(learned, caption="a man is skiing", stride=2)
    (name,) = SaveWeights.execute(learned, "w", "fp32").result
    # What the page's info panel reads, with its limit.
    path = folder_paths.get_full_path("tune_a_video", name)
    shown = json.loads(comfy.utils.safetensors_header(path, max_size=1024 * 1024))["__metadata__"]
    assert shown == {
        "format": "tune-a-video weights",
        "format_version": "1",
        "pack_version": "0.1.0",
        "base_family": "a UNet of 32 channels and text width 16 (epsilon)",
        "base_fingerprint": host.fingerprint(inflated),
        "caption": "a man is skiing",
        "frames": "5",
        "stride": "2",
        "size": "64x64",
        "group_norm": "video",
        "recipe": '{"steps": 2, "learning_rate": 0.001, "seed": 7, "weight_decay": 0.01, "max_grad_norm": 1.0}',
        "seed": "7",
        "final_loss": str(learned.losses[-1]),
        "losses": str(learned.losses),
        "date": learned.date,
    }
    assert learned.date.endswith("+00:00")


def test_very_long_loss_curves_are_shortened_to_fit_the_pages_info_panel(make_weights, model, folder):
    weights.save_file(make_weights(model, losses=[1 / 3] * 99_999), folder / "w.safetensors", "fp32")
    assert comfy.utils.safetensors_header(str(folder / "w.safetensors"), max_size=1024 * 1024)
    losses = weights.load_file(folder / "w.safetensors").losses
    assert 1000 <= len(losses) <= 2000
    assert losses == pytest.approx([1 / 3] * len(losses))
    assert weights.to_metadata(make_weights(model, losses=[1.0] * 3000 + [0.5]))["final_loss"] == "0.5"


@pytest.mark.parametrize("strengths", [(0.0, 0.0), (1.0, 0.5), (2.0, 2.0)])
def test_strengths(model, make_weights, clip, prompts, strengths, unchanged):
    motion, content = strengths
    learned = make_weights(model)
    scaled = {name: tensor * motion if ".to_out." in name else tensor for name, tensor in learned.temporal.items()}
    by_hand = replace(learned, temporal=scaled, queries={k: t * content for k, t in learned.queries.items()})
    with unchanged(model):
        (applied,) = ApplyWeights.execute(model, learned, motion, content).result
        result = sampled(applied, clip, prompts)
        torch.testing.assert_close(result, sampled(apply_weights(model, by_hand), clip, prompts))
        if strengths == (0.0, 0.0):
            torch.testing.assert_close(result, sampled(host.inflate(model, "video"), clip, prompts))


def test_another_base_is_noted_and_another_family_refused(make_model, make_weights, caplog):
    base, other = make_model(), make_model(seed=1)
    learned = make_weights(base)
    with caplog.at_level(logging.INFO):
        ApplyWeights.execute(base, learned, 1.0, 1.0)
        ApplyWeights.execute(host.inflate(base, "per_frame"), learned, 1.0, 1.0)
        assert "another base" not in caplog.text
        ApplyWeights.execute(other, learned, 1.0, 1.0)
        assert "another base of this family" in caplog.text
    for wrong, family in (
        (make_model(prediction_type="v_prediction"), "text width 16 (v_prediction)"),
        (make_model(cross_attention_dim=24), "text width 24 (epsilon)"),
    ):
        with pytest.raises(ValueError) as error:
            ApplyWeights.execute(wrong, learned, 1.0, 1.0)
        assert learned.base_family in str(error.value) and family in str(error.value)
    with pytest.raises(ValueError, match="temporal weights belong to another UNet"):
        ApplyWeights.execute(make_model(layers_per_block=2), learned, 1.0, 1.0)
    name = next(iter(learned.queries))
    with pytest.raises(ValueError, match="1 of 8 tuned queries do not fit this MODEL"):
        ApplyWeights.execute(base, replace(learned, queries={**learned.queries, name: torch.zeros(2, 2)}), 1.0, 1.0)


@pytest.mark.parametrize("part", ["queries", "temporal"])
@pytest.mark.parametrize("left", [0, 1, -1], ids=["none", "one", "all but one"])
def test_a_part_of_what_was_tuned_is_refused(model, make_weights, folder, part, left):
    learned = make_weights(model)
    tensors = getattr(learned, part)
    incomplete = replace(learned, **{part: dict(list(tensors.items())[:left])})
    first = min(tensors.keys() - getattr(incomplete, part).keys())
    for use in (
        lambda: ApplyWeights.execute(model, incomplete, 1.0, 1.0),
        lambda: ExportPublished.execute(model, incomplete, "mine"),
    ):
        with pytest.raises(ValueError, match=f"the first is {first}"):
            use()
    weights.save_file(incomplete, folder / "w.safetensors", "fp32")
    with pytest.raises(ValueError, match=f"holds no {part} tensors" if left == 0 else f"the first is {first}"):
        ApplyWeights.execute(model, LoadWeights.execute("w.safetensors").result[0], 1.0, 1.0)


@pytest.mark.parametrize("motion", [1.0, 0.0])
def test_tuned_weights_are_not_applied_over_others(model, make_weights, motion):
    first, second = make_weights(model), make_weights(model, seed=4)
    (tuned,) = ApplyWeights.execute(model, first, motion, 1.0).result
    with pytest.raises(ValueError, match="has other tuned weights already: connect the MODEL from before"):
        ApplyWeights.execute(tuned, second, 1.0, 1.0)
    # A tune of a tuned model belongs on that one.
    ApplyWeights.execute(tuned, make_weights(tuned), 1.0, 1.0)


def test_what_was_set_before_the_weights(model, make_weights, caplog):
    """The window stays, which is a matter of memory; what else was tuned differently gives way, and that is told."""
    weights = make_weights(model, windows=Windows(6, 2))

    def applied(base, **inputs):
        caplog.clear()
        return host.inflation_of(ApplyWeights.execute(base, weights, 1.0, 1.0, **inputs).result[0])

    other = host.inflate(model, "per_frame", Windows(4, 1), "all", "light")
    kept = applied(other)
    assert (kept.windows, kept.group_norm, kept.attends, kept.layers) == (Windows(4, 1), "video", PAPERS, "paper")
    told = [record.message.removeprefix("Tune-A-Video: ") for record in caplog.records]
    tuned = "as these weights were tuned, not"
    assert told[-3:] == [
        f"group_norm is video, {tuned} per_frame as set before",
        f"attends is {PAPERS}, {tuned} all as set before",
        f"layers is paper, {tuned} light as set before",
    ]
    assert applied(other, window=0).windows.frames == 0
    assert applied(other, window=5, overlap=1).windows == Windows(5, 1)
    assert applied(host.inflate(model, "video")).windows == weights.windows and "set before" not in caplog.text
    assert applied(model).windows == weights.windows


def test_a_tune_of_a_tuned_model_belongs_on_that_one_alone(inflated, model, clip, prompts, folder):
    """Anywhere else the change of the queries that the first tune had made would be missing."""

    def tune(model):
        with torch.inference_mode():
            return one_shot_tune(model, clip, prompts[1], Recipe(2, 1e-2), "fp32", "all", lambda _step: None)

    first = tune(inflated)
    tuned = apply_weights(inflated, first)
    second = tune(tuned)
    assert (first.base_tuned, second.base_tuned) == (False, True)
    name = SaveWeights.execute(second, "w", "fp32").result[0]
    loaded = LoadWeights.execute(name).result[0]
    assert loaded.base_tuned
    other = apply_weights(inflated, first, content=0.5)
    for learned in (second, loaded):
        for base in (model, inflated, other):
            with pytest.raises(ValueError, match="were tuned on a MODEL that was tuned already.*Apply the weights of"):
                ApplyWeights.execute(base, learned, 1.0, 1.0)
        with pytest.raises(ValueError, match="were tuned on a MODEL that was tuned already"):
            ExportPublished.execute(model, learned, "published")
        again = ApplyWeights.execute(*ApplyWeights.execute(model, first, 1.0, 1.0).result, learned, 1.0, 1.0).result[0]
        assert host.fingerprint(again) == host.fingerprint(apply_weights(tuned, second))


def test_motion_that_another_motion_replaces_is_told(model, make_weights, caplog):
    """Without the first one's content nothing tells its MODEL from the one that the second was tuned on."""
    (moves,) = ApplyWeights.execute(model, make_weights(model), 1.0, 0.0).result
    assert "replace" not in caplog.text
    ApplyWeights.execute(moves, make_weights(model, seed=4), 1.0, 1.0)
    assert "replace the motion of the tuned weights" in caplog.text


def test_the_change_gives_the_tuned_weight_back_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-3, 0.1, 1.0, 30.0):
        base = torch.randn(200_000, generator=generator)
        change = scale * torch.randn(200_000, generator=generator)
        tuned = base + change
        found = difference(tuned, base)
        assert torch.equal(base + found, tuned)
        # Whatever tuned it, a change that was found once is found again: nothing drifts through files.
        any_target = torch.randn(200_000, generator=generator) * scale
        found = difference(any_target, base)
        assert torch.equal(difference(base + found, base), found)


# --- foreign and broken files -----------------------------------------------------------------------------------


def header(entries, data=b"", length=None):
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TERA = 1 << 42
BROKEN = {
    "empty": (b"", "is empty"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "is a web page, not a model"),
    "web page after a blank": (b"\xef\xbb\xbf\n <html>", "is a web page, not a model"),
    "text": (b'{"error": "not found"}', "is a text file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    "short": (b"\0\0\0", "truncated"),
    "header of terabytes": (struct.pack("<Q", TERA) + b"{}", "its header claims 4398046511104 bytes"),
    "header of 2^64": (b"\xff" * 64, "its header claims 18446744073709551615 bytes"),
    "header past the end": (header(b"{}", length=4096), "ends within its header"),
    "not json": (header(b"\0{{{{"), "damaged"),
    "not utf-8": (header(b"\xff\xfe{}"), "damaged"),
    "a list": (header([1, 2]), "damaged"),
    "deep": (header(b"[" * 100_000), "damaged"),
    "metadata of numbers": (header({"__metadata__": {"format": 1}}), "damaged"),
    "metadata is a list": (header({"__metadata__": []}), "damaged"),
    "entry is text": (header({"x": "F32"}), "damaged"),
    "tensor of terabytes": (header({"x": entry([TERA], [0, 4 * TERA])}, b"\0" * 16), "its tensors take"),
    "shape of terabytes": (header({"x": entry([TERA], [0, 16])}, b"\0" * 16), "damaged"),
    "shape overflows": (header({"x": entry([1 << 63, 2, 0], [0, 0])}), "not written by Save Weights|damaged"),
    "negative shape": (header({"x": entry([-1, -4], [0, 16])}, b"\0" * 16), "damaged"),
    "negative offset": (header({"x": entry([4], [-16, 0])}, b"\0" * 16), "damaged"),
    "shape of floats": (header({"x": entry([4.0], [0, 16])}, b"\0" * 16), "damaged"),
    "shape of booleans": (header({"x": entry([True], [0, 4])}, b"\0" * 4), "damaged"),
    "overlap": (header({"x": entry([4], [0, 16]), "y": entry([4], [0, 16])}, b"\0" * 32), "damaged"),
    "integers": (header({"x": entry([4], [0, 32], "I64")}, b"\0" * 32), "expected floating-point"),
    "unknown dtype": (header({"x": entry([4], [0, 32], "\n" * 999)}, b"\0" * 32), "expected floating-point"),
    "truncated data": (header({"x": entry([4], [0, 16])}, b"\0" * 15), "is truncated: its tensors take 16 bytes"),
    "another format": (header({"x": entry([4], [0, 16])}, b"\0" * 16), "not written by Save Weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(folder, kind):
    content, message = BROKEN[kind]
    (folder / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        LoadWeights.execute("w.safetensors")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_truncated_weights_file_at_any_length(make_weights, model, folder):
    weights.save_file(make_weights(model), folder / "whole.safetensors", "fp32")
    whole = (folder / "whole.safetensors").read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (folder / "w.safetensors").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated|is empty"):
            LoadWeights.execute("w.safetensors")


def rewrite(path, metadata=None, tensors=None):
    """The same weights file with some of its metadata and tensors replaced."""
    with safe_open(path, "pt") as file:
        known = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        described = file.metadata()
    save_file({**known, **(tensors or {})}, path, {**described, **(metadata or {})})


@pytest.fixture
def file(make_weights, model, folder):
    weights.save_file(make_weights(model), folder / "w.safetensors", "fp32")
    return folder / "w.safetensors"


def test_weights_of_other_versions_and_kinds(file, model):
    rewrite(file, {"format_version": "2"})
    with pytest.raises(ValueError, match="has format '2', this pack reads 1: update"):
        LoadWeights.execute(file.name)
    rewrite(file, {"format_version": "1", "group_norm": "batch"})
    with pytest.raises(ValueError, match="unknown group norm 'batch'"):
        LoadWeights.execute(file.name)
    rewrite(file, {"group_norm": "video", "attends": "last"})
    with pytest.raises(ValueError, match="attends to unknown frames 'last'"):
        LoadWeights.execute(file.name)
    rewrite(file, {"attends": "all"}, {"other.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="a tensor 'other.weight' that no weights have"):
        LoadWeights.execute(file.name)


def test_weights_remember_the_frames_attended_to(model, make_weights, file, clip, prompts, folder):
    known = make_weights(model, attends="all")
    weights.save_file(known, folder / "all.safetensors", "fp32")
    reloaded = LoadWeights.execute("all.safetensors").result[0]
    assert reloaded.attends == "all"
    applied = [ApplyWeights.execute(model, w, 1.0, 1.0).result[0] for w in (reloaded, replace(reloaded, attends="own"))]
    assert host.inflation_of(applied[0]).attends == "all"
    assert not torch.allclose(*(sampled(m, clip, prompts) for m in applied), rtol=0.01)

    with safe_open(file, "pt") as opened:  # as it was before there was a choice
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        described = {name: text for name, text in opened.metadata().items() if name != "attends"}
    save_file(tensors, file, described)
    assert LoadWeights.execute(file.name).result[0].attends == "first_previous"


def test_a_tune_attends_to_the_frames_of_its_model(model, clip, prompts):
    losses = []
    for attends in ("first_previous", "all"):
        (video,) = InflateUNet.execute(model, "video", attends=attends).result
        with torch.inference_mode():
            tuned, learned = OneShotTune.execute(video, clip, prompts[1], 1, 1e-3, 7, "fp32", 0.01, 1.0).result[:2]
        assert learned.attends == host.inflation_of(tuned).attends == attends
        losses.append(learned.losses)
    assert losses[0] != losses[1]


def test_weights_that_are_not_finite(file):
    with safe_open(file, "pt") as opened:
        name = min(opened.keys())
        broken = opened.get_tensor(name).clone()
    broken.view(-1)[3] = torch.nan
    rewrite(file, tensors={name: broken})
    with pytest.raises(ValueError, match="holds NaN or infinite values in 'queries."):
        LoadWeights.execute(file.name)


def test_a_strangers_metadata_is_text(file):
    long = "x" * 1_000_000
    rewrite(
        file,
        {
            "caption": "__import__('os').system('true')\n\x1b[31m" + long,
            "base_family": "SD\r\n\x1b[2J" + long,
            "frames": "9" * 5000,
            "stride": "-3",
            "size": "1e9x2",
            "recipe": '{"steps": "os.remove", "learning_rate": {}}',
            "losses": "[" * 50_000,
            "date": "\x00",
            "surprise": long,
        },
    )
    (learned,) = LoadWeights.execute(file.name).result
    assert learned.caption.startswith("__import__") and len(learned.caption) == weights.MAX_CAPTION
    assert learned.base_family.isprintable() and len(learned.base_family) == weights.MAX_WORDS
    assert (learned.frames, learned.stride, learned.size, learned.recipe) == (None,) * 4
    assert (learned.losses, learned.date) == ([], " ")
    for odd in ('{"steps": 1e999}', '{"rm": 1}', "[1]", '{"steps": 0}', "1" * 5000, '{"steps": 1' + "0" * 400 + "}"):
        rewrite(file, {"recipe": odd, "losses": odd})
        (learned,) = LoadWeights.execute(file.name).result
        assert learned.recipe is None
        assert learned.losses in ([], [1])


def test_a_changed_file_is_read_again(file, make_weights, model):
    before = LoadWeights.fingerprint_inputs(file.name)
    assert LoadWeights.fingerprint_inputs(file.name) == before
    (first,) = LoadWeights.execute(file.name).result
    kept = {name: tensor.clone() for name, tensor in first.temporal.items()}
    weights.save_file(make_weights(model, seed=9), file, "fp32")
    assert LoadWeights.fingerprint_inputs(file.name) != before
    assert all(torch.equal(first.temporal[name], tensor) for name, tensor in kept.items())
    assert LoadWeights.validate_inputs(file.name) is True
    assert LoadWeights.validate_inputs(None) is True
    assert "there is no 'other.safetensors'" in str(LoadWeights.validate_inputs("other.safetensors"))


@pytest.mark.parametrize("kind, inputs", [(LoadWeights, ["file"]), (LoadPublished, ["model", "published"])])
def test_a_name_that_is_connected_is_no_reason_to_read_again(core, monkeypatch, kind, inputs):
    """Of what another node makes the host gives None; an error counts as a change, at every run."""
    node_id = kind.define_schema().node_id
    monkeypatch.setitem(core, node_id, kind)
    linked = {"1": node(node_id, **{name: ["0", 0] for name in inputs}), "0": node("TAVSaveWeights")}
    cache = IsChangedCache("prompt", SimpleNamespace(get_node=linked.get), None)
    assert asyncio.run(cache.get("1")) == [""]


def test_a_full_disk_leaves_nothing_behind(make_weights, model, folder, monkeypatch):
    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"w_00001.safetensors could not be written: No space left on device"):
        SaveWeights.execute(make_weights(model), "w", "fp32")
    assert list(folder.iterdir()) == []


def test_folders_of_extra_model_paths(tmp_path, folder, make_weights, model):
    from utils.extra_config import load_extra_path_config

    (tmp_path / "elsewhere" / "tav").mkdir(parents=True)
    (tmp_path / "extra.yaml").write_text(
        f"mine:\n  base_path: {tmp_path}/elsewhere\n  tune_a_video: tav\n", encoding="utf-8"
    )
    load_extra_path_config(str(tmp_path / "extra.yaml"))
    weights.save_file(make_weights(model), tmp_path / "elsewhere" / "tav" / "theirs.safetensors", "fp32")
    assert library.weights_list() == ["theirs.safetensors"]
    LoadWeights.execute("theirs.safetensors")


# --- what the graph says ----------------------------------------------------------------------------------------


GRAPH = {
    "1": node("CheckpointLoaderSimple", ckpt_name="sd.safetensors"),
    "2": node("LoadVideo", file="a.mp4"),
    "3": node("TAVPrepareClip", frames=["2", 0], start=0, stride=3, count=24),
    "4": node("VAEEncode", pixels=["3", 0], vae=["1", 2]),
    "5": node("CLIPTextEncode", text="a man is skiing", clip=["1", 1]),
    "6": node("TAVOneShotTune", model=["1", 0], latents=["4", 0], caption=["5", 0]),
    "7": node("PrimitiveString", value="from a node"),
    "8": node("CLIPTextEncode", text=["7", 0], clip=["1", 1]),
    "9": node("PrimitiveInt", value=4),
    "10": node("TAVPrepareClip", stride=["9", 0]),
    "11": node("TAVOneShotTune", latents=["10", 0], caption=["12", 0]),
    "12": node("ConditioningSetTimestepRange", conditioning=["8", 0], start=0.0, end=1.0),
    "13": node("TAVOneShotTune", latents=["4", 0], caption=["13", 1]),
    "14": node("TAVOneShotTune", latents="text", caption=["1", 2, 3]),
    "15": {"class_type": "Broken", "inputs": None},
    "16": node("TAVOneShotTune", latents=["15", 0], caption=["404", 0]),
}


@pytest.mark.parametrize(
    "node_id, caption, stride",
    [
        ("6", "a man is skiing", 3),
        ("11", "from a node", 4),
        ("13", "", 3),  # a loop
        ("14", "", None),
        ("15", "", None),
        ("16", "", None),
        ("999", "", None),
        (None, "", None),
    ],
)
def test_caption_and_stride_from_the_graph(node_id, caption, stride):
    assert (graph.caption_of(GRAPH, node_id), graph.stride_of(GRAPH, node_id)) == (caption, stride)
    assert graph.caption_of({}, node_id) == "" and graph.stride_of(None, node_id) is None


def test_one_shot_tune_asks_the_graph(inflated, clip, prompts):
    assert {"PROMPT", "UNIQUE_ID"} == {kind.value for kind in OneShotTune.define_schema().hidden}

    class InGraph(OneShotTune):  # as the host clones it for each call
        hidden = HiddenHolder.from_dict({Hidden.prompt: GRAPH, Hidden.unique_id: "6"})

    learned: TunedWeights = InGraph.execute(inflated, clip, prompts[1], 1, 1e-3, 7, "fp32", 0.01, 1.0).result[1]
    assert (learned.caption, learned.stride) == ("a man is skiing", 3)
    assert learned.recipe == Recipe(1, 1e-3, 7)
