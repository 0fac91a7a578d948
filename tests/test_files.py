"""New files and folders: their names, whole or nothing, and never in place of another."""

import os
import subprocess
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from pack import PROJECT
from tune_a_video.nodes import ExportPublished, LoadWeights, SaveWeights
from tune_a_video.tav_core.pipeline import library
from tune_a_video.tav_core.store import files

# --- no name twice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there, asked",
    [
        ("car", "Car"),
        ("STRASSE", "straße"),
        (unicodedata.normalize("NFD", "été"), unicodedata.normalize("NFC", "été")),
        (unicodedata.normalize("NFC", "Été"), unicodedata.normalize("NFD", "été")),
    ],
)
def test_names_that_are_one_on_some_system(folder, model, make_weights, there, asked):
    learned = make_weights(model)
    assert SaveWeights.execute(learned, there, "fp32").result == (f"{there}_00001.safetensors",)
    assert SaveWeights.execute(learned, asked, "fp32").result == (f"{asked}_00002.safetensors",)
    assert ExportPublished.execute(model, learned, there).result == (f"{there}_00001",)
    assert ExportPublished.execute(model, learned, asked).result == (f"{asked}_00002",)


def test_a_name_is_taken_while_it_is_written(folder):
    def write(path):
        assert (library.weights_list(), library.published_list()) == ([], []), "what is not whole is not listed"
        inner = files.write_new(folder, "CAR", ".safetensors", lambda path: path.write_text("inner", encoding="utf-8"))
        assert inner.name == "CAR_00002.safetensors"
        path.write_text("outer", encoding="utf-8")

    assert files.write_new(folder, "car", ".safetensors", write).read_text(encoding="utf-8") == "outer"
    assert sorted(path.name for path in folder.iterdir()) == ["CAR_00002.safetensors", "car_00001.safetensors"]


def test_saves_at_one_time_get_names_of_their_own(folder, model, make_weights):
    count = 6
    together = threading.Barrier(count)

    def save(number):
        together.wait()
        learned = make_weights(model, caption=str(number))
        return SaveWeights.execute(learned, ("car", "Car")[number % 2], "fp32").result[0]

    with ThreadPoolExecutor(count) as pool:
        names = list(pool.map(save, range(count)))
    assert len({name.lower() for name in names}) == count
    assert [LoadWeights.execute(name).result[0].caption for name in names] == [str(n) for n in range(count)]
    assert len(list(folder.iterdir())) == count


SCRIPT = f"""
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {str(PROJECT / "tav_core" / "store" / "files.py")!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
folder, who = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
"""


def start(script, folder, who):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT + script, str(folder), who], **pipes)


def test_processes_get_names_of_their_own(folder):
    script = """
for number in range(20):
    text = f"{who} {number}"
    print(files.write_new(folder, who, ".txt", lambda path: path.write_text(text)).name)
"""
    processes = [start(script, folder, who) for who in ("car", "Car", "CAR")]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    names = [name for process in processes for name in process.communicate()[0].split()]
    assert len({name.lower() for name in names}) == 60
    assert len({(folder / name).read_text(encoding="utf-8") for name in names}) == 60
    assert sorted(os.listdir(folder)) == sorted(names)


