"""The help pages, and the nodes' names and texts in the page's languages, against the nodes themselves."""

import ast
import asyncio
import json
import re
import runpy
import unicodedata
import warnings
from collections import Counter
from decimal import Decimal

import pytest
import tune_a_video
from pack import PROJECT
from PIL import Image

TOOL = runpy.run_path(str(PROJECT / "docs" / "translations.py"))
texts, STALE = TOOL["texts"], TOOL["stale"]()
DOCS = PROJECT / tune_a_video.WEB_DIRECTORY / "docs"
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko", "fr", "es", "ru", "ar")
HELP_LANGUAGES = ("en", "zh")
SAME_EVERYWHERE = {"cfg"}

SCHEMAS = {
    schema.node_id: schema
    for node in asyncio.run(asyncio.run(tune_a_video.comfy_entrypoint()).get_node_list())
    for schema in [node.define_schema()]
}


def english(schema):
    """What the page can translate of a node, in the form of its locale files: inputs by id, outputs by number."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {end.id: {"name": end.display_name or end.id, "tooltip": end.tooltip} for end in schema.inputs},
        "outputs": {str(i): {"name": e.display_name, "tooltip": e.tooltip} for i, e in enumerate(schema.outputs)},
    }


def read(language):
    return json.loads((PROJECT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


ENGLISH = texts({name: english(schema) for name, schema in SCHEMAS.items()})
LOCALES = {language: texts(read(language)) for language in LANGUAGES}


# --- translations -----------------------------------------------------------------------------------------------


def test_english_is_what_the_nodes_say():
    """If not: run ComfyUI and `python docs/make_english.py ADDRESS`; `docs/translations.py` then lists the stale."""
    assert LOCALES["en"] == ENGLISH


def test_languages():
    assert {path.name for path in (PROJECT / "locales").iterdir()} == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_every_text_is_there_and_none_is_left_over(language):
    missing, stale = ENGLISH.keys() - LOCALES[language].keys(), LOCALES[language].keys() - ENGLISH.keys()
    assert (sorted(missing), sorted(stale)) == ([], [])


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_every_text_is_translated(language):
    untranslated = {
        key: text
        for key, text in LOCALES[language].items()
        if not text.strip() or (text == ENGLISH.get(key) and text not in SAME_EVERYWHERE)
    }
    assert untranslated == {}


def test_texts_whose_english_has_changed_are_listed(tmp_path, capsys, monkeypatch):
    """They are told, here and by `python docs/translations.py`, and fail nothing: who writes English need not wait."""
    for key in STALE:
        warnings.warn(f"translated from another English: {'.'.join(key)}", stacklevel=1)
    changed = read("en")
    changed["TAVOneShotTune"]["inputs"]["steps"]["tooltip"] = "Now 7 steps."
    (tmp_path / "en.json").write_text(json.dumps(changed), encoding="utf-8")
    monkeypatch.setitem(TOOL["main"].__globals__, "ENGLISH", tmp_path / "en.json")
    TOOL["main"]([])
    assert "TAVOneShotTune.inputs.steps.tooltip: Now 7 steps.\n" in capsys.readouterr().out


def numbers(text):
    return Counter(found.replace(",", ".") for found in re.findall(r"\d+(?:[.,]\d+)*(?:e-\d+)?", text))


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_translations_give_the_same_numbers(language):
    """So that one is not forgotten when advice changes; words such as "one" may become numbers."""
    lost = {
        key: text
        for key, text in LOCALES[language].items()
        if key in ENGLISH and key not in STALE and numbers(ENGLISH[key]) - numbers(text)
    }
    assert lost == {}


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_translations_name_other_nodes_as_the_page_does(language):
    own = LOCALES[language]
    names = {ENGLISH[name, "display_name"]: own[name, "display_name"] for name in SCHEMAS}
    wrong = {
        (key, name)
        for key, text in ENGLISH.items()
        for name in names
        if key[1] != "display_name" and key not in STALE and name in text and names[name] not in own[key]
    }
    assert wrong == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_page_reads_the_texts_as_they_are(language):
    """Its messages have a syntax of their own: {name}, @:link, one | many."""
    assert {key: text for key, text in LOCALES[language].items() if set("{}@|") & set(text)} == {}


# --- help pages -------------------------------------------------------------------------------------------------


def help_path(node, language):
    """Where the page looks: first in its own language, then at the English one."""
    return DOCS / f"{node}.md" if language == "en" else DOCS / node / f"{language}.md"


def help_pages():
    return [pytest.param(node, language, id=f"{node}-{language}") for node in SCHEMAS for language in HELP_LANGUAGES]


def sections(node, language):
    """The introduction and the page's four sections: inputs, outputs, errors, source; wide brackets made narrow."""
    page = unicodedata.normalize("NFKC", help_path(node, language).read_text(encoding="utf-8"))
    parts = re.split(r"^## .+$", page, flags=re.MULTILINE)
    assert len(parts) == 5
    return parts


