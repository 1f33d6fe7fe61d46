"""Prints what CI sums up: `skip: name: reason` for each skip, and a last line `suite oracle: ...`."""
import os

import pytest

from common import MFT


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1000, help="random strings per tokenizer [1000]")
    parser.addoption("--fuzz-seed", type=int, default=1, help="seed of the random strings [1]")


def pytest_sessionstart(session):
    if not os.access(MFT, os.X_OK):
        pytest.exit("%s is not there: run make first" % MFT, returncode=2)


def pytest_terminal_summary(terminalreporter):
    count = lambda kind: len(terminalreporter.stats.get(kind, []))
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line("skip: %s: %s" % (report.nodeid.split("/")[-1], reason.replace("Skipped: ", "")))
    terminalreporter.write_line("suite oracle: %d passed, %d failed, %d skipped" % (
        count("passed") + count("xfailed"), count("failed") + count("error") + count("xpassed"), count("skipped")))
