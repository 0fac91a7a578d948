"""`run.py parity` on the reference's golden numbers, where they are, and on those of a second implementation."""

import shutil
from pathlib import Path

import parity
import pytest
import torch
from reference import write_golden
from safetensors.torch import load_file, save_file
from small import TINY

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
GOLDEN = sorted(found.parent for found in PARITY.glob("*/golden.safetensors"))
VARIANTS = {
    "sd1": {"prediction_type": "epsilon"},
    "sd2": {"prediction_type": "v_prediction", "use_linear_projection": True, "attention_head_dim": [1, 4]},
    "deep": {
        "prediction_type": "epsilon",
        "layers_per_block": 2,
        "block_out_channels": [32, 64, 32],
        "attention_head_dim": [4, 2, 8],
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D", "CrossAttnUpBlock3D"],
    },
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    write_golden(folder, {**TINY, **VARIANTS["sd1"]})
    return folder


@pytest.fixture
def golden(written, tmp_path):
    """The golden numbers of a parity folder in `tmp_path`."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return load_file(tmp_path / "golden.safetensors")


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_equals_the_reference_implementation(folder):
    assert parity.main([str(folder)]) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_second_implementation(variant, tmp_path, capsys):
    write_golden(tmp_path, {**TINY, **VARIANTS[variant]})
    failed = parity.main([str(tmp_path)])
    told = capsys.readouterr().out
    assert not failed, told
    (line,) = (line.split() for line in told.splitlines() if line.startswith("published.roundtrip"))
    assert float(line[1]) == 0


def test_a_wrong_figure_fails(golden, tmp_path, capsys):
    golden["ddim.inversion"][1] *= 1 + 1e-4
    golden["train.loss"][2] = torch.nan
    save_file(golden, tmp_path / "golden.safetensors")
    assert parity.main([str(tmp_path)]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed == ["ddim.inversion", "train.loss.3", "train.checkpointed.loss.3"]


TRAINING = {f"train.{way}{kind}" for way in ("", "checkpointed.") for kind in ("loss", "grad_norm", "update")}


@pytest.mark.parametrize(
    ("lacking", "skipped"),
    [
        (("forward.f1.out_per_frame", "ddim.inv"), {"forward.f1.per_frame", "ddim.inversion", "ddim.sampling_cfg12.5"}),
        (
            ("ddim.sampling", "train.grad_norm", "train.update"),
            {"ddim.sampling_cfg12.5", *(name for name in TRAINING if "loss" not in name)},
        ),
        (("train.noise",), {*TRAINING, "published.roundtrip"}),
    ],
)
def test_a_figure_that_a_folder_lacks_is_skipped_by_name(lacking, skipped, golden, tmp_path, capsys):
    """The others are compared as ever."""
    rest = {name: tensor for name, tensor in golden.items() if not name.startswith(lacking)}
    save_file(rest, tmp_path / "golden.safetensors")
    assert parity.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in told if "skipped: golden.safetensors has no " in line} == skipped
    assert f", {len(skipped)} skipped" in told[-1]


def test_a_folder_of_which_nothing_is_compared_is_no_success(golden, tmp_path, capsys):
    save_file({"other": torch.zeros(1)}, tmp_path / "golden.safetensors")
    assert parity.main([str(tmp_path)]) == 1
    assert "parity: nothing was compared" in capsys.readouterr().out
