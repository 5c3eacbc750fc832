"""What stands for the others of its kind in every run; the others are marked `thorough`."""

import pytest


def thorough(*values):
    """A case of a parametrized test that only a thorough run takes."""
    return pytest.param(*values, marks=pytest.mark.thorough)


def cases(table, common):
    """The cases of a table, name -> value; only those of `common` are in every run."""
    assert set(common) <= table.keys()
    marks = {name: () if name in common else pytest.mark.thorough for name in table}
    return [pytest.param(value, id=name, marks=marks[name]) for name, value in table.items()]
