"""Shared fixtures, and the one loud line about every test that was skipped."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
NO_DETECTRON2 = "detectron2 is missing"
NO_SHARED_DATA = "the example data is missing"
NO_SUBMITIT = "submitit is missing"
NO_ONNX = "onnx is missing"
NO_LIBRARY = "no training library"  # tests/stacks: a file of tests for each


def _why_no_detectron2() -> str | None:
    try:
        import detectron2.layers  # noqa: F401
    except Exception as error:  # a broken build fails with more than ImportError
        return f"{NO_DETECTRON2}: {error}"
    return None


def pytest_configure() -> None:
    # A shell's background job ignores Ctrl-C, and so would every run that a test interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # It forks the tests' own process and differentiates there. Autograd refuses that once it has
    # threads, which some later test starts in whatever process it shares with them.
    items.sort(key=lambda item: item.path.name != "test_exact_resume.py")
    marked = [item for item in items if item.get_closest_marker("detectron2")]
    reason = _why_no_detectron2() if marked else None
    for item in marked if reason else []:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    reasons = [str(report.longrepr[-1] if report.longrepr else "") for report in reports]
    counts = {
        NO_DETECTRON2: "make detectron2 builds it",
        NO_SHARED_DATA: "they expect ../shared/data beside the repository",
        NO_SUBMITIT: "pip install submitit",
        NO_ONNX: "pip install onnx onnxruntime",
    }
    for reason, remedy in counts.items():
        number = sum(reason in text for text in reasons)
        if number:
            terminalreporter.write_line(
                f"*** {number} TESTS SKIPPED, {reason.upper()}: {remedy}. ***", red=True, bold=True
            )
    missing = sorted(text.split(": ")[-1] for text in reasons if NO_LIBRARY in text)
    if missing:
        terminalreporter.write_line(
            f"*** {len(missing)} FILES OF TESTS SKIPPED, NO {', '.join(missing).upper()}:"
            " make stacks installs and runs them. ***",
            red=True,
            bold=True,
        )


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_loggers_of_runs() -> Iterator[None]:
    """A run logs to the stdout and folder of its time, which are gone in the next test."""
    yield
    for name in ("detectron2", "fvcore", "cbn_det"):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    if "detectron2.utils.logger" in sys.modules:
        sys.modules["detectron2.utils.logger"].setup_logger.cache_clear()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of example data sets beside the repository; skips where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(NO_SHARED_DATA)
    return folder


@pytest.fixture(scope="session")
def submitit() -> None:
    """Skips where there is no submitit."""
    if importlib.util.find_spec("submitit") is None:
        pytest.skip(NO_SUBMITIT)


@pytest.fixture(scope="session")
def onnx() -> None:
    """Skips where there is no onnx, or nothing to run it with."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        pytest.skip(NO_ONNX)


@pytest.fixture(scope="session")
def source_env() -> dict[str, str]:
    """Environment for subprocesses that run from the source tree, one thread each."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
