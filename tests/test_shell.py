"""Command lines that a reader copies."""

from __future__ import annotations

import shlex
import subprocess

import pytest

from cbn_det.cli import join

WORDS = [
    ["DATASETS.TRAIN", "('cells_train',)", "TEST.EVAL_PERIOD", "200"],
    ["plain", "two words", "", "a'b", """both ' and \" """, "*.png", "tab\there", "line\nbreak"],
    ["'$HOME'", "'`id -u`'", "'back\\slash'", "'!x'", "~", "CBN(window=4)", "a;b", "#c", "{norm}"],
]


@pytest.mark.parametrize("words", WORDS)
def test_a_shell_takes_the_line_apart_into_the_words(words: list[str]) -> None:
    """Oracle: a shell, and python's own."""
    line = join(words)
    assert shlex.split(line) == words
    printed = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True)
    assert printed.stdout.split("\0")[:-1] == words


def test_single_quotes_stay_readable() -> None:
    assert join(WORDS[0]) == """DATASETS.TRAIN "('cells_train',)" TEST.EVAL_PERIOD 200"""
