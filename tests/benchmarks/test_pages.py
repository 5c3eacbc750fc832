"""The published pages are what the commands make of the published results, and the benchmarks' README keeps to them."""

import importlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import benchmarks
from benchmarks.__main__ import COMMANDS
from benchmarks.gpu import page as gpu_page
from benchmarks.report.pages import restored, seeds, write_result

FOLDER = Path(benchmarks.__file__).parent
RESULTS = FOLDER / "results"
README = (FOLDER / "README.md").read_text(encoding="utf8")
COUNTED_BY_TESTS = {"collectives"}  # a page without a command


def page_of(result):
    """The page that a result's command makes of it."""
    return importlib.import_module(COMMANDS[result["name"].split()[0]]).page(result)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_published_page_is_made_of_its_result(path):
    result = json.loads(path.read_text(encoding="utf8"))
    assert path.with_suffix(".md").read_text(encoding="utf8") == page_of(result)


def test_every_published_page_has_a_result():
    pages, results = ({path.stem for path in RESULTS.glob(f"*.{kind}")} for kind in ("md", "json"))
    assert pages - results == COUNTED_BY_TESTS
    assert results <= pages


def anchors(text):
    return {heading.strip().lower() for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


def links(text):
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("page", [FOLDER / "README.md", *sorted(RESULTS.glob("*.md"))], ids=lambda page: page.stem)
def test_links_resolve(page):
    for link in links(page.read_text(encoding="utf8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf8")), link


def test_the_anchors_that_the_main_readme_uses_exist():
    text = (FOLDER.parent / "README.md").read_text(encoding="utf8")
    used = {link.partition("#")[2] for link in links(text) if link.startswith("benchmarks/README.md#")}
    assert used
    assert used <= anchors(README)


def test_the_readme_is_short_and_names_every_command():
    assert len(README.splitlines()) <= 120
    assert set(COMMANDS) <= anchors(README)


def numbers(text):
    """What is measured: numbers with a decimal point, and percentages, outside of code."""
    prose = re.sub(r"`[^`]*`|^ {4}.*$|arXiv:\S+", "", text, flags=re.MULTILINE)
    return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?%|(?<![\w.])\d+\.\d+(?![\d.%])", prose))


def test_every_figure_in_the_readme_stands_in_a_page_that_its_paragraph_links_to():
    held = 0
    for part in re.split(r"\n## |\n(?=\| \[)", README):
        named = [link for link in links(part) if link.endswith(".md")]
        pages = " ".join((FOLDER / link).read_text(encoding="utf8") for link in named)
        for number in numbers(part):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", pages), number
            held += 1
    assert held > 20


@dataclass
class Item:
    value: float
    maybe: float | None
    name: str = "item"


def test_null_is_nan_where_a_number_must_be(tmp_path):
    seen = []
    write_result(tmp_path / "it.json", {"rows": [vars(Item(math.nan, None))]}, lambda r: str(seen.append(r)))
    written = json.loads((tmp_path / "it.json").read_text())
    assert seen == [written]  # the page is made of what the JSON says, not of what was rounded or lost on the way
    (row,) = written["rows"]
    assert row["value"] is None
    item = restored(Item, row)
    assert math.isnan(item.value)
    assert item.maybe is None


@pytest.mark.parametrize(
    ("values", "words"), [([3], "seed 3"), ([0, 1, 2], "seeds 0 to 2"), ([0, 2, 5], "seeds 0, 2, 5")]
)
def test_seeds_in_words(values, words):
    assert seeds(values) == words


def test_the_page_of_a_device():
    """No device has written one yet: a result of `overhead` with what only a device has."""
    result = json.loads((RESULTS / "overhead.json").read_text())
    checks = {"captured_steps": 10, "gradient_bandwidth": 0.5, "extra_memory": 4096}
    rows = [row | checks | {"reads_nothing_back": i > 0} for i, row in enumerate(result["rows"][:2])]
    page = gpu_page(result | {"name": "gpu", "rows": rows})
    first, second = page.partition("What a step does besides:")[2].splitlines()[4:6]
    assert "**no**" in first
    assert re.search(r"yes .* 10 .* 50% .* 4,096 ", second)
