"""The figures that the field's own published scripts give, for the same clips and the same CLIP.

`GOLDEN` is what the scripts' own functions gave for the clips and weights of `seeded` (torch 2.13, transformers 4.57.6,
OpenCV 5.0, torchmetrics 1.9). A CLIP of random weights: real ones cannot be had here. Flows by arithmetic: OpenCV's
differ from one release to the next. Frames of CLIP's size, as ways of resizing differ. Where a script's definition is
not ours, the test says how, and compares the rest.
"""

import json
import math
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import pytest
import torch
from seeded import TEXT, VISION, fill, moving, uniform
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import metrics
from tune_a_video.tav_core.pipeline import flow, scores

needs_opencv = pytest.mark.skipif(flow.dis() is None, reason="OpenCV is not installed")
CAPTION, PROMPT = "a car drives", "a red jeep is driving on the moon"
LONG = " ".join(12 * ["a very long description of a jeep, its wheels and the moon;"])

# Of the edit and of the source, or of each pair of frames.
GOLDEN = {
    # github.com/wenhao728/awesome-diffusion-v2v at 20afc6f: v2vbench/*.py
    "v2vbench clip_consistency": (0.8811392307281494, 0.8586478948593139),
    "v2vbench clip_text_alignment": (-2.8120388984680176, -12.137524525324503),
    "v2vbench clip_text_alignment, LONG": -1.7383775740551453,
    "v2vbench pick_score, of the same weights": (-2.8120388984680176, -12.137524525324503),
    "v2vbench motion_alignment, of these flows": -3.1507632732391357,
    # github.com/Vchitect/VBench at 45e79ec: vbench/*.py
    "vbench background_consistency": (0.8730109393596649, 0.7637782990932465),
    "vbench temporal_flickering": (0.8498809066473269, 0.8819026423435585),
    # github.com/Samchen2003/EditBoard at 089075a: editboard/*.py
    "editboard success_rate": (4 / 6, 1 / 6),
    "editboard clip_similarity": (-0.028120407834649086, -0.12137524038553238),
    "editboard ff_beta_for_one": (0.07999546080827713, 0.07963967323303223, 0.07884860038757324),
    "editboard calculate_ff_alpha": (24.175705120970893, 24.16817441532214, 24.152477559595116),
    # github.com/showlab/loveu-tgve-2023 at d75589f: scripts/run_eval.py
    "tgve clip_score_text": (-2.812037229537964, -12.137523651123047),
    "tgve clip_score_frame": (0.886676013469696, 0.8089419007301331),
    # github.com/ChenyangQiQi/FateZero at 9b6cb7b: CLIP/frame_acc_tem_con.py
    "fatezero frame accuracy": (4 / 6, 1 / 6),
    "fatezero temporal consistency": (0.856002926826477, 0.8245196342468262),
    # github.com/cure-lab/PnPInversion at 07f97f4: evaluation/matrics_calculator.py; scikit-image 0.26
    "pie-bench psnr": (26.899282455444336, 26.900196075439453),
    "pie-bench psnr_unedit_part": (27.833778381347656, 27.838472366333008),
    "scikit-image structural_similarity": 0.6141938185434802,
}


def close(name, *values):
    expected = GOLDEN[name]
    assert list(values) == pytest.approx(list(expected if isinstance(expected, tuple) else [expected]), abs=1e-4), name


def frames(clip):
    return clip.float() / 255


@pytest.fixture(scope="module")
def small():
    """An edit and its source at CLIP's size, as IMAGE."""
    return frames(moving(6, 224, (7, 6), 2)), frames(moving(6, 224, (9, 5), 1))


@pytest.fixture(scope="module")
def weights():
    """A CLIP of transformers, of whose tensors a file such as PickScore's consists."""
    config = CLIPConfig(
        text_config={**TEXT, "hidden_act": "gelu"}, vision_config={**VISION, "hidden_act": "gelu"}, projection_dim=32
    )
    published = CLIPModel(config).eval().requires_grad_(False)
    fill(published.state_dict())
    return published


@pytest.fixture(scope="module")
def halves(weights, tmp_path_factory):
    """Both as the host reads them: a CLIP_VISION, and a CLIP by what Load CLIP calls."""
    config = {**VISION, "hidden_act": "gelu", "num_channels": 3, "model_type": "clip_vision_model"}
    file = tmp_path_factory.mktemp("clip") / "vision.json"
    file.write_text(json.dumps({**config, "projection_dim": 32}), encoding="utf-8")
    vision = comfy.clip_vision.ClipVisionModel(str(file))
    assert not vision.load_sd(weights.state_dict()).missing_keys
    clip = comfy.sd.load_text_encoder_state_dicts([weights.state_dict()], model_options={"clip_h_model_config": TEXT})
    return vision, clip


def both(found):
    return scores.mean(found.edit), scores.mean(found.source)


