"""Tunes that are cancelled, killed, reused, and whose files are damaged."""

import errno
import json
import math
import os
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import comfy.model_management
import pytest
import torch
from equal import same_weights
from pack import PROJECT
from tune_a_video.nodes import OneShotTune
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import tuning
from tune_a_video.tav_core.method.tuning import Recipe
from tune_a_video.tav_core.pictures import plot
from tune_a_video.tav_core.pipeline import one_shot
from tune_a_video.tav_core.pipeline.apply import apply_weights
from tune_a_video.tav_core.pipeline.one_shot import Saving, one_shot_tune
from tune_a_video.tav_core.store import runs
from tune_a_video.tav_core.store.files import UNFINISHED


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def tune(inflated, clip, prompts, folder):
    """Tune with saving, as nodes run; what the user was told is in `tune.told`."""

    def run(
        steps=6,
        every=2,
        restart=False,
        on_step=lambda _step: None,
        model=inflated,
        latents=clip,
        early=None,
        use=0,
        **recipe,
    ):
        run.told.clear()
        saving = Saving(folder, every, restart, early, use)
        with torch.inference_mode():
            return one_shot_tune(
                model,
                latents,
                prompts[1],
                Recipe(steps, **recipe),
                "fp32",
                "all",
                on_step,
                saving=saving,
                tell=run.told.append,
            )

    run.told = []
    return run


@pytest.fixture
def undisturbed(inflated, clip, prompts):
    def run(steps, **recipe):
        with torch.inference_mode():
            return one_shot_tune(inflated, clip, prompts[1], Recipe(steps, **recipe), "fp32", "all", lambda _step: None)

    return run


@pytest.fixture
def no_training(monkeypatch):
    def work(*_args, **_kwargs):
        raise AssertionError("training began")

    return lambda: monkeypatch.setattr(one_shot, "TrainingUNet", work)


def cancel_at(number):
    def press_cancel(step):
        if step.number == number:
            comfy.model_management.interrupt_current_processing()

    return press_cancel


def identical(a, b):
    return same_weights(a, b) and a.losses == b.losses


