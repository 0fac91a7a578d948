"""Untrusted file names and files: names that stay in their folder, headers checked before trusted, whole writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.torch_version import TorchVersion

MAX_HEADER = 16 << 20  # bytes; a full-size UNet's is 0.1 MB
MAX_COMPONENT = 200  # bytes of a name between two slashes; file systems take 255, and a counter and an ending are added
ZIP = b"PK\x03\x04"  # how a zip file begins
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes an element
UNFINISHED = ".tav.tmp"  # how temporary files end; others' end in .tmp too, in a folder of LoRAs, say
UNFINISHED_SECONDS = 3600  # what nothing was written to for so long was left by a process that was killed
DATE = {"M": "month", "d": "day", "h": "hour", "m": "minute", "s": "second"}  # letters of %date:…%, as in the page
RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"
}


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, existing or not; slashes of either kind part subfolders.

    The same names are accepted on every system, so that a workflow does not depend on where it was made.

    Raises ValueError for a name that would leave the folder, also through a link, or that some system cannot hold.
    """
    shown = repr(name[:80]) if isinstance(name, str) else type(name).__name__

    def refuse(why: str) -> ValueError:
        return ValueError(f"the name {shown} {why}. Use a plain name, or subfolder/name, inside {folder.name}.")

    if not isinstance(name, str) or not name:
        raise refuse("is not a file name")
    if not name.isprintable():  # NUL, line breaks, lone surrogates, marks that reverse the text's direction
        raise refuse("has invisible characters in it")
    if found := set(name) & set('<>:"|?*'):
        raise refuse(f"has {min(found)} in it, which not every system allows")
    parts = name.replace("\\", "/").split("/")
    for part in parts:
        if not part or part.startswith("."):
            raise refuse("is absolute, or has an empty or hidden part or a step upwards")
        if part.endswith((".", " ")) or part.startswith(" "):
            raise refuse("has a part that begins with a space or ends with a space or dot")
        if part.split(".")[0].rstrip().upper() in RESERVED:
            raise refuse("is one that Windows reserves for a device")
        if len(part.encode("utf-8")) > MAX_COMPONENT:
            raise refuse(f"has a part longer than {MAX_COMPONENT} bytes")
    # realpath, not Path.resolve, which raises on loops of links.
    root, path = os.path.realpath(folder), os.path.realpath(Path(folder, *parts))
    if not path.startswith(os.path.join(root, "")):
        raise refuse("is a link to outside of its folder (name other folders in extra_model_paths.yaml instead)")
    return Path(folder, *parts)


def filled(name: str, **values: object) -> str:
    """`name` with what ComfyUI's save nodes fill in: %year% … %second%, %date:yyyy-MM-dd%, and `values` by their name.

    Raises ValueError for what would be filled in elsewhere, such as %KSampler.seed%; a mere per cent sign may stay.
    """
    if not isinstance(name, str):
        return name  # `inside` says what it is
    now = datetime.now()
    values |= {part: f"{getattr(now, part):02}" for part in ("year", "month", "day", "hour", "minute", "second")}

    def digits(token: re.Match[str]) -> str:
        letter, length = token[0][0], len(token[0])
        return f"{now.year:04}"[-length:] if letter == "y" else f"{getattr(now, DATE[letter]):0{length}}"

    def value(found: re.Match[str]) -> str:
        what, _, form = found[1].partition(":")
        return re.sub("yyyy|yy|MM?|dd?|hh?|mm?|ss?", digits, form) if what == "date" else str(values[what])

    name = re.sub(f"%(date:[^%]*|{'|'.join(values)})%", value, name)
    if left := re.search(r"%([^\W\d_]\w*|[^%]+\.\w+)%", name):
        known = ", ".join(f"%{part}%" for part in values)
        raise ValueError(
            f"the name {name[:80]!r} has {left[0][:30]!r} in it, which nothing is filled in for here. What is: "
            f"%date:yyyy-MM-dd%, {known}."
        )
    return name


def write_new(
    folder: Path, prefix: str, ending: str, write: Callable[[Path], object], beside: Path | None = None
) -> Path:
    """Have `write` make a file or folder, then put it in place as the first free `prefix_00001…`; its path.

    Args:
        beside: another folder, where the name is to be free as well.

    All of it or nothing. Nothing is replaced, also where the disk or another process takes two names for one: a name is
    claimed by a hidden folder, made for it alone, in which `write` works.

    Raises ValueError as `inside`, or when the folder cannot be made, and OSError when the disk does not take it.
    """
    parents = [inside(place, prefix).parent for place in (folder, beside) if place]
    parent = parents[0]
    try:
        for each in parents:
            each.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder for {prefix!r} could not be made: {error.strerror}. Use another name.") from None
    sweep(folder, f"**/.*{UNFINISHED}")
    stem = Path(prefix.replace("\\", "/")).name
    taken, number = _taken(parents), 0
    while True:
        number += 1
        name = f"{stem}_{number:05}{ending}"
        if _one(name) in taken:
            continue
        claim = parent / f".{hashlib.sha256(_one(name).encode()).hexdigest()[:32]}{UNFINISHED}"
        with _said(name):
            try:
                claim.mkdir()
            except FileExistsError:
                continue
        try:
            if _one(name) in (taken := _taken(parents)):
                continue  # another process has ended in the meantime
            write(claim / name)
            with _said(name):
                os.replace(claim / name, parent / name)
            _flush_folder(parent)
            return parent / name
        finally:
            shutil.rmtree(claim, ignore_errors=True)


