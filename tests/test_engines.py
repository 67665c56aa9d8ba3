"""Which engine trains where detectron2 is there, missing or broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import REPOSITORY, run_loggers_removed

from cbn_det.engines import ENGINES, resolve_engine
from cbn_det.launch import main

TRAIN_NET = str(REPOSITORY / "tools" / "train_net.py")
# reads well, and has no data
CONFIG = str(REPOSITORY / "configs/quickstart/faster_rcnn_R_18_FPN_digits_cbn.yaml")
NO_DATA = ("DATASETS.TRAIN", "('absent',)", "DATASETS.TEST", "()")


def python(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, timeout=120
    )


def hide(monkeypatch: pytest.MonkeyPatch, package: str, error: Exception | None = None) -> None:
    """Makes a package absent from this python, or its import an error."""

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.split(".")[0] == package:
                raise error or ModuleNotFoundError(f"No module named {package!r}", name=package)

    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.fixture(scope="module")
def broken_detectron2(
    tmp_path_factory: pytest.TempPathFactory, source_env: dict[str, str]
) -> dict[str, str]:
    """An environment with a detectron2 that was built for another torch."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "detectron2").mkdir()
    (folder / "detectron2" / "__init__.py").write_text(
        "raise RuntimeError('undefined symbol:\\n _ZN3c10')\n"
    )
    path = os.pathsep.join([str(folder), source_env["PYTHONPATH"]])
    return {**source_env, "PYTHONPATH": path}


def test_without_detectron2_auto_is_standalone_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "detectron2")
    assert resolve_engine() == resolve_engine("auto") == resolve_engine("standalone")
    assert resolve_engine() == "standalone"
    with pytest.raises(ImportError, match=r"^the detectron2 engine does not work here") as caught:
        resolve_engine("detectron2")
    assert str(caught.value).endswith("docs/install.md says how to install detectron2")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("built for another torch"),
        ImportError("blocked"),
        ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources"),
    ],
)
def test_a_detectron2_that_fails_is_broken_not_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    hide(monkeypatch, "detectron2", error)
    assert resolve_engine() == "standalone"
    (line,) = capfd.readouterr().err.splitlines()
    assert f"({error})" in line


def test_a_broken_detectron2_is_told_on_stderr(broken_detectron2: dict[str, str]) -> None:
    code = "from cbn_det.engines import resolve_engine; print(resolve_engine())"
    done = python(broken_detectron2, "-W", "ignore", "-c", code)
    assert (done.returncode, done.stdout) == (0, "standalone\n")
    (line,) = done.stderr.splitlines()
    assert "undefined symbol: _ZN3c10" in line
    assert line.endswith("going on with the standalone engine")


def test_the_launcher_refuses_an_engine_that_does_not_work(
    broken_detectron2: dict[str, str], tmp_path: Path
) -> None:
    words = ("--engine", "detectron2", "--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path / "out"))
    done = python(broken_detectron2, "-W", "ignore", TRAIN_NET, *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the detectron2 engine does not work here (undefined symbol:")
    assert not (tmp_path / "out").exists()


def test_the_launcher_falls_back_and_says_which_engine_it_uses(
    broken_detectron2: dict[str, str], tmp_path: Path
) -> None:
    words = ("--engine", "auto", "--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path), *NO_DATA)
    done = python(broken_detectron2, "-W", "ignore", TRAIN_NET, *words)
    assert done.returncode == 2, done.stderr
    fallback, refusal = done.stderr.splitlines()
    assert "going on with the standalone engine" in fallback
    assert refusal.startswith("error: unknown data set 'absent'")
    assert "engine: standalone" in done.stdout
    assert "engine: standalone" in (tmp_path / "log.txt").read_text()


@pytest.mark.detectron2
def test_where_detectron2_works_it_is_the_default_and_the_log_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert resolve_engine() == resolve_engine("detectron2") == "detectron2"
    with run_loggers_removed():
        assert main(["--config-file", CONFIG, "OUTPUT_DIR", str(tmp_path), *NO_DATA]) == 2
    said = capfd.readouterr()
    assert "engine: detectron2" in said.out
    assert "engine: detectron2" in (tmp_path / "log.txt").read_text()
    assert "standalone" not in said.err


def test_neither_engine_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "detectron2")
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(ImportError, match="a matching pair of torch and torchvision"):
        resolve_engine()
    assert main(["--config-file", CONFIG]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the standalone engine does not work here (")
    assert len(said.splitlines()) == 1


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--engine", "mmdetection", "--config-file", CONFIG])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert all(name in said for name in ENGINES)


def test_help_and_refused_arguments_wait_for_no_engine(source_env: dict[str, str]) -> None:
    code = (
        "import sys\nfrom cbn_det.launch import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    assert 'torch' not in sys.modules\n"
    )
    done = python(source_env, "-c", code)
    assert done.returncode == 0 and "--engine {auto,detectron2,standalone}" in done.stdout
