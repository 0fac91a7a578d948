"""Layers `light`: low-rank changes of the queries, and one temporal attention a transformer."""

from dataclasses import replace

import pytest
import torch
from equal import same_weights
from small import build_xl
from tune_a_video.nodes import ApplyWeights, ExportPublished, InflateUNet, LoadPublished, LoadWeights, SaveWeights
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method.inflation import LIGHT, PAPER
from tune_a_video.tav_core.method.low_rank import RANK
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.pipeline import editing
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.network import TrainingUNet
from tune_a_video.tav_core.pipeline.one_shot import Saving, one_shot_tune
from tune_a_video.tav_core.store import weights as store


@pytest.fixture
def light(model):
    return host.inflate(model, "video", layers=LIGHT)


def tuned(model, clip, prompts, steps=3, precision="fp32", recompute="nothing", **options):
    with torch.inference_mode():
        recipe = Recipe(steps, learning_rate=1e-2)
        return one_shot_tune(model, clip, prompts[1], recipe, precision, recompute, lambda _step: None, **options)


@pytest.fixture
def learned(light, clip, prompts):
    return tuned(light, clip, prompts)


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """The host's folder of LoRA files, empty."""
    import folder_paths

    path = tmp_path / "models" / "loras"
    path.mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(path)], {".safetensors"}))
    return path


def predicted(model, context, noisy, layers, change=None):
    """What the training network predicts, untuned or with low-rank changes."""
    with torch.inference_mode(False), torch.no_grad():
        network = TrainingUNet(host.video_of(model), len(noisy), "fp32", "nothing", context)
        network.reset(torch.Generator().manual_seed(0))
        assert (network.low_rank is not None) == (layers == LIGHT)
        for name, tensor in (change or {}).items():
            network.low_rank.named()[name].copy_(tensor)
        return network(noisy, torch.tensor(500))


def test_it_begins_as_the_image_model_and_the_papers_choice_stays_the_default(model, clip, prompts):
    text, noisy = prompts[0][0][0], clip["samples"]
    kinds = {layers: InflateUNet.execute(model, "video", layers=layers).result[0] for layers in ("auto", PAPER, LIGHT)}
    assert [host.inflation_of(kind).layers for kind in kinds.values()] == [PAPER, PAPER, LIGHT]
    paper, light = (predicted(kinds[layers], text, noisy, layers) for layers in (PAPER, LIGHT))
    assert torch.equal(paper, light)


def test_every_pair_trains(learned, light):
    assert learned.layers == LIGHT and learned.temporal.keys() == host.inflation_of(light).temporal.named().keys()
    assert len(learned.queries) == 2 * 8
    for name, tensor in learned.queries.items():
        assert tensor.any() and tensor.dtype == torch.float32 and RANK in tensor.shape, name
        assert ".attn1.to_q.lora_" in name or ".attn2.to_q.lora_" in name


def test_the_host_computes_what_was_trained(model, learned, clip, prompts):
    """Its own LoRA patches give what the training network has beside each query."""
    text, noisy = prompts[0][0][0], clip["samples"]
    tuned_model = apply_weights(model, learned)
    trained = predicted(tuned_model, text, noisy, LIGHT)  # of the effective weights, patches applied
    beside = apply_weights(model, learned, content=0.0)
    torch.testing.assert_close(trained, predicted(beside, text, noisy, LIGHT, learned.queries), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, predicted(beside, text, noisy, LIGHT))


def test_a_deep_transformer_has_one_temporal_attention():
    names = host.inflation_of(host.inflate(build_xl(), "video", layers=LIGHT)).temporal.names
    assert len(names) == 11 and "middle_block.1.transformer_blocks.9" in names
    assert "input_blocks.4.1.transformer_blocks.1" in names and "input_blocks.4.1.transformer_blocks.0" not in names


