"""The budget of the tests themselves: what is over it is said, and what is within is not."""

from types import SimpleNamespace

import pytest
from budget import FILE, SLOW_TEST, TEST, Budget


def test_what_costs_too_much_is_listed_the_most_expensive_first() -> None:
    budget = Budget()
    for name, seconds, slow in (
        ("tests/a.py::quick", 0.5 * TEST, False),
        ("tests/a.py::unmarked", 1.1 * TEST, False),
        ("tests/a.py::marked", 1.1 * TEST, True),
        ("tests/b.py::endless", 1.1 * max(SLOW_TEST, FILE), True),
        ("tests/b.py::another", 0.5 * TEST, False),
    ):
        for share in (0.25, 0.75):  # setup and call
            keywords = {"slow": 1} if slow else {}
            report = SimpleNamespace(nodeid=name, processor_seconds=share * seconds, keywords=keywords)
            budget.pytest_runtest_logreport(report)
    assert [line.split()[-1] for line in budget.over()] == ["tests/b.py", "tests/b.py::endless", "tests/a.py::unmarked"]


def test_the_budget_is_kept_in_every_run(request: pytest.FixtureRequest) -> None:
    assert isinstance(request.config.pluginmanager.get_plugin("budget"), Budget)
