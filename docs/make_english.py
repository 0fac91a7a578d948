#!/usr/bin/env python3
"""Write the English names and texts of all nodes from their schemas, as a running ComfyUI with this pack has them.

  python docs/make_english.py http://127.0.0.1:8188

The other languages are translated from it: `locales/en/nodeDefs.json` is their pattern.
"""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

FILE = Path(__file__).resolve().parent.parent / "locales" / "en" / "nodeDefs.json"


def english(node: dict[str, Any]) -> dict[str, Any]:
    """What ComfyUI's page can translate of one node of `/object_info`."""
    inputs = {
        name: entry[1] for part in ("required", "optional") for name, entry in node["input"].get(part, {}).items()
    }
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {
            name: {"name": about.get("display_name", name), "tooltip": about["tooltip"]}
            for name, about in inputs.items()
        },
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


def main(address: str) -> None:
    with urlopen(address.rstrip("/") + "/object_info", timeout=60) as answer:
        nodes = json.load(answer)
    found = {name: english(node) for name, node in nodes.items() if name.startswith("TAV")}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")
    print(f"{len(found)} nodes in {FILE}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
