"""What a run leaves of the run before in its folder."""

from __future__ import annotations

import logging

from cbn_det.run import folder as run_folder


def test_a_new_run_removes_what_would_pass_for_its_own(tmp_path, caplog) -> None:
    (tmp_path / "evaluation").mkdir()
    for name in ("result.json", "metrics.json", run_folder.PREDICTIONS, "evaluation/result.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    (tmp_path / "last_checkpoint").touch()  # a disk that was full
    (tmp_path / "model_0000001.pth").write_bytes(b"weights")

    with caplog.at_level(logging.WARNING):
        run_folder.start_training(tmp_path)

    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"metrics.json", "model_0000001.pth"}
    assert not (tmp_path / "metrics.json").stat().st_size  # a writer may hold it open
    assert "last_checkpoint is removed (--resume" in caplog.text


def test_a_first_run_warns_of_nothing(tmp_path, caplog) -> None:
    (tmp_path / "metrics.json").touch()  # detectron2's writer is there first
    run_folder.start_training(tmp_path)
    assert not caplog.records
