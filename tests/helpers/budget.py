"""What tests cost, in seconds of a processor, and which cost more than they may: said at the end, never a failure.

The clock would count what else runs on the machine. Processes that a test starts and waits for count with it, and
a fixture counts with the test that first asks for it.
"""

import os
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest

TEST = 10.0  # seconds that a test may take which is not marked slow
SLOW_TEST = 40.0  # and one that is
FILE = 100.0  # all tests of a file together


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


class Budget:
    """Adds ``processor_seconds`` to each report, where tests run; adds them up, where the summary is printed."""

    def __init__(self) -> None:
        self.tests: dict[str, float] = defaultdict(float)
        self.files: dict[str, float] = defaultdict(float)
        self.slow: set[str] = set()
        self._last = 0.0

    def pytest_collection_finish(self) -> None:
        self._last = processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        now = processor_seconds()
        report.processor_seconds, self._last = now - self._last, now
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests[report.nodeid] += report.processor_seconds
        self.files[report.nodeid.partition("::")[0]] += report.processor_seconds
        if "slow" in report.keywords:
            self.slow.add(report.nodeid)

    def over(self) -> list[str]:
        """A line for each test and each file above its budget, the most expensive first."""
        budgets = {name: (SLOW_TEST if name in self.slow else TEST, seconds) for name, seconds in self.tests.items()}
        budgets |= {name: (FILE, seconds) for name, seconds in self.files.items()}
        above = [(seconds, budget, name) for name, (budget, seconds) in budgets.items() if seconds > budget]
        return [f"{seconds:6.1f} of {budget:.0f} s  {name}" for seconds, budget, name in sorted(above, reverse=True)]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        lines = self.over()
        if lines:
            terminalreporter.section("over their budget of processor time (docs/contributing/index.md)")
            for line in lines:
                terminalreporter.write_line(line)
