"""What the graph says of a clip: the whole caption or none, the right stride or none."""

import pytest
from prompts import node
from tune_a_video.nodes.graph import MAX_CAPTION, caption_of, stride_of

ENCODE = {"clip": ["1", 1]}


def caption(**nodes):
    """The caption of a tune behind `c`."""
    return caption_of({"tune": node("TAVOneShotTune", caption=["c", 0]), **nodes}, "tune")


def encoded(text, **nodes):
    return caption(c=node("CLIPTextEncode", text=text, **ENCODE), **nodes)


def joined(a, b, delimiter=" "):
    return node("StringConcatenate", string_a=a, string_b=b, delimiter=delimiter)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (encoded("a red car"), "a red car"),
        (encoded(["t", 0], t=node("PrimitiveStringMultiline", value="a red car")), "a red car"),
        (encoded(["t", 0], t=joined("a red car", "on the beach")), "a red car on the beach"),
        (encoded(["t", 0], t=joined("a", ["u", 0], ", "), u=joined("b", "c", "")), "a, bc"),
        (encoded(["r", 0], r=node("Reroute", **{"": ["t", 0]}), t=node("PrimitiveString", value="a car")), "a car"),
        (caption(c=node("Reroute", **{"": ["e", 0]}), e=node("E", text="a car", **ENCODE)), "a car"),
        (caption(c=node("SomethingSetTimes", conditioning=["e", 0], start=0.0), e=node("E", text="a", **ENCODE)), "a"),
    ],
)
def test_the_whole_caption(found, expected):
    assert found == expected


E = node("CLIPTextEncode", text="a red car", **ENCODE)


@pytest.mark.parametrize(
    "nodes",
    [
        {"c": node("ConditioningAverage", conditioning_to=["e", 0], conditioning_from=["e", 0])},
        {"c": node("ConditioningZeroOut", conditioning=["e", 0])},
        {"c": node("ConditioningConcat", conditioning_to=["e", 0], conditioning_from=["x", 0])},
        {"c": node("GLIGENTextBoxApply", conditioning_to=["e", 0], text="a dog", **ENCODE)},
        {"c": node("AddWords", conditioning=["e", 0], words="on the beach")},
        {"c": node("Encode", text="a car", suffix="on the beach", **ENCODE)},
        {"c": node("EncodeTwo", text="a car", prompt="on the beach", **ENCODE)},
        {"c": node("E", text=["t", 0], **ENCODE), "t": node("StringReplace", string="a", find="a", replace="b")},
        {"c": node("E", text=["t", 0], **ENCODE), "t": node("StringSubstring", string="abc", start=0, end=1)},
        {"c": node("E", text=["t", 0], **ENCODE), "t": node("LoadText", file="a.txt")},
        {"c": node("E", text=["t", 0], **ENCODE), "t": joined("a red car", ["t", 0])},
        {"c": node("E", text=["t", 0], **ENCODE), "t": joined("a red car", ["404", 0])},
        {
            "c": node("E", text=["t", 0], **ENCODE),
            "t": {"class_type": "StringConcatenate", "inputs": {"string_a": "a"}},
        },
        {"c": node("E", text="a" * (MAX_CAPTION + 1), **ENCODE)},
        {"c": node("Loop", conditioning=["c", 0])},
    ],
)
def test_no_part_of_a_caption(nodes):
    assert caption(e=E, **nodes) == ""


def stride(**nodes):
    """The stride of a tune behind `l`."""
    return stride_of({"tune": node("TAVOneShotTune", latents=["l", 0]), **nodes}, "tune")


CLIP = node("TAVPrepareClip", frames=["video", 0], stride=3)


@pytest.mark.parametrize("kind", ["TAVPrepareClip", "TAVLoadClip"])
def test_the_stride(kind):
    clip = node(kind, video="a.mp4", stride=3)
    assert stride(l=clip) == 3
    assert stride(l=node("VAEEncode", pixels=["i", 0], vae=["1", 2]), i=node("ImageScale", image=["p", 0]), p=clip) == 3
    assert stride(l=node(kind, stride=["n", 0]), n=node("PrimitiveInt", value=4)) == 4
    assert stride(l=node(kind, stride=3, resample_fps=0.0)) == 3
    assert stride(l=node(kind, stride=3, resample_fps=["n", 0]), n=node("PrimitiveFloat", value=0)) == 3


@pytest.mark.parametrize(
    "nodes",
    [
        {"l": node("VAEEncode", pixels=["i", 0]), "i": node("EveryNth", image=["p", 0], n=2), "p": CLIP},
        {"l": node("VAEEncode", pixels=["i", 0]), "i": node("ImageBatch", image1=["p", 0], image2=["p", 0]), "p": CLIP},
        {"l": node("TAVPrepareClip", frames=["p", 0], stride=2), "p": CLIP},
        {"l": node("TAVPrepareClip", stride=["n", 0]), "n": node("Add", value=["a", 0], b=2)},
        {"l": node("TAVPrepareClip", stride=True)},
        {"l": node("TAVLoadClip", stride=2, resample_fps=8.0)},
        {"l": node("TAVLoadClip", stride=2, resample_fps=["n", 0]), "n": node("PrimitiveFloat", value=8.0)},
        {"l": node("TAVLoadClip", stride=2, resample_fps=["n", 0]), "n": node("Add", value=["a", 0], b=2)},
        {"l": node("VAEEncode", pixels=["l", 0])},
    ],
)
def test_no_wrong_stride(nodes):
    assert stride(**nodes) is None


ODD = [None, 1, "x", [], {}, {"class_type": 1}, {"inputs": {"text": "a"}}, {"class_type": "VAEEncode", "inputs": [1]}]
ODD += [{"inputs": {"caption": ["c", 0], "latents": ["c", 0], "frames": [None, 0]}}, {"inputs": {1: [[], 0], None: 2}}]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_graph_is_no_error(odd):
    link = ["c", 0]
    for tune in (odd, node("T", caption=link, latents=link), node("T", caption=odd, latents=odd)):
        for prompt in ({"tune": tune, "c": odd}, odd):
            assert caption_of(prompt, "tune") in ("", "a")
            assert stride_of(prompt, "tune") is None


def test_a_long_chain_is_no_error():
    chain = {str(n): joined("a", [str(n + 1), 0], "") for n in range(3000)} | {"3000": node("P", value="b")}
    assert encoded(["0", 0], **chain) == "a" * 3000 + "b"
