"""What README promises in figures is what the documents and the pack say."""

import re

import pytest
from pack import PROJECT
from tune_a_video.tav_core.store import runs

README = (PROJECT / "README.md").read_text(encoding="utf-8")
NUMBER = r"\d+(?:\.\d+)?(?:e-\d+)?"


def numbers(text):
    return [float(found) for found in re.findall(NUMBER, text)]


@pytest.mark.parametrize("document", ["evaluation", "benchmarks", "parity"])
def test_figures_are_those_of_the_document_that_is_linked(document):
    bullets = re.split(r"\n(?=- |\n)", README)
    (bullet,) = [bullet for bullet in bullets if bullet.startswith("- ") and f"(docs/{document}.md)" in bullet]
    said = numbers(bullet.partition("](")[0])
    known = numbers((PROJECT / "docs" / f"{document}.md").read_text(encoding="utf-8"))
    assert len(said) >= 3 and set(said) <= set(known)


def test_what_is_linked_is_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert len(links) > 5
    assert not [link for link in links if not (PROJECT / link).is_file()]


def test_states_that_stay():
    assert f"The {runs.KEEP_RUNS} states used\n  last stay, up to {runs.KEEP_GIB:g} GiB" in README
