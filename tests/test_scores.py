"""What is measured on an edit: against clips whose figures are known, and against the formulas written out plainly."""

import json
import math

import comfy.clip_vision
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import pytest
import torch
from tune_a_video.demo import model
from tune_a_video.nodes.scores import FIGURES, ScoreVideo
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import metrics
from tune_a_video.tav_core.pictures.plot import HEIGHT, PANEL, WORST, Curve, frame_curves
from tune_a_video.tav_core.pipeline import flow, scores

needs_opencv = pytest.mark.skipif(flow.dis() is None, reason="OpenCV is not installed")
FLOW = ("motion", "motion_error", "motion_cosine", "warp_error")


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def texture(height=160, width=160):
    """A smooth picture without a repetition, [h, w, 3]."""
    small = random(1, 3, height // 8, width // 8)
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic")[0].movedim(0, -1).clamp(0, 1)


def moving(x, y, frames=4, size=128):
    """A window that goes over a picture by so many pixels a frame."""
    whole = texture()
    at = [(16 + x * i, 16 + y * i) for i in range(frames)]
    return torch.stack([whole[b : b + size, a : a + size] for a, b in at])


def measured(*clips, **more):
    return {each.key: each for each in scores.score(*clips, **more)}


def means(*clips, **more):
    return {key: scores.mean(each.edit) for key, each in measured(*clips, **more).items()}


# --- the formulas, written out ------------------------------------------------------------------------------------


def test_flicker_sharpness_and_psnr_are_their_formulas():
    a, b = random(3, 9, 7, 3), random(3, 9, 7, 3, seed=1)
    for i, value in enumerate(metrics.flicker(a).tolist()):
        steps = [abs(float(p - q)) for p, q in zip(a[i].flatten(), a[i + 1].flatten(), strict=True)]
        assert value == pytest.approx(255 * sum(steps) / len(steps), rel=1e-5)
    grey = [[[255 * float(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in row] for row in p] for p in a]
    for picture, value in zip(grey, metrics.sharpness(a).tolist(), strict=True):
        edges = []
        for y in range(9):
            for x in range(7):  # the border is mirrored, the outermost pixel not twice
                ends = [(abs(y - 1), x), (8 - abs(8 - y - 1), x), (y, abs(x - 1)), (y, 6 - abs(6 - x - 1))]
                edges.append(sum(picture[v][u] for v, u in ends) - 4 * picture[y][x])
        middle = sum(edges) / len(edges)
        assert value == pytest.approx(sum((e - middle) ** 2 for e in edges) / len(edges), rel=1e-4)
    where = random(3, 9, 7, seed=2) > 0.5
    for i, value in enumerate(metrics.psnr(a, b, where).tolist()):
        errors = (a[i] - b[i])[where[i]].double()
        assert value == pytest.approx(10 * math.log10(1 / float((errors**2).mean())), rel=1e-5)
    assert metrics.psnr(a, b, torch.zeros(3, 9, 7, dtype=torch.bool)).isnan().all()


def test_ssim_is_the_mean_of_windows_and_leaves_out_those_that_do_not_count():
    a, b = random(2, 14, 13, 3), random(2, 14, 13, 3, seed=1)
    where = torch.ones(2, 14, 13, dtype=torch.bool)
    where[1, 0, 0] = False  # one window of the second picture
    weights = torch.tensor(
        [[math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / 4.5) for x in range(11)] for y in range(11)]
    ).double()
    weights /= weights.sum()
    for i in range(2):
        found = []
        for y in range(4):
            for x in range(3):
                if not where[i, y : y + 11, x : x + 11].all():
                    continue
                for c in range(3):
                    p, q = (clip[i, y : y + 11, x : x + 11, c].double() for clip in (a, b))
                    mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                    var_p, var_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
                    both = (weights * (p - mean_p) * (q - mean_q)).sum()
                    top = (2 * mean_p * mean_q + 1e-4) * (2 * both + 9e-4)
                    found.append(float(top / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))))
        assert metrics.ssim(a, b, where)[i].item() == pytest.approx(sum(found) / len(found), abs=1e-5)
    assert metrics.ssim(a, a).tolist() == pytest.approx([1, 1])
    where[:] = False
    assert metrics.ssim(a, b, where).isnan().all()


