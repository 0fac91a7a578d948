#!/usr/bin/env python3
"""List the texts whose English has changed since the other languages were made from it: those may say something else.

python docs/translations.py          list them
python docs/translations.py --done   take note that all languages say what the English says now
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ENGLISH = Path(__file__).resolve().parent.parent / "locales" / "en" / "nodeDefs.json"
TRANSLATED = Path(__file__).resolve().parent / "translated_from.json"  # ENGLISH as it was at the last --done


def texts(part: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Every text of a locale file's part, by the path of its keys."""
    if isinstance(part, str):
        return {path: part}
    return {key: text for name, inner in part.items() for key, text in texts(inner, (*path, name)).items()}


def stale() -> dict[tuple[str, ...], str]:
    """The English of now, of each text that is not what was translated."""
    now, before = (texts(json.loads(file.read_text(encoding="utf-8"))) for file in (ENGLISH, TRANSLATED))
    return {key: text for key, text in now.items() if before.get(key) != text}


def main(arguments: list[str]) -> None:
    if arguments == ["--done"]:
        shutil.copyfile(ENGLISH, TRANSLATED)
    elif arguments:
        sys.exit(__doc__)
    for key, text in stale().items():
        mark = "::warning::stale translations: " if "GITHUB_ACTIONS" in os.environ else ""
        print(f"{mark}{'.'.join(key)}: {text}")


if __name__ == "__main__":
    main(sys.argv[1:])