def entries(section):
    """(name, code in the brackets, whole line) of lines such as: - **steps** (`500`; `1` to `100000`): text"""
    lines = [line for line in section.splitlines() if line.startswith("- ")]
    found = [re.fullmatch(r"- \*\*(.+?)\*\*\s?(?:\((.*?)\))?:\s?\S.*", line) for line in lines]
    assert all(found), lines[found.index(None)]
    return [(match[1], re.findall(r"`(.+?)`", match[2] or ""), match[0]) for match in found if match]


def number(text):
    return Decimal(str(text)).normalize()


def stated(entry):
    """What the page says in the brackets after an input: its type, or default and range, or default and choices."""
    default, options = getattr(entry, "default", None), getattr(entry, "options", None)
    if default is None or default == "":
        return [] if hasattr(entry, "default") else [entry.get_io_type()]
    if isinstance(default, bool):
        return [str(default).lower()]
    if isinstance(default, str):
        return [default, *(options or [])]
    return [number(value) for value in (default, entry.min, entry.max)]


def test_no_help_page_is_left_over():
    expected = {help_path(node, language) for node in SCHEMAS for language in HELP_LANGUAGES}
    assert set(DOCS.rglob("*.md")) == expected


@pytest.mark.parametrize(("node", "language"), help_pages())
def test_help_explains_every_input(node, language):
    inputs = SCHEMAS[node].inputs
    found = entries(sections(node, language)[1])
    names = {entry.id: LOCALES[language][node, "inputs", entry.id, "name"] for entry in inputs}
    assert [name for name, _code, _line in found] == [names[entry.id] for entry in inputs]
    for entry, (_name, code, line) in zip(inputs, found, strict=True):
        if language != "en":  # the id is what errors and workflows name
            assert code.pop(0) == entry.id
        assert (entry.id, [number(text) if hasattr(entry, "min") else text for text in code]) == (
            entry.id,
            stated(entry),
        )
        if not hasattr(entry, "default"):
            assert ("optional" in line or "可选" in line) == entry.optional, entry.id


@pytest.mark.parametrize(("node", "language"), help_pages())
def test_help_explains_every_output(node, language):
    outputs = SCHEMAS[node].outputs
    found = [(name, *code) for name, code, _line in entries(sections(node, language)[2])]
    names = [LOCALES[language][node, "outputs", str(i), "name"] for i in range(len(outputs))]
    assert found == [(name, output.get_io_type()) for name, output in zip(names, outputs, strict=True)]


def messages():
    """Every text of the pack's code; what is filled in while it runs is a line break."""
    found = []
    for path in (*PROJECT.glob("tav_core/**/*.py"), *PROJECT.glob("nodes/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


MESSAGES = messages()


@pytest.mark.parametrize(("node", "language"), help_pages())
def test_help_quotes_messages_that_the_code_has(node, language):
    quoted = re.findall(r"^- `(.+?)`:\s?\S", sections(node, language)[3], flags=re.MULTILINE)
    for quote in quoted:
        pattern = re.compile(r".*\n.*".join(map(re.escape, quote.split(" ... "))), re.DOTALL)
        assert any(pattern.search(message) for message in MESSAGES), quote
    assert quoted or "Demo" in node, "no error and its cure"


def test_the_readme_quotes_messages_that_the_code_has():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("## If something goes wrong\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    quotes = [quote for row in rows for quote in re.findall("`(.+?)`", row)]
    assert len(quotes) > 5
    for quote in quotes:
        pattern = re.compile(".*\n.*".join(re.escape(part) for part in quote.split("…")), re.DOTALL)
        assert any(pattern.search(message) for message in MESSAGES), quote


@pytest.mark.parametrize("node", SCHEMAS)
def test_both_languages_explain_the_same_errors(node):
    quotes = [re.findall(r"^- `(.+?)`", sections(node, language)[3], re.MULTILINE) for language in HELP_LANGUAGES]
    assert quotes[0] == quotes[1]


@pytest.mark.parametrize(("node", "language"), help_pages())
def test_help_shows_the_node_and_names_the_paper(node, language):
    start, *_middle, source = sections(node, language)
    # The page looks for pictures in web/docs, whatever the language.
    assert f"]({'pictures/' + node}.png)" in start
    path = DOCS / "pictures" / f"{node}.png"
    assert path.stat().st_size <= 40_000
    with Image.open(path) as picture:
        assert picture.width >= 200
    assert "2212.11565" in source