def test_frames_and_texts_fit_as_published_scripts_say(small, halves):
    edit, source = small
    with torch.no_grad():
        listed = scores.score(source, edit, None, *halves, CAPTION, PROMPT)
        projected = [host.image_features(halves[0], clip)[0] for clip in small]
        (long,) = host.text_features(halves[1], [LONG])
    found = {each.key: each for each in listed}
    close("v2vbench clip_consistency", *both(found["neighbour_consistency"]))
    close("vbench background_consistency", *both(found["frame_consistency"]))
    aligned = both(found["text_alignment"])
    close("v2vbench clip_text_alignment", *aligned)
    close("v2vbench pick_score, of the same weights", *aligned)
    close("tgve clip_score_text", *aligned)
    close("editboard clip_similarity", *(each / 100 for each in aligned))
    close("v2vbench clip_text_alignment, LONG", scores.mean(metrics.text_alignment(projected[0], long)))
    # These take a frame that fits both texts as well for a success; here it is none.
    close("editboard success_rate", *both(found["edit_success"]))
    close("fatezero frame accuracy", *both(found["edit_success"]))
    # Consistencies that Score Video does not give: of neighbours, but after the projection, and of all pairs.
    close("fatezero temporal consistency", *(float(metrics.cosine_to_previous(x).mean()) for x in projected))
    pairs = (torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) for x in projected)
    close("tgve clip_score_frame", *(float((every.sum() - 6) / 30) for every in pairs))


def test_flicker_is_vbenchs(small):
    close("vbench temporal_flickering", *(1 - float(metrics.flicker(clip).mean()) / 255 for clip in small))


def test_flows_are_compared_as_v2vbench_and_editboard_do():
    source, edit = (torch.tensor([6.0, 2.0]) + 3 * uniform(3, 64, 64, 2, seed=seed).float() for seed in (5, 6))
    close("v2vbench motion_alignment, of these flows", -float(metrics.end_point_error(edit, source).mean()))
    # Everything moves: what does not is left out here, and counts there.
    close("editboard ff_beta_for_one", *(1 - metrics.flow_cosine(source, edit)).tolist())


def test_the_warp_error_is_editboards():
    """Of frames that were warped by whole pixels, as the script got them; it warps by OpenCV's 32nds of a pixel."""
    clips = [frames(moving(4, 512, (6, 2), 3, noise=5)), frames(moving(4, 512, (4, 3), 4))]
    back = torch.tensor([-6.0, -2.0]).expand(3, 512, 512, 2)
    edit, _ = metrics.warp_error(*(metrics.warp_difference(clip[:-1], clip[1:], back) for clip in clips))
    close("editboard calculate_ff_alpha", *edit.tolist())


def test_the_background_is_kept_as_pie_bench_and_wang_measure_it(small):
    clip = small[1][:2]
    noise = (20 * uniform(6, 224, 224, 3, seed=9)[:2]).round()
    near = ((255 * clip + noise).clamp(0, 255) / 255).float()
    close("pie-bench psnr", *metrics.psnr(near, clip).tolist())
    outside = torch.ones(2, 224, 224, dtype=torch.bool)
    outside[:, 50:120, 60:200] = False
    # The script blanks the rest, and counts it as kept.
    counted = 10 * math.log10(outside.numel() / float(outside.sum()))
    close("pie-bench psnr_unedit_part", *(value + counted for value in metrics.psnr(near, clip, outside).tolist()))
    # PIE-Bench's is torchmetrics', which counts windows over a mirrored border as well: 0.610 here.
    close("scikit-image structural_similarity", float(metrics.ssim(near[:1], clip[:1])))


@needs_opencv
def test_sharpness_is_opencvs(small):
    import cv2

    greys = (255 * metrics.luma(small[1])).double().numpy()  # from bytes of grey it would be 20 / 12 more, by rounding
    expected = [cv2.Laplacian(grey, cv2.CV_64F).var() for grey in greys]
    assert metrics.sharpness(small[1]).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("text", [PROMPT, "Cafés, 3 dogs & a T-Rex's egg!", "", LONG])
def test_a_file_of_both_halves_gives_its_own_score(text, small, weights, halves):
    """PickScore (arXiv 2305.01569) is 100 x this cosine where e to the file's logit_scale is 100: `text_alignment`."""
    words = CLIPTokenizerFast.from_pretrained(Path(comfy.sd.__file__).parent / "sd1_tokenizer")
    tokens = words(text, padding=True, truncation=True, max_length=77, return_tensors="pt")
    pixels = CLIPImageProcessor()(list((255 * small[0]).round().byte()), return_tensors="pt")
    weights.logit_scale.fill_(math.log(100))
    expected = weights(**tokens, **pixels).logits_per_text[0]
    with torch.no_grad():
        seen, _ = host.image_features(halves[0], small[0])
        (read,) = host.text_features(halves[1], [text])
    assert metrics.text_alignment(seen, read).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
