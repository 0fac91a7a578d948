"""What a stranger's graph or file can try: names that leave their folder, and inputs of any kind."""

import json
import os
import shutil
import struct
import traceback
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack import PROJECT
from safetensors.torch import load_file, save
from tune_a_video.demo import world
from tune_a_video.nodes import (
    ApplyWeights,
    CompareVideos,
    DDIMInvert,
    DemoClip,
    ExportPublished,
    InflateUNet,
    LoadPublished,
    LoadWeights,
    OneShotTune,
    PrepareClip,
    SampleVideo,
    SaveWeights,
)
from tune_a_video.tav_core import host
from tune_a_video.tav_core.pipeline import library
from tune_a_video.tav_core.store import files, weights

BAD_NAMES = [
    # absolute, on any system
    "/etc/passwd", "//server/share/x", "/", "\\", "\\\\server\\share\\x", "\\\\?\\C:\\x", "\\\\.\\NUL", "C:\\x", "C:x",
    "c:/windows/x", "Z:", "file:///etc/passwd", "file:x", "name:stream", "x.safetensors::$DATA",
    # upwards
    "..", "../x", "../../../../etc/passwd", "a/../x", "a/../../x", "a/..", "..\\x", "a\\..\\..\\x", "a/..\\../x", "./x",
    "a/./x", ".", "...", "a/.../x", "../tune_a_video_secret/x", "../tune_a_video/../x", " ../x", "a/ ../x",
    "..\u200b/x",
    # nothing, empty parts, hidden files
    "", " ", "a//x", "a/", "a\\", "/a", ".hidden", "a/.git/x", ".x.tmp",
    # invisible characters
    "x\0", "\0", "x\0.safetensors", "../x\0.safetensors", "a\nb", "a\rb", "a\tb", "\x1b[31mx", "a\x7fb", "a\u202eb",
    "a\u2028b", "\udcff", "\ud800x", "\ufeffx",
    # what Windows does not take
    "CON", "con", "nul", "NUL.safetensors", "aux.txt", "PRN", "COM1", "com9.safetensors", "LPT1", "lpt0", "COM¹",
    "CONIN$", "CONOUT$", "a/nul/x", "nul .x", "x.", "x ", "a./x", "a /x", "a<b", "a>b", 'a"b', "a|b", "a?b", "a*b",
    # too long
    "x" * 201, "é" * 101, "a/" + "x" * 5000, "x" * 100_000,
    # links to outside, made by the fixture
    "link.safetensors", "link", "linked/secret.safetensors", "linked/x", "linked", "dangling.safetensors",
    # no text at all
    None, 3, True, b"x", ["x"], {"x": 1},
]  # fmt: skip


@pytest.fixture
def trap(folder):
    """The folder, with links in it that lead out of it to files that must not be read or written."""
    outside = folder.parent / "tune_a_video_secret"
    outside.mkdir()
    (outside / "secret.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    links = {
        "link.safetensors": outside / "secret.safetensors",
        "link_00001.safetensors": outside / "secret.safetensors",
        "link": outside,
        "linked": outside,
        "dangling.safetensors": outside / "new.safetensors",
        "loop": folder / "loop",
    }
    try:
        for name, target in links.items():
            (folder / name).symlink_to(target)
    except OSError:
        pytest.skip("this system lets only administrators make links")
    return folder


def tree(folder):
    """Everything at and around a folder, with its content."""
    return {
        str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.parent.rglob("*"))
    }


