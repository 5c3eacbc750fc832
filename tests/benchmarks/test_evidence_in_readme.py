"""README says of the results what they say, and nothing that they do not."""

import json

import pytest

from benchmarks.readme import DESCRIPTION, README, Claim, claims_of, problems, table, with_all
from benchmarks.training.architectures import ARCHITECTURES
from benchmarks.training.presets import PRESETS


@pytest.fixture(scope="module")
def results():
    return README.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def made(results):
    return table(results), claims_of(results)


@pytest.fixture(scope="module")
def readme():
    return README.read_text(encoding="utf8")


def test_readme_has_the_table_and_the_numbers(readme, made):
    assert problems(readme, *made) == []
    assert with_all(readme, *made) == readme


def test_so_has_the_page_on_an_index(made):
    description = DESCRIPTION.read_text(encoding="utf8")
    assert with_all(description, *made) == description


def test_other_numbers_are_found_and_mended(readme, made):
    other = readme.replace("85.6%", "12.3%").replace("| no clipping | 0.", "| no clipping | 7.")
    assert [problem.partition(":")[0] for problem in problems(other, *made)] == ["does not say", "has another table"]
    assert with_all(other, *made) == readme


def test_a_number_from_nowhere_is_found(readme, made):
    (problem,) = problems(readme.replace("## Evidence", "It saves 41.7% of the time.\n\n## Evidence"), *made)
    assert "41.7%" in problem


class TestClaim:
    claim = Claim("ahead by 0.5 to 1,000 nats", "it.json")

    def test_words_may_break_where_they_like(self):
        assert self.claim.is_in("It is ahead by 0.5\nto 1,000 nats.")
        assert not self.claim.is_in("It is ahead by 0.5\nto 1,001 nats.")

    def test_numbers_are_put_in_and_words_left(self):
        assert self.claim.put_into("It is ahead by -0.25\nto 7 nats.") == "It is ahead by 0.5\nto 1,000 nats."
        assert self.claim.put_into("It is behind by 0.25 to 7 nats.") == "It is behind by 0.25 to 7 nats."


def test_no_model_of_a_result_is_above_the_size_that_readme_names(results, readme):
    assert "no model above 1 M parameters has been trained with it" in readme
    text = "".join(path.read_text(encoding="utf8") for path in results.glob("*.json"))
    trained = [preset for name, preset in PRESETS.items() if json.dumps(name) in text]
    assert trained
    for preset in trained:
        for architecture in ARCHITECTURES.values():
            assert sum(p.numel() for p in architecture.model(preset).parameters()) < 1e6
