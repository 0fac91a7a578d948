"""`run.py parity` on the reference's golden numbers, where they are, and on those of a second implementation."""

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


def test_a_wrong_figure_fails(tmp_path, capsys):
    write_golden(tmp_path, {**TINY, **VARIANTS["sd1"]})
    golden = load_file(tmp_path / "golden.safetensors")
    golden["ddim.inversion"][1] *= 1 + 1e-4
    golden["train.loss"][2] = torch.nan
    save_file(golden, tmp_path / "golden.safetensors")
    assert parity.main([str(tmp_path)]) == 1
    failed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed == ["ddim.inversion", "train.loss.3", "train.checkpointed.loss.3"]
