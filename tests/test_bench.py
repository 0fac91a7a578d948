"""The benchmark: its two sides compute the same, it notices when they do not, and it writes what it found."""

import json

import bench
import pytest
import sides

ARGUMENTS = ["--frames", "3", "--size", "64", "--steps", "3", "--device", "cpu"]


@pytest.fixture
def narrow(monkeypatch):
    """Half the levels of the small configuration."""
    config, vae, *rest = sides.CONFIGS["small"]
    config = {
        **config,
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    }
    monkeypatch.setitem(sides.CONFIGS, "small", (config, vae, *rest))


def test_both_sides_agree_and_the_report_is_whole(narrow, tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert bench.main([*ARGUMENTS, "--job", "2", "--json", str(file)]) == 0
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["versions"].keys() == {"Python", "torch", "diffusers", "ComfyUI"}
    assert {"device", "threads", "TFLOP/s", "GB/s"} <= report["machine"].keys()
    assert report["case"] == {"config": "small", "frames": 3, "size": 64}
    assert report["steps"].keys() == set(sides.KINDS)
    for figures in report["steps"].values():
        assert figures["equal"]
        assert len(figures["pack"]["seconds"]) == len(figures["baseline"]["seconds"]) == 3
        assert figures["ratio"] == pytest.approx(figures["pack"]["median"] / figures["baseline"]["median"])
        assert min(figures["pack"][name] for name in ("peak", "flop", "moved")) > 0
        assert figures["baseline"]["peak"] > 0
    assert report["job"]["tuning"] == 2
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:-1]] == list(sides.KINDS)
    assert len({line.count("|") for line in table[:-1]}) == 1


def test_sides_that_differ_are_noticed(narrow, monkeypatch, capsys):
    predict = sides.baseline.VideoUNet.forward
    monkeypatch.setattr(sides.baseline.VideoUNet, "forward", lambda *args: predict(*args) * (1 + 1e-3))
    assert bench.main([*ARGUMENTS, "--job", "0"]) == 1
    assert f"differ in {', '.join(sides.KINDS)}" in capsys.readouterr().out


def test_growth_counts_the_work(narrow, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "GROWTH", [(2, 64, (0, 0)), (4, 64, (0, 0))])
    file = tmp_path / "growth.json"
    assert bench.main([*ARGUMENTS, "--growth", "--json", str(file)]) == 0
    points = json.loads(file.read_text(encoding="utf-8"))["growth"]
    for kind in (sides.SAMPLING, sides.FAST):
        two, four = (point for point in points if point["kind"] == kind)
        assert 1.8 < four["flop"] / two["flop"] < 2.3  # one more frame of four sees two frames
        assert four["peak"] > two["peak"]


def test_a_long_clip_in_windows_takes_time_and_no_memory(narrow, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "LONG", [(frames, 64, (4, 1)) for frames in (4, 6, 10)])
    file = tmp_path / "long.json"
    assert bench.main([*ARGUMENTS, "--long", "--json", str(file)]) == 0
    points = json.loads(file.read_text(encoding="utf-8"))["long"]
    windows = {4: 1, 6: 2, 10: 4}
    for kind, of_windows in ((sides.SAMPLING, windows), (sides.FAST, {4: 1, 6: 1, 10: 1})):
        first, second, third = (point for point in points if point["kind"] == kind)
        for point in (second, third):
            growth = of_windows[point["frames"]]
            assert point["flop"] / first["flop"] == pytest.approx(growth, rel=0.1), kind
            assert point["peak"] < 1.25 * first["peak"]
    said = capsys.readouterr().out
    assert f"{sides.SAMPLING}, window 4, 10 / 4 frames: time " in said and f"{sides.FAST}, window 4" in said
