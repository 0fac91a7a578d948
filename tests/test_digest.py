"""Two values share a digest only where they compute the same, and in every process."""

import functools
import subprocess
import sys
from itertools import combinations
from os import environ

import comfy.weight_adapter
import pytest
import torch
from pack import PROJECT
from tune_a_video.tav_core import host
from tune_a_video.tav_core.store.digest import digest


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, weight):
        return weight * self.by

    def half(self, weight):
        return weight * self.by / 2


FACTOR = 2
CAPTURED = {"capture_output": True, "check": True, "encoding": "utf-8"}


def by_global(weight):
    return weight * FACTOR


def times(by):
    return lambda weight: weight * by


def count_down(n):
    return count_down(n - 1) if n else 0


def adapter(weight, alpha=1.0, keys=()):
    return comfy.weight_adapter.LoRAAdapter(set(keys), (torch.ones(2, 1), torch.ones(1, 2), alpha, weight, None, None))


DIFFERENT = [
    lambda weight: weight + 1,
    lambda weight: weight + 2,
    lambda weight: weight - 1,
    lambda weight, by=1: weight + by,
    lambda weight, by=2: weight + by,
    lambda weight, *, by=1: weight + by,
    lambda weight, *, by=2: weight + by,
    lambda weight: [w + 1 for w in weight],
    lambda weight: [w + 2 for w in weight],
    times(2),
    times(3),
    times(torch.tensor(2.0)),
    times(torch.tensor(3.0)),
    by_global,
    count_down,
    functools.partial(by_global, 1),
    functools.partial(by_global, 2),
    functools.partial(by_global, weight=1),
    functools.partial(functools.partial(times, 2), 1),
    Scale(2),
    Scale(3),
    Scale(2).half,
    Scale(3).half,
    Scale,
    torch.neg,
    torch.abs,
    torch.ones(2).mul,
    torch.zeros(2).mul,
    adapter(None),
    adapter(None, alpha=2.0),
    adapter(torch.ones(1)),
    {"a": 1},
    {"a": 2},
    {1, 2},
    {1, 3},
    [1, 2],
    "1",
    1,
    None,
    ...,
    object(),
]


def test_no_two_share_a_digest():
    digests = [digest(value) for value in DIFFERENT]
    assert [pair for pair in combinations(range(len(digests)), 2) if digests[pair[0]] == digests[pair[1]]] == []


def test_what_computes_the_same_has_one_digest():
    for make in (
        lambda: times(2),
        lambda: functools.partial(by_global, 1),
        lambda: adapter(None, keys="ab"),
        lambda: ...,
    ):
        assert digest(make()) == digest(make())
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_a_global_that_a_function_reads_counts(monkeypatch):
    before = digest(by_global)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert digest(by_global) != before


def test_what_cannot_be_told_apart_never_has_a_digest_twice(caplog):
    value = Scale(2)
    assert digest(value) != digest(value)
    assert "cannot be told from others" in caplog.text


SCRIPT = """
import sys
sys.path += ["tools", "benchmarks", "tests/support", "tests"]
from pack import load_pack
load_pack()
import test_digest as t
partial = t.functools.partial(t.times, 3)
print(t.digest([t.times(2), t.by_global, t.count_down, partial, t.adapter(None, keys="abc"), t.Scale]))
"""


def test_every_process_gives_the_same():
    found = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT], cwd=PROJECT, env={**environ, "PYTHONHASHSEED": seed}, **CAPTURED
        ).stdout.splitlines()[-1]
        for seed in "12"
    }
    assert len(found) == 1


# --- of a MODEL -------------------------------------------------------------------------------------------------

KEY = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight"


def merged(model, other):
    clone = model.clone()
    clone.add_patches({KEY: other.get_key_patches(KEY)[KEY]}, 0.5, 0.5)
    return clone


def test_a_merged_model_has_a_fingerprint_of_its_own(make_model):
    model, a, b = (make_model(seed) for seed in range(3))
    prints = [host.fingerprint(merged(model, other)) for other in (a, b, a)]
    assert prints[0] == prints[2] != prints[1] != host.fingerprint(model)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_quantised_weight_counts_as_what_it_stands_for(model, scale, monkeypatch):
    layer = model.model.diffusion_model.get_submodule(KEY.removeprefix("diffusion_model.").removesuffix(".weight"))
    before = host.fingerprint(model)
    monkeypatch.setattr(layer, "convert_weight", lambda weight, inplace: weight * scale, raising=False)
    assert (host.fingerprint(model) == before) == (scale == 1.0)