WRITES_UNDER = ("link.safetensors", "dangling.safetensors")  # as prefixes these are plain names


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:40])
def test_bad_names(trap, model, make_weights, name):
    learned = make_weights(model)
    attempts = {
        "save": lambda: SaveWeights.execute(learned, name, "fp32"),
        "export": lambda: ExportPublished.execute(model, learned, name),
        "load": lambda: LoadWeights.execute(name),
        "load published": lambda: LoadPublished.execute(model, name),
        "stamp": lambda: LoadWeights.fingerprint_inputs(name),
        "stamp published": lambda: LoadPublished.fingerprint_inputs(model, name),
    }
    if name in WRITES_UNDER:
        del attempts["save"], attempts["export"]
    if name is None:  # another node makes the name: what it is will be seen when it is read
        del attempts["stamp"], attempts["stamp published"]
    before = tree(trap)
    for what, attempt in attempts.items():
        with pytest.raises(ValueError, match="^the name ") as error:
            attempt()
        assert "\n" not in str(error.value) and str(error.value).isprintable(), what
        assert len(str(error.value)) < 300, what
    if name is not None:
        assert str(LoadWeights.validate_inputs(name)).startswith("the name ")
        assert str(LoadPublished.validate_inputs(name)).startswith("the name ")
    assert tree(trap) == before


