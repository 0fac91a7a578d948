"""What a graph says about a clip: a CONDITIONING holds no text, but the nodes before it do.

A graph is the host's: node id → {"class_type", "inputs"}, where a link is [node id, output]. Nodes of any pack stand in
it, so what is not sure is unknown: a caption is the whole text or none, a stride the right one or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXTS = ("text", "string", "value", "prompt")  # what nodes that encode or hold a text call it
MAX_CAPTION = 4096
FORGETS = ("ConditioningZeroOut",)  # nodes that hand on nothing of the text
CLIPS = ("TAVPrepareClip", "TAVLoadClip")
# Nodes that hand frames on one for one, and the input by which those come.
FRAMES = {
    "VAEEncode": "pixels",
    "VAEEncodeTiled": "pixels",
    "ImageScale": "image",
    "ImageScaleBy": "image",
    "ImageScaleToTotalPixels": "image",
    "ImageCrop": "image",
    "SetLatentNoiseMask": "samples",
    "Reroute": "",
}


def caption_of(prompt: Any, node_id: Any) -> str:
    """The text behind the `caption` input of a node, or "" when it cannot be known."""
    link: Any = _node(prompt, node_id)[1].get("caption")
    seen = set()
    while _is_link(link) and link[0] not in seen:
        seen.add(link[0])
        kind, inputs = _node(prompt, link[0])
        if kind in FORGETS:
            break
        texts = [value for name, value in inputs.items() if name in TEXTS and not _is_number(value)]
        others = [name for name, value in inputs.items() if name not in TEXTS and not _is_number(value)]
        if len(texts) == 1 and set(others) <= {"clip"}:
            text = _text(prompt, texts[0])
            return text if len(text) <= MAX_CAPTION else ""
        if texts or len(others) != 1:
            break  # more than one text, or CONDITIONING, or something that may change it
        link = inputs[others[0]]
    return ""


def stride_of(prompt: Any, node_id: Any) -> int | None:
    """The stride of the clip node behind the `latents` input of a node, or None when it cannot be known."""
    link: Any = _node(prompt, node_id)[1].get("latents")
    seen = set()
    while _is_link(link) and link[0] not in seen:
        seen.add(link[0])
        kind, inputs = _node(prompt, link[0])
        if kind in CLIPS:
            stride, fps = (_value(prompt, inputs.get(name, 0)) for name in ("stride", "resample_fps"))
            known = type(stride) is int and stride and fps == 0  # at another rate it is not of the video's own frames
            return stride if known and not _has_clip(prompt, inputs.get("frames")) else None
        link = inputs.get(FRAMES[kind]) if kind in FRAMES else None
    return None


def _text(prompt: Any, value: Any) -> str:
    """The text that an input gets, or "" when it cannot be known."""
    text, todo, seen = "", [value], set()
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            text += value
            continue
        if not _is_link(value) or value[0] in seen:
            return ""
        seen.add(value[0])
        kind, inputs = _node(prompt, value[0])
        if kind == "StringConcatenate":
            todo += [inputs.get(name) for name in ("string_b", "delimiter", "string_a")]
        else:
            todo.append(_only(inputs))
    return text


def _value(prompt: Any, value: Any) -> Any:
    """The value that an input gets, of its own or of a node that has but one; else None."""
    return _only(_node(prompt, value[0])[1]) if _is_link(value) else value


def _only(inputs: Mapping[str, Any]) -> Any:
    """The value of a node that has but one, under a name that says that it is handed on; else None."""
    return next((inputs[name] for name in (*TEXTS, "") if len(inputs) == 1 and name in inputs), None)


def _has_clip(prompt: Any, link: Any) -> bool:
    """Whether frames come from another clip node, whose stride would count as well."""
    todo, seen = [link], set()
    while todo:
        link = todo.pop()
        if _is_link(link) and link[0] not in seen:
            seen.add(link[0])
            kind, inputs = _node(prompt, link[0])
            if kind in CLIPS:
                return True
            todo += inputs.values()
    return False


def _node(prompt: Any, node_id: Any) -> tuple[str, Mapping[str, Any]]:
    """A node's kind and its inputs; "" and none when there is no such node, or it has another form."""
    node = prompt.get(str(node_id)) if isinstance(prompt, Mapping) else None
    kind, inputs = (node.get("class_type"), node.get("inputs")) if isinstance(node, Mapping) else (None, None)
    return kind if isinstance(kind, str) else "", inputs if isinstance(inputs, Mapping) else {}


def _is_link(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], (str, int))


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float))
