"""What the schemas share."""

import inspect
from typing import Any

from comfy_api.latest import io

CATEGORY = "Tune-A-Video"
Weights = io.Custom("TAV_WEIGHTS")


def advanced(kind: Any, name: str, **kwargs: Any) -> Any:
    """An input that newer hosts fold away under "advanced"; on hosts without that it is an ordinary one."""
    if "advanced" in inspect.signature(kind.Input.__init__).parameters:
        kwargs["advanced"] = True
    return kind.Input(name, **kwargs)


def found_by(*words: str) -> dict[str, Any]:
    """Other words under which a newer host's page finds a node; on hosts without that, nothing."""
    return {"search_aliases": list(words)} if "search_aliases" in inspect.signature(io.Schema).parameters else {}