def cosine(p, q):
    return float((p * q).sum() / p.norm() / q.norm())


def test_features_are_compared_as_vbench_and_v2vbench_do():
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    for i in range(1, 5):
        before, first = cosine(features[i], features[i - 1]), cosine(features[i], features[0])
        assert metrics.cosine_to_previous(features)[i - 1].item() == pytest.approx(before, abs=1e-6)
        assert metrics.consistency(features)[i - 1].item() == pytest.approx(
            (max(before, 0) + max(first, 0)) / 2, abs=1e-6
        )
    text = torch.randn(6, generator=torch.Generator().manual_seed(4))
    expected = [100 * cosine(frame, text) for frame in features]
    assert metrics.text_alignment(features, text).tolist() == pytest.approx(expected, abs=1e-4)


def test_flows_are_compared_by_their_ends_and_directions():
    a, b = (4 * torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a[0, 0, 0] = 0.1  # does not move
    for i in range(2):
        ends = [math.dist(p, q) for p, q in zip(a[i].flatten(0, 1), b[i].flatten(0, 1), strict=True)]
        assert metrics.end_point_error(a, b)[i].item() == pytest.approx(sum(ends) / 12, rel=1e-5)
        pairs = [(p, q) for p, q in zip(a[i].flatten(0, 1), b[i].flatten(0, 1), strict=True) if p.norm() >= 0.5]
        assert metrics.flow_cosine(a, b)[i].item() == pytest.approx(
            sum(cosine(*p) for p in pairs) / len(pairs), abs=1e-5
        )
    still = torch.zeros(2, 3, 4, 2)
    assert metrics.end_point_error(still, a).tolist() == pytest.approx(metrics.flow_length(a).tolist())
    assert metrics.flow_cosine(still, a).isnan().all()


def test_a_known_warp_is_undone_and_what_leaves_the_picture_is_left_out():
    before = random(1, 12, 12, 3)
    after = before.roll((2, -3), (1, 2))  # a pixel of it was 2 higher and 3 further right
    back = torch.tensor([3.0, -2.0]).expand(1, 12, 12, 2)
    difference = metrics.warp_difference(before, after, back)
    assert difference[:, 2:, :9].abs().max() < 1e-2
    assert difference[:, :2].isnan().all() and difference[:, :, 9:].isnan().all()
    half = metrics.warp_difference(before, after, back - torch.tensor([0.5, 0]))
    naive = 255 * ((before[0, 0, 3] + before[0, 0, 2]) / 2 - after[0, 2, 0]).abs().max()
    assert half[0, 2, 0].max().item() == pytest.approx(float(naive), rel=1e-4)


def test_the_warp_error_counts_where_the_sources_flow_holds():
    source, edit = torch.full((3, 10, 10, 3), 1.0), torch.full((3, 10, 10, 3), 2.0)
    source[1, :3], edit[1, :3] = 6, 100  # 70 % hold
    source[2, :3, :], source[2, 3, 0] = 6, torch.nan  # 69 %
    edit[1, 9, 9, 2], edit[0, 0, 0] = 72, torch.nan
    source[0, 0, 0] = torch.nan
    source[1, 9, 9, 2] = 36  # in grey it is 4.99
    mine, theirs = metrics.warp_error(source, edit)
    assert mine[:2].tolist() == pytest.approx([2, 3]) and theirs[:2].tolist() == pytest.approx([1, 1.5])
    assert mine[2].isnan() and theirs[2].isnan()


# --- clips whose figures are known --------------------------------------------------------------------------------


@needs_opencv
def test_motion_is_that_of_the_clips():
    clip = moving(3, 1)  # 128 pixels become 512: 12 and 4 pixels
    same = means(clip, clip)
    assert same["motion"] == pytest.approx(math.hypot(12, 4), rel=0.1)
    assert same["motion_error"] == 0 and same["motion_cosine"] == pytest.approx(1, abs=1e-5)
    assert same["warp_error"] < 5
    recoloured = means(clip, 1 - clip)
    assert recoloured["motion_error"] < 1 and recoloured["motion_cosine"] > 0.98
    frozen = measured(clip, clip[:1].expand_as(clip))
    assert scores.mean(frozen["motion"].edit) == pytest.approx(0, abs=0.2)
    assert scores.mean(frozen["motion_error"].edit) == pytest.approx(scores.mean(frozen["motion"].source), rel=0.05)
    assert scores.mean(frozen["warp_error"].edit) > 3 * scores.mean(frozen["warp_error"].source)
    back = means(clip, clip.flip(0))
    assert back["motion_cosine"] < -0.9 and back["motion_error"] == pytest.approx(2 * math.hypot(12, 4), rel=0.1)


@needs_opencv
def test_noise_and_shuffled_frames_are_found():
    clip = moving(2, 0, frames=5)
    noisy = (clip + 0.2 * (random(*clip.shape) - 0.5)).clamp(0, 1)
    good, bad, shuffled = means(clip, clip), means(clip, noisy), means(clip, clip[[0, 3, 1, 4, 2]])
    for other in (bad, shuffled):
        assert other["warp_error"] > 2 * good["warp_error"] and other["flicker"] > 1.2 * good["flicker"]
    assert shuffled["motion_error"] > 10 and bad["sharpness"] > 2 * good["sharpness"]
    jump = clip.clone()
    jump[3] = 1 - jump[3]
    assert measured(clip, jump)["warp_error"].worst in (3, 4)


def test_a_still_clip_has_no_motion_to_compare():
    still = texture().expand(3, -1, -1, -1)
    found = measured(still, still)
    if flow.dis() is not None:
        assert found["motion_cosine"].missing == "the source moves too little"
    assert scores.mean(found["flicker"].edit) == 0 and scores.mean(found["flicker"].source) == 0


def test_without_opencv_the_rest_is_measured(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    clip = moving(1, 0)
    found = measured(clip, clip)
    assert {key for key, each in found.items() if "opencv-python-headless" in each.missing} == set(FLOW)
    assert found["flicker"].edit is not None and "opencv" in scores.table(found.values())


def test_the_background_is_what_the_mask_leaves():
    clip = 0.8 * moving(0, 0)
    edit = clip.clone()
    edit[:, 40:60, 40:60] = 0
    mask = torch.zeros(1, 128, 128)
    mask[:, 40:60, 40:60] = 1
    kept = measured(clip, edit, mask=mask)
    assert kept["background_psnr"].edit.tolist() == [100] * 4 and scores.mean(kept["background_ssim"].edit) == 1
    edit[2, :, 100:] += 0.1
    found = measured(clip, edit, mask=mask)
    expected = -10 * math.log10(0.01 * 28 * 128 / (128 * 128 - 400))
    assert found["background_psnr"].edit[2].item() == pytest.approx(expected, abs=0.01)
    assert found["background_psnr"].worst == 2 == found["background_ssim"].worst
    small = torch.nn.functional.avg_pool2d(mask, 4)  # as a mask of the latents would be
    assert measured(clip, clip, mask=small)["background_psnr"].edit.tolist() == [100] * 4
    thin = torch.ones(1, 128, 128)
    thin[:, :, :4] = 0
    assert "window of 11 x 11" in measured(clip, edit, mask=thin)["background_ssim"].missing


def test_what_does_not_fit_is_said():
    clip = moving(0, 0)
    for other, words in (
        (clip[:3], "source has 4 frames of 128 x 128 and edit 3 frames"),
        (clip[0], "edit has no frames: connect images"),
        (clip[:1], "edit has 1 frames of 128 x 128 pixels: a clip of 2"),
        (clip * torch.nan, "edit holds NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            scores.score(clip, other)
    with pytest.raises(ValueError, match="mask is nowhere black"):
        scores.score(clip, clip, torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="mask holds 3 pictures: one is needed, or one for each of the 4"):
        scores.score(clip, clip, torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="connect clip_vision as well"):
        scores.score(clip, clip, clip=object(), prompt="a dog")
    with pytest.raises(ValueError, match="edit_prompt is empty"):
        scores.score(clip, clip, vision=object(), clip=object(), prompt=" ")


# --- the host's CLIP ----------------------------------------------------------------------------------------------


def fill(module, seed=0):
    """Random weights of the usual scale, into a module that the host left without."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        one = 1.0 if name.endswith("weight") and weight.ndim == 1 else 0.0
        spread = 1 / math.prod(weight.shape[1:]) ** 0.5 if weight.ndim > 1 else 0.1
        weight.requires_grad = False
        weight.data = (one + spread * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


@pytest.fixture
def vision(tmp_path):
    """A small CLIP_VISION of the host's own class."""
    config = {"hidden_act": "gelu", "hidden_size": 32, "image_size": 56, "intermediate_size": 64, "num_channels": 3}
    config |= {"model_type": "clip_vision_model", "num_attention_heads": 2, "num_hidden_layers": 2, "patch_size": 14}
    (tmp_path / "vision.json").write_text(json.dumps({**config, "projection_dim": 24}), encoding="utf-8")
    model = comfy.clip_vision.ClipVisionModel(str(tmp_path / "vision.json"))
    fill(model.model)
    return model


@pytest.fixture
def clip_h():
    """A small CLIP of Stable Diffusion 2's class, whose text tower has its projection."""
    kinds = comfy.text_encoders.sd2_clip
    target = comfy.supported_models_base.ClipTarget(kinds.SD2Tokenizer, kinds.SD2ClipModel)
    size = {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "clip_h_model_config": size})
    fill(clip.cond_stage_model)
    return clip


def test_frames_and_texts_are_compared_as_the_host_sees_them(vision, clip_h):
    clip = moving(3, 0)
    texts = {"caption": "a cat", "prompt": "a dog"}
    found = measured(clip, 1 - clip, vision=vision, clip=clip_h, **texts)
    seen, source_seen = (vision.encode_image(x)["image_embeds"] for x in (1 - clip, clip))
    dog, cat = (
        clip_h.encode_from_tokens(clip_h.tokenize(text), return_pooled=True)[1][0] for text in ("a dog", "a cat")
    )
    for features, values in ((seen, found["text_alignment"].edit), (source_seen, found["text_alignment"].source)):
        assert values.tolist() == pytest.approx([100 * cosine(x, dog) for x in features], abs=1e-3)
    assert found["edit_success"].edit.tolist() == [float(cosine(x, dog) > cosine(x, cat)) for x in seen]
    expected = [(cosine(x, y) + cosine(x, seen[0])) / 2 for x, y in zip(seen[1:], seen[:-1], strict=True)]
    assert found["frame_consistency"].edit[1:].tolist() == pytest.approx(expected, abs=1e-5)
    assert found["frame_consistency"].edit[0].isnan()

    tower = vision.model.vision_model  # the whole tower's output before its projection, without the host's wrapper
    plain = tower(comfy.clip_vision.clip_preprocess(1 - clip, size=56))[2]
    expected = [cosine(x, y) for x, y in zip(plain[1:], plain[:-1], strict=True)]
    assert found["neighbour_consistency"].edit[1:].tolist() == pytest.approx(expected, abs=1e-5)
    frozen = measured(clip, clip[:1].expand_as(clip), vision=vision)
    still = frozen["frame_consistency"]
    assert scores.mean(still.edit) == pytest.approx(1) and scores.mean(still.source) < 0.999
    assert "text_encoder and clip_vision" in frozen["text_alignment"].missing
    without = measured(clip, clip, vision=vision, clip=clip_h, prompt="a dog")
    assert without["edit_success"].missing == "fill in source_caption" and without["text_alignment"].edit is not None


def test_a_figure_carries_the_models_name_which_training_changes(vision):
    name = host.vision_name(vision)
    assert name.startswith("CLIP of width 32, 2 layers ") and name.endswith(", 56 px")
    vision.model.vision_model.post_layernorm.bias.data += 1e-3
    assert host.vision_name(vision) != name
    clip = moving(1, 0)
    assert host.vision_name(vision) in scores.table(scores.score(clip, clip, vision=vision))


def test_models_that_cannot_compare_are_refused(vision, clip_h, tmp_path):
    clip = moving(1, 0)
    with pytest.raises(ValueError, match="CLIP's text tower comes without a projection"):
        scores.score(clip, clip, vision=vision, clip=model.load()[1], prompt="a dog")
    clip_h.cond_stage_model.clip_h.transformer.text_projection = torch.nn.Linear(24, 20, bias=False)
    with pytest.raises(ValueError, match="texts have 20 features and clip_vision's pictures 24"):
        scores.score(clip, clip, vision=vision, clip=clip_h, prompt="a dog")
    config = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    config |= {"use_swiglu_ffn": False, "model_type": "dinov2"}
    (tmp_path / "dino.json").write_text(json.dumps(config), encoding="utf-8")
    dino = comfy.clip_vision.ClipVisionModel(str(tmp_path / "dino.json"))
    with pytest.raises(ValueError, match="CLIP_VISION is a Dinov2Model without CLIP's features"):
        scores.score(clip, clip, vision=dino)


# --- the node -----------------------------------------------------------------------------------------------------


def test_the_node_gives_figures_a_table_and_a_plot(vision):
    clip = moving(2, 0)
    edit = clip.clone()
    edit[2] = 1 - edit[2]
    out = ScoreVideo.execute(clip, edit, clip_vision=vision)
    *figures, table, plot = out.result
    found = dict(zip(FIGURES, figures, strict=True))
    assert math.isnan(found["background_psnr"]) and math.isnan(found["edit_success"])
    assert found["frame_consistency"] == means(clip, edit, vision=vision)["frame_consistency"]
    rows = [line.split("|")[1:-1] for line in table.splitlines()]
    assert all(len(row) == 4 for row in rows) and len(rows) == 2 + 12
    assert any(row[0].startswith(" flicker") and row[3].strip() in ("2", "3") for row in rows)
    (told,) = out.ui["scores"]
    assert told["background_psnr"] is None and told["flicker"] > 0
    json.dumps(told, allow_nan=False)
    panels = 4 + 2 * (flow.dis() is not None) - 0
    assert plot.shape[2] == 512 and plot.shape[1] >= PANEL * (panels - 1) and plot.shape[1] % PANEL == 0


def test_the_plot_marks_the_worst_frame():
    nan = float("nan")
    picture = frame_curves([Curve("a", [nan, 1, 5, 2], [nan, 1, 1, 1], 2), Curve("b", [3, 3, 3, 3], None, None)])
    assert picture.height == 2 * PANEL and HEIGHT
    red = tuple(bytes.fromhex(WORST[1:]))
    columns = [x for x in range(picture.width) for y in range(PANEL) if picture.getpixel((x, y)) == red and y < 40]
    middle = 64 + (512 - 64 - 28) * 2 / 3
    assert any(abs(x - middle) <= 5 for x in columns)
    assert not any(picture.getpixel((x, y)) == red for x in range(0, 512, 2) for y in range(PANEL, 2 * PANEL))
    assert frame_curves([]).size == (512, PANEL)