@pytest.mark.parametrize("recompute", ["linear", "all"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_nothing(light, clip, prompts, recompute, precision):
    plain, recomputed = (tuned(light, clip, prompts, 3, precision, way) for way in ("nothing", recompute))
    assert same_weights(plain, recomputed)


def test_a_frozen_query_takes_half_in_bf16(light, clip, prompts):
    network = TrainingUNet(host.video_of(light), 5, "bf16", "nothing", prompts[0][0][0])
    queries = {p.dtype for name, p in network.unet.named_parameters() if ".to_q." in name}
    assert queries == {torch.bfloat16}
    assert {p.dtype for p in network.trainable.values()} == {torch.float32}


def test_a_tune_goes_on_where_it_stopped(light, inflated, learned, clip, prompts, tmp_path):
    told = []
    for steps in (2, 3):
        parts = tuned(light, clip, prompts, steps, saving=Saving(tmp_path), tell=told.append)
    assert told == ["resumed after step 2"] and same_weights(parts, learned) and parts.losses == learned.losses
    assert same_weights(tuned(light, clip, prompts, 3, saving=Saving(tmp_path), tell=told.append), learned)
    assert told[1:] == ["reused: all 3 steps were saved"]
    tuned(inflated, clip, prompts, 3, saving=Saving(tmp_path), tell=told.append)  # the paper's is another tune
    assert len(told) == 2


def test_saved_as_such_and_sampled_the_same_to_the_bit(model, learned, clip, prompts, folder, unchanged):
    (name,) = SaveWeights.execute(learned, "light", "fp32").result
    (loaded,) = LoadWeights.execute(name).result
    assert same_weights(loaded, learned)
    assert replace(loaded, queries={}, temporal={}) == replace(learned, queries={}, temporal={})
    edits = []
    with unchanged(model), torch.inference_mode():
        for weights in (learned, loaded):
            (tuned_model,) = ApplyWeights.execute(model, weights, 1.0, 1.0).result
            inverted = editing.invert(tuned_model, clip, prompts[0], 2)[0]
            edits.append(editing.sample_video(tuned_model, inverted, prompts[1], prompts[0], 2, 5.0)["samples"])
    assert torch.equal(*edits)


def test_content_is_the_strength_of_the_change(model, learned):
    name, halves = next(iter(store.pairs(learned.queries).items()))
    key = f"{name}.weight"
    weights = [
        dict(host.effective_weights(apply_weights(model, learned, content=c), torch.device("cpu"), key.__eq__))[key]
        for c in (0.0, 0.5, 1.0)
    ]
    torch.testing.assert_close(weights[2] - weights[0], halves[0] @ halves[1])
    torch.testing.assert_close(weights[1] - weights[0], 0.5 * (halves[0] @ halves[1]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q: {name: t for name, t in q.items() if "up" in name}, "is no half of a low-rank change"),
        (
            lambda q: {name: t[:, :-1] if "up" in name else t for name, t in q.items()},
            "is no half of a low-rank change",
        ),
        (lambda q: {**q, "gone.weight": torch.zeros(2, 2)}, "gone.weight is no half of a low-rank change"),
        (lambda q: dict(list(q.items())[2:]), "1 of the 8 tuned queries of this MODEL are not in these weights"),
        (lambda q: {name: t[:-1] if "up" in name else t for name, t in q.items()}, "8 of 8 tuned queries do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(model, learned, spoil, message):
    with pytest.raises(ValueError, match=message):
        apply_weights(model, replace(learned, queries=spoil(learned.queries)))


def test_layers_that_a_newer_pack_may_have(learned, folder, tmp_path):
    store.save_file(replace(learned, layers="lighter"), tmp_path / "w.safetensors", "fp32")
    with pytest.raises(ValueError, match="holds unknown layers 'lighter': update the Tune-A-Video pack"):
        store.load_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("deep", [False, True])
def test_the_queries_as_an_ordinary_lora(core, model, light, clip, prompts, loras, folder, deep):
    """The host's own Load LoRA gives the queries that Apply Weights gives."""
    if deep:
        model = build_xl()
        light = host.inflate(model, "video")
        prompts = [[[prompts[0][0][0], {"pooled_output": torch.randn(1, 16)}]]] * 2
    learned = tuned(light, clip, prompts)
    (name,) = SaveWeights.execute(learned, "a/light", "fp32", lora=True).result
    assert name == "a/light_00001.safetensors"
    assert [path.relative_to(loras).as_posix() for path in loras.rglob("*.*")] == [name]
    loader = core["LoraLoaderModelOnly"]()
    (with_lora,) = loader.load_lora_model_only(model, name, 1.0)
    cpu = torch.device("cpu")
    theirs = dict(host.effective_weights(with_lora, cpu))
    ours = dict(host.effective_weights(apply_weights(model, learned), cpu))
    changed = dict(host.effective_weights(model, cpu))
    assert theirs.keys() == ours.keys()
    for key, weight in ours.items():
        assert torch.equal(weight, theirs[key]), key
        assert torch.equal(weight, changed[key]) == (".to_q." not in key), key


def test_a_lora_has_the_name_of_its_weights(light, clip, prompts, loras, folder):
    """Also where each folder has files that the other has not."""
    learned = tuned(light, clip, prompts, 1)
    names = [SaveWeights.execute(learned, "ski", "fp32", lora=lora).result[0] for lora in (False, True)]
    (loras / "ski_00003.safetensors").touch()
    names += SaveWeights.execute(learned, "SKI", "fp32", lora=True).result
    assert names == ["ski_00001.safetensors", "ski_00002.safetensors", "SKI_00004.safetensors"]
    assert {path.name for path in loras.iterdir()} == {*names[1:], "ski_00003.safetensors"}


def test_whole_queries_are_no_lora(inflated, clip, prompts, loras, folder):
    with pytest.raises(ValueError, match="only weights of light layers have a LoRA in them"):
        SaveWeights.execute(tuned(inflated, clip, prompts, 1), "paper", "fp32", lora=True)
    assert not list(folder.iterdir()) and not list(loras.iterdir())


def test_published_where_every_transformer_has_one_block(model, learned, folder):
    (name,) = ExportPublished.execute(model, learned, "light").result
    weights, _report = LoadPublished.execute(model, name).result
    assert weights.layers == PAPER
    for key, (up, down) in store.pairs(learned.queries).items():
        torch.testing.assert_close(weights.queries[f"{key}.weight"], up @ down, rtol=1e-4, atol=1e-6)
    deep = build_xl()
    prompt = [[[torch.randn(1, 7, 16), {"pooled_output": torch.randn(1, 16)}]]] * 2
    of_xl = tuned(host.inflate(deep, "video"), {"samples": torch.randn(2, 4, 8, 8)}, prompt, 1)
    with pytest.raises(ValueError, match="one temporal attention a transformer, published models one a block"):
        ExportPublished.execute(deep, of_xl, "deep")


def test_a_merged_tune_is_refused(core, make_model, learned, clip, prompts):
    merged = core["ModelMergeSimple"]().merge(
        host.inflate(make_model(1), "video"), apply_weights(make_model(), learned), 0.5
    )[0]
    with torch.inference_mode(), pytest.raises(ValueError, match="this MODEL was merged with a tuned one"):
        editing.invert(merged, clip, prompts[0], 2)
