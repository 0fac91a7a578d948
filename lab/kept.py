"""Figures in a file, so that a long evaluation can be stopped, looked at, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..tav_core.store.files import write_whole


def kept(file: Path, setting: dict[str, Any], rows: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a file of the same setting, or computed and written there."""
    if file.exists():
        done = json.loads(file.read_text(encoding="utf-8"))
        if done["setting"] == setting:
            return done["rows"]
    computed = rows()
    text = json.dumps({"setting": setting, "rows": computed}, indent=1)
    write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
    return computed