def _one(name: str) -> str:
    """One text for all names that some system takes for the same: in capitals or not, accents apart or not."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _taken(folders: list[Path]) -> set[str]:
    return {_one(path.name) for folder in folders for path in folder.iterdir()}


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left half-written: files and folders of a pattern, not touched for an hour."""
    found = []
    with contextlib.suppress(OSError):  # another process may be done with one of the folders
        found += folder.glob(pattern)
    for path in found:
        with contextlib.suppress(OSError):  # or sweep too
            inside = [path, *path.rglob("*")] if path.is_dir() else [path]
            if time.time() - max(part.lstat().st_mtime for part in inside) > UNFINISHED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make the file at a temporary path beside `path`, then put it in place: all of it or nothing.

    Raises OSError when the disk does not take it; what was at `path` is then as it was.
    """
    temporary = None
    try:
        with _said(path.name):
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=UNFINISHED, dir=path.parent)
            os.close(handle)
            write(Path(temporary))
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's are for the owner alone
            os.replace(temporary, path)
    finally:
        if temporary and os.path.exists(temporary):
            os.remove(temporary)
    _flush_folder(path.parent)


@contextlib.contextmanager
def _said(name: str) -> Iterator[None]:
    """What the disk does not take, in one line that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{name} could not be written: {why}. Free some space or choose another folder.") from None


def _flush_folder(folder: Path) -> None:
    """Make a new name last through a power cut, where folders can be flushed (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(contiguous, temporary, dict(metadata)))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2), encoding="utf-8"))


def refuse_text(path: Path) -> None:
    """Raises ValueError for what is saved under a model's name when a download goes wrong."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path.name} is empty: its download failed. Fetch it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path.name} is a Git LFS pointer, not the model: fetch the file itself (git lfs pull).")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError(f"{path.name} is a web page, not a model: fetch the file itself, not the page about it.")
    if b"\0" not in head and head.isascii():
        raise ValueError(f"{path.name} is a text file, not a model: fetch it again, from its download link.")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensor entries, metadata) of a safetensors file, checked against its size: nothing it claims is allocated.

    Raises ValueError for a file that is truncated, damaged, or holds other than floating-point tensors.
    """
    refuse_text(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"{path.name} is not a safetensors file: its header claims {length} bytes.")
        if size < 8 + length:
            raise ValueError(f"{path.name} is truncated: it ends within its header. Fetch or copy it again.")
        raw = file.read(length)
    damaged = ValueError(f"{path.name} is not a safetensors file, or a damaged one: fetch or copy it again.")
    try:
        entries = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(entries, dict):
        raise damaged
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged
    total = 0
    for name, entry in entries.items():
        entry = entry if isinstance(entry, dict) else {}
        kind, shape, offsets = entry.get("dtype"), _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
        if shape is None or offsets is None or len(shape) > 8 or len(offsets) != 2:
            raise damaged
        if not isinstance(kind, str) or kind not in FLOATS:
            raise ValueError(
                f"{path.name} holds {str(kind)[:20]!r} tensors ({name[:100]!r}); expected floating-point weights."
            )
        if offsets[1] - offsets[0] != math.prod(shape) * FLOATS[kind]:
            raise damaged
        total += offsets[1] - offsets[0]
    if total > size - 8 - length:
        raise ValueError(
            f"{path.name} is truncated: its tensors take {total} bytes, it has {size - 8 - length}. "
            "Fetch or copy it again."
        )
    return entries, metadata


def _counts(values: Any) -> list[int] | None:
    """A list of whole numbers, none negative, or None for anything else."""
    return values if isinstance(values, list) and all(type(v) is int and v >= 0 for v in values) else None


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; the tensors may be views of the file.

    Raises ValueError as `read_header` does.
    """
    _, metadata = read_header(path)
    try:
        return load_file(path), metadata
    except SafetensorError:
        raise ValueError(f"{path.name} is a damaged safetensors file: fetch or copy it again.") from None


def read_json(path: Path, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """A JSON object. Raises ValueError when it is none."""
    with open(path, "rb") as file:
        raw = file.read(max_bytes + 1)
    try:
        value = json.loads(raw.decode("utf-8")) if len(raw) <= max_bytes else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object of at most {max_bytes} bytes: fetch it again.")
    return value


def read_torch(path: Path) -> Any:
    """What `torch.save` put into a file, tensors and plain containers only (`weights_only=True`).

    Raises ValueError for anything else, including files of torch before 1.6, whose pickle says how much to allocate.
    """
    refuse_text(path)
    if TorchVersion(torch.__version__) < "2.6":  # CVE-2025-32434
        raise ValueError(
            f"{path.name} is a pickle, which torch {torch.__version__} cannot read safely: update torch to 2.6 or "
            "later, or convert the file to safetensors."
        )
    try:
        with open(path, "rb") as file:
            if file.read(len(ZIP)) != ZIP:  # torch looks here, zipfile at the end
                raise zipfile.BadZipFile
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            claimed = sum(entry.file_size for entry in entries)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ValueError(
            f"{path.name} is truncated, or not a file of torch 1.6 or later: fetch it again, or convert it to "
            "safetensors."
        ) from None
    if packed or claimed > path.stat().st_size:
        raise ValueError(f"{path.name} is not a file that torch wrote: its parts are larger than the file. Refused.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path.name} holds more than weights (a pickle that could run code) and was refused: convert it to "
            "safetensors where you trust it."
        ) from None
    except Exception as error:
        # Whatever torch stumbles over in a damaged file: its messages run over many lines.
        raise ValueError(
            f"{path.name} is damaged and could not be read ({type(error).__name__}): fetch it again."
        ) from None