# --- whole or nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("bad"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing_and_takes_no_number(folder, model, make_weights, monkeypatch, error):
    learned = make_weights(model)

    def fail(*_args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", fail)  # of an export the last file
        patch.setattr(files, "write_whole", fail)
        with pytest.raises(type(error)):
            ExportPublished.execute(model, learned, "mine")
        with pytest.raises(type(error)):
            SaveWeights.execute(learned, "mine", "fp32")
    assert list(folder.rglob("*")) == []
    assert ExportPublished.execute(model, learned, "mine").result == ("mine_00001",)
    assert SaveWeights.execute(learned, "mine", "fp32").result == ("mine_00001.safetensors",)


def test_an_export_without_its_last_file_leaves_nothing(folder, model, make_weights, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        ExportPublished.execute(model, make_weights(model), "mine")
    assert list(folder.rglob("*")) == []


def age(path, hours):
    then = time.time() - 3600 * hours
    for part in [*path.rglob("*"), path]:
        os.utime(part, (then, then))


def test_what_killed_saves_left_is_removed(folder, model, make_weights):
    killed = start("files.write_new(folder / 'sub', who, '', lambda path: (path.mkdir(), os._exit(9)))", folder, "car")
    killed.communicate("\n")
    (claim,) = (folder / "sub").iterdir()
    (claim / "car_00001" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(1000))
    of_a_file = folder / f".w_00001.safetensors.k3x8_a2q{files.UNFINISHED}"
    others = folder / ".syncthing.skiing.safetensors.tmp"
    others.touch()
    of_a_file.touch()
    users = folder / "notes.tmp"
    users.touch()
    for path in (claim, of_a_file, users):
        age(path, 0.9)
    learned = make_weights(model)
    SaveWeights.execute(learned, "w", "fp32")
    assert claim.exists() and of_a_file.exists(), "another process may be at work there"
    for path in (claim, of_a_file, users, others):
        age(path, 1.1)
    (claim / "car_00001" / "diffusion_pytorch_model.safetensors").touch()
    SaveWeights.execute(learned, "w", "fp32")
    assert claim.exists() and not of_a_file.exists(), "one file of it is still written"
    age(claim, 1.1)
    ExportPublished.execute(model, learned, "mine")
    assert not claim.exists() and users.exists() and others.exists()


def test_what_cannot_be_removed_stops_nothing(folder, model, make_weights, monkeypatch):
    kept, removed = (f".{name}{files.UNFINISHED}" for name in "ab")
    for name in (kept, removed):
        (folder / name).touch()
        age(folder / name, 2)
    unlink = files.Path.unlink

    def locked(path, *args):
        if path.name == kept:
            raise PermissionError(13, "Permission denied")
        unlink(path, *args)

    monkeypatch.setattr(files.Path, "unlink", locked)
    (name,) = SaveWeights.execute(make_weights(model), "w", "fp32").result
    assert sorted(path.name for path in folder.iterdir()) == [kept, name]


def test_a_folder_that_goes_while_it_is_listed_stops_nothing(folder, model, make_weights, monkeypatch):
    def gone(_folder, _pattern):
        yield from ()
        raise FileNotFoundError(2, "No such file or directory")  # another process has ended its save

    monkeypatch.setattr(files.Path, "glob", gone)
    assert SaveWeights.execute(make_weights(model), "w", "fp32").result == ("w_00001.safetensors",)


# --- what is filled in ------------------------------------------------------------------------------------------


def filled(name, **values):
    """Also the moment before, as a minute may have ended in between."""
    before = datetime.now()
    return files.filled(name, **values), before


@pytest.mark.parametrize(
    "name, form",
    [
        ("%year%-%month%-%day%/tune", "%Y-%m-%d/tune"),
        ("%hour%h%minute%", "%Hh%M"),
        ("a_%date:yyyy-MM-dd%", "a_%Y-%m-%d"),
        ("%date:yyMMdd%_%date:hhmm%", "%y%m%d_%H%M"),
        ("%date:yyyy/MM%/%year%", "%Y/%m/%Y"),
        ("%date:yyyy.MM%", "%Y.%m"),
        ("100%_%year%", "100%%_%Y"),
        ("100%cotton_%year%", "100%%cotton_%Y"),
        ("50% of 100%", "50%% of 100%%"),
    ],
)
def test_dates_in_names(name, form):
    result, before = filled(name)
    assert result in {moment.strftime(form) for moment in (before, before + timedelta(seconds=1))}


def test_seconds_single_digits_and_sizes():
    result, before = filled("%second%|%date:s|ss|d|M|h|m%")
    assert result in {
        f"{m.second:02}|{m.second}|{m.second:02}|{m.day}|{m.month}|{m.hour}|{m.minute}"
        for m in (before, before + timedelta(seconds=1))
    }
    assert files.filled("%width%x%height%", width=512, height=256) == "512x256"


@pytest.mark.parametrize("name", ["%KSampler.seed%", "%date%", "a/%Empty Latent Image.width%", "%Year%", "%采样.seed%"])
def test_what_is_filled_in_elsewhere_is_refused(folder, model, make_weights, name):
    for save in (
        lambda: SaveWeights.execute(make_weights(model), name, "fp32"),
        lambda: ExportPublished.execute(model, make_weights(model), name),
    ):
        with pytest.raises(ValueError, match=r"^the name .* which nothing is filled in for here. What is: %date:yyyy"):
            save()
    assert list(folder.rglob("*")) == []


def test_nodes_fill_names_in(folder, model, make_weights):
    learned = replace(make_weights(model), size=(64, 48))
    year = {str(datetime.now().year)}
    saved = SaveWeights.execute(learned, "%year%/%width%x%height%", "fp32").result[0]
    exported = ExportPublished.execute(model, learned, "%date:yyyy%_%width%").result[0]
    year.add(str(datetime.now().year))
    assert saved in {f"{y}/64x48_00001.safetensors" for y in year} and (folder / saved).is_file()
    assert exported in {f"{y}_64_00001" for y in year} and (folder / exported / "unet").is_dir()
    with pytest.raises(ValueError, match="'%width%' in it"):  # where it is unknown
        SaveWeights.execute(make_weights(model), "%width%", "fp32")
    for name in ("%date:../../x%", "%year%/../../x", "%date:hh:mm%"):
        with pytest.raises(ValueError, match=r"^the name "):
            SaveWeights.execute(learned, name, "fp32")
