"""A batch's results, to be looked at: a table as CSV, a page with a contact sheet of each video."""

from __future__ import annotations

import csv
import html
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError
from PIL import Image

VIDEOS = {".mp4", ".webm", ".mkv", ".mov", ".gif"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
FRAMES, HEIGHT = 8, 128  # of a contact sheet
STYLE = """body{font:14px sans-serif;background:#1e1e1e;color:#d0d0d0;margin:16px}table{border-collapse:collapse}
td,th{border-bottom:1px solid #3a3a3a;padding:6px 10px;text-align:left;vertical-align:top}a{color:#7fb2e5}
th{position:sticky;top:0;background:#1e1e1e}.failed{color:#ff6b6b}.done{color:#8bc98b}img{display:block;max-height:128px}"""

Row = Mapping[str, Any]


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, whatever happens while it is written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def contact_sheet(video: Path) -> Path | None:
    """A strip of a video's frames beside it, NAME.jpg; None where it is no video that can be read."""
    if video.suffix.lower() not in VIDEOS:
        return None
    try:
        with av.open(str(video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (FFmpegError, IndexError):
        return None
    if not frames:
        return None
    count = min(FRAMES, len(frames))
    taken = [frames[i * (len(frames) - 1) // max(count - 1, 1)] for i in range(count)]
    width = max(round(taken[0].width * HEIGHT / taken[0].height), 1)
    sheet = Image.new("RGB", (count * (width + 2) - 2, HEIGHT), "#ffffff")
    for i, frame in enumerate(taken):
        sheet.paste(frame.resize((width, HEIGHT), Image.Resampling.BICUBIC), (i * (width + 2), 0))
    written = io.BytesIO()
    sheet.save(written, "JPEG", quality=85)
    path = video.with_name(f"{video.name}.jpg")
    write_whole(path, written.getvalue())
    return path


def write(folder: Path, rows: Iterable[Row]) -> None:
    """results.csv and index.html in a batch's folder, of a ledger's rows. Raises OSError when one cannot be written."""
    rows = list(rows)
    told = summary(Counter(row["state"] for row in rows))
    rows = [row for row in rows if row["state"] != "dropped"]
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    figures = list(dict.fromkeys(name for row in rows for name, value in row["scores"].items() if value is not None))
    try:
        write_whole(folder / "results.csv", _csv(rows, names, figures).encode("utf-8-sig"))  # as spreadsheets want it
    finally:  # a table that is open in a spreadsheet is no reason to have no page
        write_whole(folder / "index.html", _page(folder, told, rows, names, figures).encode())


def summary(counts: Mapping[str, int]) -> str:
    """Jobs by state, in words."""
    told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()) if state != "dropped")
    dropped = counts.get("dropped", 0)
    return told + (f"; {dropped} that the jobs file no longer has are left out" if dropped else "")


def _csv(rows: list[Row], names: list[str], figures: list[str]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["job", *names, "state", "attempt", "worker", "seconds", *figures, "outputs", "error"])
    for row in rows:
        table.writerow(
            [
                row["id"],
                *(row["values"].get(name, "") for name in names),
                *(row["state"], row["attempt"], row["worker"] or "", _rounded(row["seconds"])),
                *(_rounded(row["scores"].get(name)) for name in figures),
                *(";".join(row["outputs"]), row["error"] or ""),
            ]
        )
    return text.getvalue()


def _rounded(value: Any) -> Any:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value


def _page(folder: Path, told: str, rows: list[Row], names: list[str], figures: list[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (*names, "state", "seconds", *figures, "outputs"))
    body = "\n".join(_line(folder, row, names, figures) for row in rows)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(folder.name)}</title>'
        f"<style>{STYLE}</style><p>{html.escape(told)}</p>\n<table><tr>{head}</tr>\n{body}\n</table></html>\n"
    )


def _line(folder: Path, row: Row, names: list[str], figures: list[str]) -> str:
    cells = [row["values"].get(name, "") for name in names]
    state = f'<td class="{row["state"]}">{row["state"]}<br>{html.escape(row["error"] or "")}</td>'
    numbers = [_rounded(row["seconds"]), *(_rounded(row["scores"].get(name)) for name in figures)]
    outputs = "".join(_output(folder, name) for name in row["outputs"])
    first, last = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in part) for part in (cells, numbers))
    return f"<tr>{first}{state}{last}<td>{outputs}</td></tr>"


def _output(folder: Path, name: str) -> str:
    """A link to a file, behind its contact sheet or itself where it is a picture."""
    sheet = (
        f"{name}.jpg" if (folder / f"{name}.jpg").is_file() else name if Path(name).suffix.lower() in PICTURES else ""
    )
    shown = f'<img loading="lazy" alt="" src="{html.escape(sheet)}">' if sheet else ""
    return f'<a href="{html.escape(name)}">{shown}{html.escape(Path(name).name)}</a>'