def test_lists_name_nothing_that_is_refused(trap, model, make_weights):
    """Of files that are there: some are refused for their names, some for where they lead."""
    (trap / "plain.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    for name in (".hidden.safetensors", "a/.git/x.safetensors", "a /x.safetensors", "aux.safetensors"):
        if os.name != "nt":
            (trap / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(trap / "plain.safetensors", trap / name)
    published = Path(ExportPublished.execute(model, make_weights(model), "published").result[0])
    for name in ("linked_model", ".hidden_model"):
        shutil.copytree(trap / published, trap.parent / "tune_a_video_secret" / name)
    (trap / "linked_model").symlink_to(trap.parent / "tune_a_video_secret" / "linked_model")
    shutil.copytree(trap / published, trap / ".hidden_model")
    assert set(library.weights_list()) == {"plain.safetensors", f"{published}/unet/diffusion_pytorch_model.safetensors"}
    assert set(library.published_list()) == {"plain.safetensors", str(published)}


def test_a_link_in_the_way_is_never_written_through(trap, model, make_weights):
    learned = make_weights(model)
    secret = (trap.parent / "tune_a_video_secret" / "secret.safetensors").read_bytes()
    (trap / "dangling_00001.safetensors").symlink_to(trap.parent / "tune_a_video_secret" / "new.safetensors")
    assert SaveWeights.execute(learned, "dangling", "fp32").result == ("dangling_00002.safetensors",)
    weights.save_file(learned, trap / "link.safetensors", "fp32")  # replaces the link itself
    assert not (trap / "link.safetensors").is_symlink()
    outside = trap.parent / "tune_a_video_secret"
    assert [path.name for path in outside.iterdir()] == ["secret.safetensors"]
    assert (outside / "secret.safetensors").read_bytes() == secret


PLAIN = ["x", "man skiing", "a/b/c", "a\\b", "émigré", "滑雪", "x.y.z", "console", "com10", "nul_", "~", "$HOME", "-rf"]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names(folder, model, make_weights, name):
    learned = make_weights(model)
    (saved,) = SaveWeights.execute(learned, name, "fp32").result
    (published,) = ExportPublished.execute(model, learned, name).result
    assert saved == name.replace("\\", "/") + "_00001.safetensors"
    assert saved in {listed.replace("\\", "/") for listed in library.weights_list()}
    LoadWeights.execute(saved)
    LoadWeights.execute(saved.replace("/", "\\"))
    LoadPublished.execute(model, published)
    assert {path.resolve().is_relative_to(folder.resolve()) for path in folder.rglob("*")} == {True}


def test_links_that_go_in_circles(trap, model, make_weights):
    for run in (lambda: LoadWeights.execute("loop/x"), lambda: LoadPublished.execute(model, "loop")):
        with pytest.raises(ValueError, match="there is no 'loop"):
            run()
    with pytest.raises(ValueError, match="the folder for 'loop/x' could not be made: (File exists|Too many levels)"):
        SaveWeights.execute(make_weights(model), "loop/x", "fp32")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_opened(folder):
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(ValueError, match="there is no 'pipe.safetensors'"):
        LoadWeights.execute("pipe.safetensors")


# --- any inputs -------------------------------------------------------------------------------------------------


def examples(count):
    """Run a test on so many random inputs, the same in every run: 2,000 of nodes in all, and 550 of files."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=[*checks])


OURS = [PROJECT / "nodes", PROJECT / "demo", *(PROJECT / "tav_core").iterdir()]


ENDS: dict[int, list[bool]] = defaultdict(list)  # of each call in a test, by its line: did it give a result?


@pytest.fixture(autouse=True)
def a_third_succeeds():
    """What refuses everything would end every example well."""
    ENDS.clear()
    yield
    for line, results in ENDS.items():
        assert sum(results) >= len(results) / 3, f"line {line}: {sum(results)} of {len(results)} examples gave a result"


def ends_well(run):
    """A result, or one line that explains itself; anything else fails the test, as do results of too few examples."""
    result = answer(run)
    ENDS[run.__code__.co_firstlineno].append(result is not None)
    return result


def answer(run):
    """A result, or None after one line that explains itself."""
    try:
        with torch.inference_mode():
            return run()
    except (ValueError, FloatingPointError) as error:
        message = str(error)
        assert "\n" not in message and 20 < len(message) < 400, message
        # Our own words, not those of what is inside.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert raised_in.parent in OURS, raised_in
        return None


# Links carry values past the bounds of the schema.
numbers = st.one_of(
    st.sampled_from([0, 1, -1, 8, 64, 2**31, 2**63, -(2**63), 0.0, 1e-30, 1e30, float("nan"), float("inf"), -0.5]),
    st.integers(-10, 600),
    st.floats(),
)
few_steps = st.one_of(st.integers(-2, 3), st.sampled_from([501, 10**6, -(2**40)]))
# Good values vary as well: an example that was tried is not tried again.
plain_names = st.text("abcxyzé滑_-", min_size=1, max_size=8)
bad_names = st.one_of(
    st.sampled_from([name for name in BAD_NAMES if isinstance(name, str)]),
    st.text(max_size=12),
    st.text("abc./\\:é\0 ~", max_size=12),
)


def tensors(rank, sizes=(0, 1, 2, 3, 4, 5, 7, 8)):
    """Tensors of any kind, most of them near to `rank`."""

    @st.composite
    def draw(pick):
        shape = pick(st.lists(st.sampled_from(sizes), min_size=max(rank - 1, 0), max_size=rank + 1))
        kind = pick(st.sampled_from([torch.float32] * 4 + [torch.float16, torch.bfloat16, torch.float64, torch.int64]))
        scale = pick(st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e30, float("nan"), float("inf")]))
        generator = torch.Generator().manual_seed(pick(st.integers(0, 9)))
        values = torch.randn(shape, generator=generator) * scale
        return torch.nan_to_num(values).clamp(-100, 100).to(kind) if kind == torch.int64 else values.to(kind)

    return draw()


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


GOOD_LATENTS = {"samples": 5 * randn(5, 4, 8, 8)}
GOOD_TEXT = [[randn(1, 7, 16), {}]]


def mostly(good, strategy, of=5):
    """A good value (or one of those of a strategy) but for one time of so many."""
    goods = good if isinstance(good, st.SearchStrategy) else st.just(good)
    return st.integers(0, of - 1).flatmap(lambda draw: strategy if draw == 1 else goods)  # 0 is drawn more often


@st.composite
def latents(pick):
    if pick(st.booleans()):
        frames, channels = pick(st.sampled_from([1, 2, 5])), pick(st.sampled_from([4, 4, 4, 8]))
        height, width = pick(st.sampled_from([(8, 8), (8, 4), (2, 2), (1, 1), (5, 7), (3, 8)]))
        scale = pick(st.sampled_from([1.0, 20.0, 0.0, 1e-30, 1e20]))
        samples = randn(frames, channels, height, width) * scale
    else:
        samples = pick(tensors(4))
    steps = pick(st.sampled_from([None, None, 1, 2, 3]))
    return {"samples": samples, **({host.KEY: {"steps": steps}} if steps else {})}


@st.composite
def conditionings(pick):
    many = pick(st.sampled_from([1, 1, 1, 1, 0, 2]))
    good = st.sampled_from([randn(1, 7, 16), randn(5, 3, 16), randn(1, 1, 16)])
    return [[pick(st.one_of(good, good, tensors(3, (0, 1, 5, 7, 16, 17)))), {}] for _ in range(many)]


@pytest.fixture
def written(folder, models, make_weights):
    """What a good weights file and a good published model of `models[3]` hold."""
    weights.save_file(make_weights(models[3]), folder / "good.safetensors", "fp32")
    (name,) = ExportPublished.execute(models[3], make_weights(models[3]), "good").result
    unet = folder / name / "unet"
    state = load_file(unet / "diffusion_pytorch_model.safetensors")
    config = json.loads((unet / "config.json").read_text(encoding="utf-8"))
    return (folder / "good.safetensors").read_bytes(), state, config


@pytest.fixture(scope="module")
def models():
    """MODELs of every kind that a graph can hold."""
    from small import TINY, random_weights
    from tune_a_video.tav_core.method.inflation import TemporalLayers
    from tune_a_video.tav_core.store import published

    def build(prediction_type="epsilon", **config):
        # Twice as wide as tiny: with one channel a group, torch has rules for one pixel that no real model meets.
        unet_config = published.to_unet_config({**TINY, "block_out_channels": [64, 64], **config})
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            return host.build_model(unet_config, random_weights(unet_config, generator), prediction_type)

    plain, velocity, wide = build(), build("v_prediction"), build(cross_attention_dim=24)
    inflated = host.inflate(plain, "video")
    layers = TemporalLayers(host.parts_of(host.unet_of(plain)))
    generator = torch.Generator().manual_seed(1)
    layers.assign({name: torch.randn(p.shape, generator=generator) for name, p in layers.named().items()})
    five = host.with_inflation(plain, host.Inflation(layers, "per_frame", 5))
    return [inflated, inflated, inflated, plain, velocity, host.inflate(velocity, "per_frame"), wide, five]


def which(values):
    return st.integers(0, len(values) - 1).map(lambda index: values[index])


@examples(550)
@given(data=st.data())
def test_prepare_clip_with_any_inputs(data):
    sizes = st.one_of(st.sampled_from([8, 16, 24, 64]), st.integers(-8, 70), st.sampled_from([2**31, -(2**63), 10**9]))
    counts = st.one_of(st.integers(-3, 12), st.just(2**63))
    ends_well(
        lambda: PrepareClip.execute(
            data.draw(mostly(randn(9, 8, 12, 3).clamp(0, 1), tensors(4))),
            data.draw(mostly(st.integers(0, 2), counts)),
            data.draw(mostly(st.integers(1, 2), counts)),
            data.draw(mostly(st.integers(1, 3), counts)),
            data.draw(mostly(st.sampled_from([8, 16, 24, 64]), sizes)),
            data.draw(mostly(st.sampled_from([8, 16, 24, 64]), sizes)),
            data.draw(mostly("crop", st.sampled_from(["pad", "stretch", "tile", ""]))),
            data.draw(mostly(st.floats(1, 60), numbers)),
        )
    )


@examples(100)
@given(data=st.data())
def test_inflate_and_apply_with_any_inputs(data, models, make_weights):
    model = data.draw(mostly(models[3], which(models)))
    ends_well(lambda: InflateUNet.execute(model, data.draw(st.sampled_from(["video", "per_frame", "video", ""]))))
    learned = make_weights(data.draw(which(models)), group_norm=data.draw(st.sampled_from(["video", "per_frame"])))
    learned = replace(learned, frames=data.draw(st.sampled_from([None, 2, 5])))
    applied = ends_well(lambda: ApplyWeights.execute(model, learned, data.draw(numbers), data.draw(numbers)))
    if applied is not None:
        clip = data.draw(mostly(GOOD_LATENTS, latents()))
        ends_well(lambda: DDIMInvert.execute(applied.result[0], clip, GOOD_TEXT, 1))


@examples(100)
@given(data=st.data())
def test_tune_with_any_inputs(data, models):
    ends_well(
        lambda: OneShotTune.execute(
            data.draw(mostly(models[0], which(models), 12)),
            data.draw(mostly(GOOD_LATENTS, latents(), 12)),
            data.draw(mostly(GOOD_TEXT, conditionings(), 12)),
            data.draw(mostly(2, st.integers(-1, 2), 12)),
            data.draw(mostly(1e-3, numbers, 12)),
            data.draw(mostly(33, st.integers(), 12)),
            data.draw(st.sampled_from(["auto", "fp32", "bf16"])),
            data.draw(mostly(0.01, numbers, 12)),
            data.draw(mostly(1.0, numbers, 12)),
            data.draw(st.sampled_from(["auto", "restart"])),
            data.draw(st.integers(1, 3)),
            data.draw(st.sampled_from(["auto", "fast", "low"])),
            data.draw(st.integers(1, 3)),
            data.draw(mostly(None, conditionings(), 12)),
            data.draw(mostly(None, conditionings(), 12)),
        )
    )


@examples(250)
@given(data=st.data())
def test_invert_with_any_inputs(data, models):
    inputs = (
        mostly(models[0], which(models)),
        mostly(GOOD_LATENTS, latents()),
        mostly(GOOD_TEXT, conditionings()),
        mostly(2, few_steps),
    )
    ends_well(lambda: DDIMInvert.execute(*map(data.draw, inputs)))


@examples(200)
@given(data=st.data())
def test_sample_with_any_inputs(data, models):
    text = mostly(GOOD_TEXT, conditionings())
    start = {"samples": 15 * GOOD_LATENTS["samples"], host.KEY: {"steps": 2}}
    inputs = mostly(models[0], which(models)), mostly(start, latents()), text, text, mostly(2, few_steps), numbers
    ends_well(lambda: SampleVideo.execute(*map(data.draw, inputs)))


@examples(250)
@given(name=mostly(plain_names, bad_names, 2), precision=st.sampled_from(["fp32", "fp16"]))
def test_save_and_load_under_any_name(trap, models, make_weights, name, precision):
    outside = {path: path.stat().st_mtime_ns for path in trap.parent.rglob("*") if not path.is_relative_to(trap)}
    learned = make_weights(models[3])
    saved = ends_well(lambda: SaveWeights.execute(learned, name, precision).result[0])
    if saved is not None:
        assert (trap / saved).resolve().is_relative_to(trap.resolve())
        LoadWeights.execute(saved)
        assert answer(lambda: LoadPublished.execute(models[3], saved)) is None
    assert answer(lambda: LoadWeights.execute(name)) is None
    after = {path: path.stat().st_mtime_ns for path in trap.parent.rglob("*") if not path.is_relative_to(trap)}
    assert after == outside


@examples(200)
@given(name=mostly(plain_names, bad_names, 3), data=st.data())
def test_export_under_any_name(trap, models, make_weights, name, data):
    base, tuned = (data.draw(mostly(models[3], which(models))) for _ in range(2))
    learned = make_weights(tuned)
    saved = ends_well(lambda: ExportPublished.execute(base, learned, name).result[0])
    if saved is not None:
        assert (trap / saved).resolve().is_relative_to(trap.resolve())
        ends_well(lambda: LoadPublished.execute(base, saved))
        shutil.rmtree(trap / saved)


@examples(150)
@given(data=st.data())
def test_compare_with_any_inputs(data):
    sides = st.integers(1, 9)
    clips = st.builds(lambda frames, height, width: randn(frames, height, width, 3), sides, sides, sides)
    videos = {f"video_{i}": data.draw(mostly(clips, tensors(4))) for i in (1, 2)}
    videos |= {f"video_{i}": data.draw(mostly(None, tensors(4), 20)) for i in range(3, 7)}
    ends_well(
        lambda: CompareVideos.execute(data.draw(mostly(st.text("ab\n", max_size=9), st.text(max_size=40))), **videos)
    )


@examples(200)
@given(data=st.data())
def test_demo_clip_with_any_inputs(data):
    def name(good, names):
        return data.draw(mostly(good, st.sampled_from(list(names)) | st.text(max_size=5)))

    parts = name("arc", world.MOTIONS), name("dog", world.LOOKS), name("snow", world.BACKGROUNDS)
    counts = data.draw(mostly(2, st.integers(-2, 4))), data.draw(mostly(64, st.integers(-8, 80)))
    ends_well(lambda: DemoClip.execute(*parts, *counts, data.draw(mostly(0, st.integers()))))


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6))
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


@examples(450)
@given(data=st.data())
def test_any_header(folder, models, written, data):
    """A good file whose header a stranger edited, or bytes in its place."""
    path, raw = folder / "x.safetensors", written[0]
    (length,) = struct.unpack("<Q", raw[:8])
    header, rest = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = data.draw(st.sampled_from([*["note"] * 5, "metadata", "entry", "field", "bytes", "length", "header"]))
    if kind == "note":
        header["__metadata__"]["note"] = data.draw(st.text())
    elif kind == "metadata":
        key = data.draw(st.sampled_from(sorted(header["__metadata__"])))
        header["__metadata__"][key] = data.draw(st.one_of(st.text(), anything, st.just("[" * 9999)))
    elif kind == "entry":
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(anything)
    elif kind == "field":
        entry = header[data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))]
        lists = st.lists(st.one_of(st.integers(0, 2**70), st.sampled_from([0, 1, 32])), max_size=4)
        entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(st.one_of(anything, lists))
    text = json.dumps(data.draw(anything) if kind == "header" else header).encode("utf-8", "replace")
    if kind == "bytes":
        at, new = data.draw(st.integers(0, len(text) - 1)), data.draw(st.binary(min_size=1, max_size=9))
        text = text[:at] + new + text[at + len(new) :]
    claimed = data.draw(st.integers(0, 2**64 - 1)) if kind == "length" else len(text)
    path.write_bytes(struct.pack("<Q", claimed) + text + rest)
    loaded = ends_well(lambda: LoadWeights.execute(path.name).result[0])
    if loaded is not None:
        ends_well(lambda: ApplyWeights.execute(models[3], loaded, 1.0, 1.0))


@examples(100)
@given(data=st.data())
def test_any_published_tensors(folder, models, written, data):
    """A published model of which a stranger renamed, left out, reshaped or retyped tensors, or its configuration."""
    base = models[3]
    state, config = (dict(part) for part in written[1:])
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(state)))
        tensor = state.pop(name)
        change = data.draw(st.sampled_from(["drop", "rename", "shape", "kind", "value", "tensor"]))
        if change == "rename":
            state[data.draw(st.text(max_size=8))] = tensor
        elif change == "shape":
            state[name] = tensor.flatten()[: data.draw(st.integers(0, tensor.numel()))].clone()
        elif change == "kind":
            state[name] = tensor.to(data.draw(st.sampled_from([torch.float16, torch.float64, torch.int64, torch.bool])))
        elif change == "value":
            state[name] = torch.full_like(tensor, data.draw(st.floats(width=32)))
        elif change == "tensor":
            state[name] = data.draw(tensors(2))
    target = folder / "bad" / "unet"
    target.mkdir(parents=True, exist_ok=True)
    if data.draw(mostly(False, st.just(True))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(anything)
    files.write_json(target / "config.json", config)
    try:
        (target / "diffusion_pytorch_model.safetensors").write_bytes(save(state))
    except UnicodeEncodeError:  # a name of lone surrogates cannot be in a file
        return
    learned = ends_well(lambda: LoadPublished.execute(base, "bad").result[0])
    if learned is not None:
        ends_well(lambda: ApplyWeights.execute(base, learned, 1.0, 1.0))
