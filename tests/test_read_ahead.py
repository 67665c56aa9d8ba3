"""What both engines read training images with, and how they take back lines of metrics.json."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cbn_det.data import DataError
from cbn_det.run.loading import read_ahead, seed_random
from cbn_det.run.metrics_file import cut


def draw(index: int) -> tuple[float, ...]:
    if index == 9:
        raise DataError("9.png is broken: copy it there again")
    return index, torch.rand(1).item(), np.random.rand(), random.random()


def keys(start: int = 0) -> list[list[tuple[int, int]]]:
    return [[(i % 4, i), ((i + 1) % 4, i + 1)] for i in range(start, 8, 2)]


def test_a_sample_depends_on_the_seed_and_its_position_alone() -> None:
    """Oracle: the three generators, each seeded with a word of numpy's SeedSequence."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    whole = list(read_ahead(draw, [5, 1], keys(), 0))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    for batch, of in zip(whole, keys(), strict=True):
        for found, (index, position) in zip(batch, of, strict=True):
            words = np.random.SeedSequence([5, 1, position]).generate_state(3).tolist()
            by_torch = torch.rand(1, generator=torch.Generator().manual_seed(words[0])).item()
            numpy_and_python = np.random.RandomState(words[1]).rand(), random.Random(words[2])
            assert found == (index, by_torch, numpy_and_python[0], numpy_and_python[1].random())
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert list(read_ahead(draw, [5, 1], keys(4), 2)) == whole[2:]
    assert list(read_ahead(draw, [6, 1], keys(), 0)) != whole
    seed_random([5, 1, 7])
    assert draw(3) == whole[3][1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_an_error_of_one_line(workers: int) -> None:
    batches = read_ahead(draw, [], [[(0, 0)], [(9, 1)]], workers)
    assert len(next(batches)) == 1
    with pytest.raises(DataError) as error:
        next(batches)
    assert str(error.value) == "9.png is broken: copy it there again"


def test_lines_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    assert cut(path, 20) == -1 and not path.exists()
    lines = [json.dumps({"iteration": at, "total_loss": 1.0}) for at in (19, 39, 59)]
    for text, start, kept in (
        ("\n".join(lines) + "\n", 59, lines[:2]),
        ("\n".join(lines) + "\n", 60, lines),
        ("\n".join(lines) + "\n", 0, []),
        ("\n".join(lines), 99, lines[:2]),  # of the last one the end may be missing
        (f'{lines[0]}\n{{"iterat', 99, lines[:1]),
        (f'{lines[0]}\n{{"no": 1}}\n{lines[1]}\n', 99, lines[:1]),
    ):
        path.write_text(text)
        with open(path, "a") as writer:
            last = cut(path, start)
            writer.write("more\n")
        assert path.read_text().splitlines() == [*kept, "more"]
        assert last == (json.loads(kept[-1])["iteration"] if kept else -1)
