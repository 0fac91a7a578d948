"""What a graph says about a clip: a CONDITIONING holds no text, but the nodes before it do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TEXTS = ("text", "string", "value", "prompt")  # what the core's nodes call an input of text
MAX_CAPTION = 4096


def caption_of(prompt: Any, node_id: Any) -> str:
    """The text behind the `caption` input of a node, or "" when there is none to be found.

    Args:
        prompt: the host's: node id → {"class_type", "inputs"}, where a link is [node id, output].
    """
    for inputs in _upstream(prompt, _inputs(prompt, node_id).get("caption")):
        for name in TEXTS:
            if isinstance(text := inputs.get(name), str):
                return text[:MAX_CAPTION]
    return ""


def stride_of(prompt: Any, node_id: Any) -> int | None:
    """The stride of the Prepare Clip behind the `latents` input of a node, or None when there is none to be found."""
    for inputs in _upstream(prompt, _inputs(prompt, node_id).get("latents"), "TAVPrepareClip"):
        stride = inputs.get("stride")
        values = [stride, *(upstream.get("value") for upstream in _upstream(prompt, stride))]
        return next((value for value in values if type(value) is int), None)
    return None


def _inputs(prompt: Any, node_id: Any) -> Mapping[str, Any]:
    node = prompt.get(str(node_id)) if isinstance(prompt, Mapping) else None
    inputs = node.get("inputs") if isinstance(node, Mapping) else None
    return inputs if isinstance(inputs, Mapping) else {}


def _upstream(prompt: Any, link: Any, kind: str | None = None) -> Iterator[Mapping[str, Any]]:
    """The inputs of each node (of a kind) from a link upwards, nearest first."""
    queue, seen = [link], set()
    while queue:
        link = queue.pop(0)
        if not (isinstance(link, list) and len(link) == 2) or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        inputs = _inputs(prompt, link[0])
        if kind is None or prompt[str(link[0])].get("class_type") == kind:
            yield inputs
        queue.extend(inputs.values())