def files(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_cancelled_and_run_again_is_as_if_undisturbed(tune, undisturbed):
    for step in (1, 3, 4):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tune(on_step=cancel_at(step))
    seen = []
    weights = tune(on_step=seen.append)
    assert tune.told == ["resumed after step 4"]
    assert [step.number for step in seen] == [1, 2, 3, 4, 5, 6]
    assert identical(weights, undisturbed(6))


def test_an_error_loses_nothing(tune, undisturbed):
    def fail(step):
        if step.number == 3:
            raise RuntimeError("a cable was pulled")

    with pytest.raises(RuntimeError, match="cable"):
        tune(on_step=fail, every=100)
    weights = tune()
    assert tune.told == ["resumed after step 3"]
    assert identical(weights, undisturbed(6))


def test_an_error_inside_an_update_saves_the_state_before_it_or_none(tune, folder, undisturbed, monkeypatch):
    adamw, calls = torch.optim.AdamW.step, []

    def half(optimizer, *args, **kwargs):
        calls.append(1)
        adamw(optimizer, *args, **kwargs)
        if len(calls) == 4:
            raise RuntimeError("in the middle")

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(RuntimeError, match="in the middle"):
        tune(every=2)
    weights = tune()
    assert tune.told == ["resumed after step 2"]
    assert identical(weights, undisturbed(6))


def test_a_finished_run_is_reused_without_training(tune, no_training, unchanged, inflated):
    first = tune()
    no_training()
    with unchanged(inflated):
        again = tune()
    assert tune.told == ["reused: all 6 steps were saved"]
    assert identical(first, again)


def test_restart_trains_anew(tune, no_training):
    first = tune()
    assert identical(first, tune(restart=True)) and not tune.told
    no_training()
    with pytest.raises(AssertionError, match="training began"):
        tune(restart=True)


def test_more_steps_continue_and_fewer_keep_the_longer_run(tune, undisturbed, no_training):
    tune(4)
    longer = tune(6)
    assert tune.told == ["resumed after step 4"] and identical(longer, undisturbed(6))
    assert identical(tune(3), undisturbed(3)) and not tune.told
    no_training()
    for steps in (3, 4, 6):
        tune(steps)
        assert tune.told == [f"reused: all {steps} steps were saved"]


def test_another_tune_is_not_taken_for_this_one(tune, make_model, clip, inflated, prompts, folder):
    """Whatever changes the result changes the key."""
    tune(1)
    styled = inflated.clone()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight"
    styled.add_patches({key: ("diff", (torch.ones_like(inflated.model.state_dict()[key]),))}, 0.3)
    retuned = apply_weights(inflated, tune(1))
    others = [
        {"seed": 34},
        {"learning_rate": 1e-5},
        {"weight_decay": 0.0},
        {"max_grad_norm": 0.5},
        {"latents": {"samples": clip["samples"] + 1e-6}},
        {"latents": {"samples": clip["samples"][:4]}},
        {"model": styled},
        {"model": host.inflate(make_model(seed=1), "video")},
        {"model": host.inflate(make_model(prediction_type="v_prediction"), "video")},
        {"model": host.inflate(make_model(), "per_frame")},
        {"model": retuned},
    ]
    for other in others:
        tune(1, **other)
        assert not tune.told, other
    assert len(files(folder)) == 1 + len(others)
    prompts[1][0][0] += 1e-6
    tune(1)
    assert not tune.told


def test_a_tune_of_another_version_of_the_method_is_not_taken(tune, folder, monkeypatch):
    tune(1)
    monkeypatch.setattr(one_shot, "METHOD_VERSION", tuning.METHOD_VERSION + 1)
    tune(1)
    assert not tune.told and len(files(folder)) == 2


@pytest.mark.parametrize("every", [1, 100])
def test_a_restart_that_is_cancelled_leaves_the_longer_state(tune, no_training, every, monkeypatch):
    monkeypatch.setenv("TAV_KEEP_RUNS", "1")
    first = tune()
    for step in (1, 4):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tune(restart=True, every=every, on_step=cancel_at(step))
    no_training()
    assert identical(first, tune()) and tune.told == ["reused: all 6 steps were saved"]


def test_a_shorter_state_replaces_no_longer_one_of_another_process(folder):
    mine, theirs = (runs.Run(folder, "a", 6) for _ in range(2))
    theirs.save(state(5), 5)
    mine.save(state(1), 1)
    assert mine.load().state["weight/x"][0] == 5
    assert mine.load(1).state["weight/x"][0] == 1  # what this process can go on from


def test_a_run_keeps_one_state_and_those_of_shorter_runs(folder):
    runs.Run(folder, "a", 2).save(state(2), 2)
    for step in (3, 4, 6):
        runs.Run(folder, "a", 6).save(state(step), step)
    assert files(folder) == ["a.2.safetensors", "a.6.safetensors"]


def test_a_reused_tune_keeps_its_date(tune, monkeypatch):
    class Clock:
        now = staticmethod(lambda _zone: datetime(2001, 2, 3, tzinfo=timezone.utc))

    with monkeypatch.context() as patch:
        patch.setattr(runs, "datetime", Clock)
        patch.setattr(one_shot, "datetime", Clock)
        first = tune(2)
    assert first.date == tune(2).date == "2001-02-03T00:00:00+00:00"
    assert tune(3).date > "2020"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_never_written_nor_saved(tune, folder, undisturbed, monkeypatch, value):
    clip_grad_norm, calls = torch.nn.utils.clip_grad_norm_, []

    def at_step_4(parameters, limit):
        calls.append(1)
        if len(calls) == 4:
            parameters[0].grad.fill_(value)
        return clip_grad_norm(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", at_step_4)
    with pytest.raises(
        FloatingPointError, match=r"gradient norm became \w+ at step 4.*The state of step 3 stays saved"
    ):
        tune(4)
    assert identical(tune(3), undisturbed(3)) and tune.told == ["reused: all 3 steps were saved"]
    assert identical(tune(6), undisturbed(6)) and tune.told == ["resumed after step 3"]


@pytest.mark.parametrize("step", [1, 6])
def test_weights_that_are_not_finite_are_no_result_and_not_saved(tune, folder, monkeypatch, step):
    adamw, calls = torch.optim.AdamW.step, []

    def broken(optimizer, *args, **kwargs):
        adamw(optimizer, *args, **kwargs)
        calls.append(1)
        if len(calls) == step:
            optimizer.param_groups[0]["params"][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(FloatingPointError, match=r"step [26].*(Nothing of it is saved|step 4 stays saved)"):
        tune(every=2)
    assert [name.split(".")[1] for name in files(folder)] == ([] if step == 1 else ["4"])


def test_a_saved_state_that_is_not_finite_is_set_aside(tune, folder, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:  # a pack that did not look
        patch.setattr(runs, "_check_finite", lambda _state: None)
        patch.setattr(tuning.Training, "state", lambda training, own=tuning.Training.state: spoilt(own(training)))
        tune(4)
    assert identical(tune(4), undisturbed(4)) and not tune.told
    assert [name for name in files(folder) if name.endswith(runs.CORRUPT)]


def spoilt(tensors):
    name = next(name for name in tensors if name.startswith("weight/"))
    tensors[name].view(-1)[0] = math.nan
    return tensors


def damage(data: bytes) -> dict[str, bytes]:
    header = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header])
    key = next(key for key in metadata if key.startswith("weight/"))
    at = 8 + header + metadata[key]["data_offsets"][0]
    return {
        "empty": b"",
        "truncated": data[: len(data) // 2],
        "a byte short": data[:-1],
        "one bit of a weight": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        "zeros": bytes(len(data)),
        "a header of terabytes": (2**42).to_bytes(8, "little") + data[8:],
        "html": b"<!DOCTYPE html><html></html>",
        "a pickle": b"\x80\x04c" + data[3:],
        "another step": data.replace(b'"step":"4"', b'"step":"3"'),
        "a step that is no number": data.replace(b'"step":"4"', b'"step":"x"'),
        "no metadata": data[:8] + data[8 : 8 + header].replace(b"__metadata__", b"__metadatx__") + data[8 + header :],
    }


KINDS = ["empty", "truncated", "a byte short", "one bit of a weight", "zeros", "a header of terabytes", "html"]
KINDS += ["a pickle", "another step", "a step that is no number", "no metadata"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_state_is_set_aside(tune, folder, undisturbed, kind):
    tune(4)
    (path,) = folder.iterdir()
    data = damage(path.read_bytes())[kind]
    assert data != path.read_bytes()
    path.write_bytes(data)
    weights = tune(4)
    assert not tune.told
    assert identical(weights, undisturbed(4))
    assert files(folder) == [path.name, path.name + runs.CORRUPT]


def test_an_older_good_state_serves_when_a_newer_is_corrupt(tune, folder, undisturbed):
    tune(2)
    (good,) = folder.iterdir()
    tune(4)
    (newer,) = set(folder.iterdir()) - {good}
    newer.write_bytes(newer.read_bytes()[:-7])
    assert identical(tune(6), undisturbed(6))
    assert tune.told == ["resumed after step 2"]


def state(value):
    return {"weight/x": torch.full((256,), float(value)), "losses": torch.zeros(1)}


def test_the_longest_unused_goes_first(folder, monkeypatch):
    monkeypatch.setenv("TAV_KEEP_RUNS", "3")
    for age, key in enumerate("abcd"):
        run = runs.Run(folder, key, 1)
        run.save(state(age), 1)
        if run.path.exists():
            os.utime(run.path, (age, age))
        if key == "c":
            runs.Run(folder, "a", 1).load()  # used again
    assert files(folder) == [f"{key}.1.safetensors" for key in "acd"]


def test_the_size_limit_keeps_what_was_just_saved(folder, monkeypatch):
    monkeypatch.setenv("TAV_KEEP_GIB", "1e-9")
    for key in "ab":
        runs.Run(folder, key, 1).save(state(1), 1)
    assert files(folder) == ["b.1.safetensors"]


@pytest.mark.parametrize("variable", ["TAV_KEEP_GIB", "TAV_KEEP_RUNS"])
@pytest.mark.parametrize("text", ["lots", "nan", "inf", "-inf", "-1", "0", "", " ", "1e999"])
def test_a_limit_that_is_none_is_named_and_not_used(folder, monkeypatch, caplog, variable, text):
    monkeypatch.setenv(variable, text)
    for key in "abc":
        runs.Run(folder, key, 1).save(state(1), 1)
    assert f"{variable} is {text!r}, not a number" in caplog.text
    assert len(files(folder)) == 3


@pytest.mark.parametrize("failing", ["stat", "unlink"])
def test_a_state_that_cannot_be_removed_does_not_end_the_tidying(folder, monkeypatch, failing):
    for age, key in enumerate("abc"):
        runs.Run(folder, key, 1).save(state(age), 1)
        os.utime(folder / f"{key}.1.safetensors", (age, age))
    own = getattr(Path, failing)

    def locked(path, *args, **kwargs):
        if path.name == "a.1.safetensors":
            raise OSError(errno.EBUSY, "in use")
        return own(path, *args, **kwargs)

    monkeypatch.setattr(Path, failing, locked)
    monkeypatch.setenv("TAV_KEEP_RUNS", "1")
    runs.Run(folder, "d", 1).save(state(3), 1)
    monkeypatch.undo()
    assert files(folder) == ["a.1.safetensors", "d.1.safetensors"]


def test_half_written_files_of_killed_processes_are_removed_in_time(folder):
    run = runs.Run(folder, "a", 1)
    run.save(state(1), 1)
    old, new = (folder / f"b.1.safetensors.{pid}{UNFINISHED}" for pid in (1, 2))
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    run.save(state(2), 1)
    assert files(folder) == ["a.1.safetensors", new.name]


def test_a_full_disk_does_not_stop_the_tune(tune, folder, undisturbed):
    """A limit on the size of files: the write fails half-way, as on a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")

    def fill(step):
        if step.number == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        weights = tune(6, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert identical(weights, undisturbed(6))
    assert len(tune.told) == 2
    assert all("could not be saved" in text and "the saved state of step 2 stays" in text for text in tune.told)
    assert len(files(folder)) == 1  # nothing half-written is left
    assert identical(tune(6), weights)
    assert tune.told == ["resumed after step 2"]


def test_a_disk_that_is_full_for_real(tmp_path):
    script = PROJECT / "tests" / "support" / "full_disk.py"
    mount = shlex.join(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)])
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no disk of a given size can be mounted here")
    command = f"{mount} && exec {shlex.join([sys.executable, '-I', str(script), str(tmp_path)])}"
    run = subprocess.run(["unshare", "-rm", "sh", "-c", command], capture_output=True, encoding="utf-8", timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert all("No space left" in text and "the saved state of step 2 stays" in text for text in report["told"])
    assert len(report["told"]) == 3 and report["files"] == 1
    assert report["resumed"] == ["resumed after step 2"]
    assert report["identical"]


def test_a_folder_that_cannot_be_made_does_not_stop_the_tune(tune, folder):
    folder.write_text("a file where the folder should be", encoding="utf-8")
    assert len(tune(2).losses) == 2
    assert len(tune.told) == 1 and "could not be saved" in tune.told[0]


@pytest.fixture
def node(inflated, clip, prompts, monkeypatch):
    """One-Shot Tune: its result, its text and the pictures that it showed, in that order."""

    def run(**inputs):
        values = {"steps": 2, "learning_rate": 1e-4, "seed": 0, "precision": "fp32"}
        values |= {"weight_decay": 0.01, "max_grad_norm": 1.0, "caption": prompts[1], "latents": clip}
        pictures = []
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(host, "progress", lambda _steps: lambda _done, picture=None: pictures.append(picture))
            out = OneShotTune.execute(**{**values, "model": inflated, **inputs})
        return out.result, out.ui.as_dict()["text"][0], [picture for picture in pictures if picture is not None]

    return run


def test_the_node_says_what_it_did(node):
    texts = [node(reuse=reuse)[1] for reuse in ("auto", "auto", "restart")]
    assert texts == ["trained 2 steps", "reused: all 2 steps were saved", "trained 2 steps"]


def test_what_it_did_stays_in_sight(node, monkeypatch):
    """Newer pages clear a node's text when the job ends."""
    node()
    noted = []
    monkeypatch.setattr(plot.lettering, "write", lambda _canvas, _at, lines, *_style: noted.append(" ".join(lines)))
    (_model, _weights, loss_plot, report), text, pictures = node()
    assert report.startswith(f"{text}\nmean loss of the first 1 of 2 steps: ")
    assert noted == [text] * (len(pictures) + 1)
    assert pictures[-1].height == loss_plot.shape[1] > plot.HEIGHT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the tune")
def test_killed_at_20_moments_it_ends_as_if_undisturbed(tmp_path):
    script = PROJECT / "tests" / "support" / "killed.py"
    run = subprocess.run(
        [sys.executable, "-I", str(script), str(tmp_path)], capture_output=True, encoding="utf-8", timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["kills"] == 20
    assert report["kills_during_a_save"] >= 5
    assert report["continued"] == 20 and report["resumed"] >= 10
    assert report["identical"]
    assert Path(tmp_path, "killed").exists()


# --- weights of early steps ---


def early_in(folder):
    return sorted(int(name.split(".")[1]) for name in files(folder) if name.endswith(runs.EARLY))


def test_an_early_step_is_used_later_as_if_it_had_been_the_last(tune, undisturbed, no_training, folder):
    whole, expected = tune(early=2), undisturbed(2)
    assert early_in(folder) == [2, 4] and identical(whole, undisturbed(6))
    sizes = {path.name.endswith(runs.EARLY): path.stat().st_size for path in folder.iterdir()}
    assert sizes[True] < 0.4 * sizes[False]
    no_training()
    seen = []
    weights = tune(early=2, use=2, on_step=seen.append)
    assert tune.told == ["used: the weights of step 2"] and len(seen) == 2
    assert weights.recipe.steps == 2 and identical(weights, expected)
    assert identical(tune(early=2), whole)


def test_the_first_tune_gives_the_early_step_too(tune, undisturbed, folder):
    assert identical(tune(early=2, use=4), undisturbed(4))
    assert tune.told == ["used: the weights of step 4"] and early_in(folder) == [2, 4]


def test_an_early_step_stays_where_saves_are_rare(tune, folder):
    tune(every=50, early=2)
    assert early_in(folder) == [2, 4]


def test_a_tune_that_goes_on_gives_the_early_step_too(tune, undisturbed):
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tune(early=2, use=4, on_step=cancel_at(3))
    assert identical(tune(early=2, use=4), undisturbed(4))


@pytest.mark.parametrize(
    "early, use, said", [(2, 3, "keeps 2, 4, 6 "), (None, 2, "keeps 6 "), (2, 7, "but steps is 6")]
)
def test_a_step_that_is_not_kept_is_refused_before_any_work(tune, no_training, early, use, said):
    no_training()
    with pytest.raises(ValueError, match=said):
        tune(early=early, use=use)


def test_a_step_that_was_not_kept_in_time_is_refused(tune, no_training):
    tune()
    no_training()
    with pytest.raises(ValueError, match="step 2 of this tune is not kept: .* another validation_every.* restart"):
        tune(early=2, use=2)


def test_an_early_step_that_cannot_be_kept_stops_no_tune(tune, undisturbed, monkeypatch):
    def full(_run, _state, _step):
        raise OSError("No space left on device")

    monkeypatch.setattr(runs.Run, "keep", full)
    assert identical(tune(early=2, use=2), undisturbed(2))
    lost = [f"the weights of step {step} could not be kept (No space left on device)" for step in (2, 4)]
    assert tune.told == [*lost, "used: the weights of step 2"]


@pytest.mark.parametrize(
    "steps, every, kept",
    [(500, 100, [100, 200, 300, 400]), (300, 100, [100, 200]), (100, 100, []), (500, 50, [150, 300, 450])],
)
def test_few_early_steps_are_kept_evenly(steps, every, kept):
    assert runs.early_steps(steps, every) == kept and len(kept) <= runs.MOST_EARLY


def test_early_steps_count_for_the_size_and_go_with_their_run(tune, folder, monkeypatch):
    tune(early=2)
    monkeypatch.setenv("TAV_KEEP_RUNS", "1")
    tune(seed=1, early=3)
    assert early_in(folder) == [3] and len(files(folder)) == 2, (
        "the other run's state went, and its early steps with it"
    )
    (size,) = {path.stat().st_size for path in folder.iterdir() if not path.name.endswith(runs.EARLY)}
    monkeypatch.setenv("TAV_KEEP_GIB", str(1.1 * size / 2**30))
    tune(7, seed=1, early=3)
    assert early_in(folder) == [] or sum(path.stat().st_size for path in folder.iterdir()) <= 1.1 * size


def test_a_corrupt_early_step_is_not_used(tune, folder):
    tune(early=2)
    (path,) = (path for path in folder.iterdir() if path.name.endswith(f"4{runs.EARLY}"))
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    with pytest.raises(ValueError, match="step 4 of this tune is not kept"):
        tune(early=2, use=4)
