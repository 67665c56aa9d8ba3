"""setup.py, the environment script of the Makefile, and what happens without detectron2."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cbn_det

REPOSITORY = Path(__file__).resolve().parents[1]


def run_script(tmp_path: Path, python: str, *arguments: str, **env: str):
    """run_python.sh of a small copy of the repository, so that .venv and .make are not touched."""
    copy = tmp_path / "copy"
    (copy / "tools").mkdir(parents=True, exist_ok=True)
    for name in ("tools/run_python.sh", "setup.py"):
        shutil.copy(REPOSITORY / name, copy / name)
    return subprocess.run(
        ["bash", str(copy / "tools" / "run_python.sh"), *arguments],
        env=os.environ | {"PYTHON": python} | env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def stub_python(tmp_path: Path, body: str) -> str:
    path = tmp_path / "stub"
    path.write_text(f'#!/usr/bin/env bash\nreal="{sys.executable}"\n{body}\n')
    path.chmod(0o755)
    return str(path)


def blocked_detectron2(tmp_path: Path) -> str:
    """A folder for PYTHONPATH in which detectron2 is there but cannot be imported."""
    package = tmp_path / "blocked" / "detectron2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('blocked by a test')\n")
    return str(package.parent)


def test_setup_reads_the_version_without_importing() -> None:
    setup = runpy.run_path(str(REPOSITORY / "setup.py"))
    assert setup["read_version"]() == cbn_det.__version__
    assert any(line.startswith("torch") for line in setup["REQUIRES"])
    assert re.fullmatch(r"detectron2 @ git\+\S+@[0-9a-f]{40}", setup["EXTRAS"]["detectron2"][1])
    assert "setuptools<81" in setup["EXTRAS"]["detectron2"]


def test_citation_and_changelog_name_this_version() -> None:
    assert f"version: {cbn_det.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text("utf-8")
    assert f"## {cbn_det.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text("utf-8")


def test_setup_py_lists_every_room_and_the_typing_marker(source_env) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version"],
        cwd=REPOSITORY,
        env=source_env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-2:] == ["cbn-det", cbn_det.__version__], done.stderr
    rooms = [path for path in (REPOSITORY / "cbn_det").iterdir() if list(path.glob("*.py"))]
    assert all((room / "__init__.py").exists() for room in rooms), "find_packages would miss a room"
    assert (REPOSITORY / "cbn_det" / "py.typed").exists()


def test_missing_python_is_one_line(tmp_path) -> None:
    done = run_script(tmp_path, str(tmp_path / "nothing-here"), "-c", "pass")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "install Python 3.10" in done.stderr


def test_old_python_is_one_line(tmp_path) -> None:
    body = 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.8.1;; esac'
    done = run_script(tmp_path, stub_python(tmp_path, body), "-c", "pass")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Python 3.8.1 is too old" in done.stderr


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for torch==2.14.1", "check the network"),
        ("error: something else", "read .make/install.log"),
    ],
)
def test_a_failing_pip_ends_with_what_to_do(tmp_path, printed: str, said: str) -> None:
    venv_python = f"#!/usr/bin/env bash\\necho '{printed}'; exit 1\\n"
    # No detectron2; `-m venv DIR` makes a python whose pip fails.
    body = f"""
case "$*" in
  "-c import detectron2"*) exit 1;;
  "-m venv"*) mkdir -p "${{@: -1}}/bin"; printf "{venv_python}" >"${{@: -1}}/bin/python"
              chmod +x "${{@: -1}}/bin/python";;
  *) exec "$real" "$@";;
esac"""
    done = run_script(tmp_path, stub_python(tmp_path, body), "-c", "pass")
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "copy" / ".make" / "python").exists(), "a failed install was remembered"


def test_a_venv_of_the_users_own_is_left_alone(tmp_path) -> None:
    own = tmp_path / "copy" / ".venv"
    own.mkdir(parents=True)
    (own / "mine").write_text("x")
    body = 'case "$*" in "-c import detectron2"*) exit 1;; *) exec "$real" "$@";; esac'
    done = run_script(tmp_path, stub_python(tmp_path, body), "-c", "pass")
    assert done.returncode == 1
    assert "was not made by this Makefile" in done.stderr
    assert (own / "mine").exists()


def test_the_current_python_is_used_as_it_is_and_remembered(tmp_path) -> None:
    calls = tmp_path / "calls"
    # Every import works in this stub: detectron2 and all tools are there.
    body = f"""
echo "$*" >>"{calls}"
case "$*" in "-c import detectron2"*|"-c import numpy"*) exit 0;; *) exec "$real" "$@";; esac"""
    stub = stub_python(tmp_path, body)
    for _ in range(2):
        done = run_script(tmp_path, stub, "-c", "import sys; print(sys.executable, sys.path)")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(sys.executable)
        assert str(tmp_path / "copy") in done.stdout  # runs from the source tree
    assert calls.read_text().count("import detectron2") == 1, "the second call looked again"
    assert not (tmp_path / "copy" / ".venv").exists()


def test_skipped_tests_are_counted_in_one_loud_line(tmp_path, source_env) -> None:
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = detectron2: needs it\n")
    (tmp_path / "test_two.py").write_text(
        "import pytest\n"
        "@pytest.mark.detectron2\n"
        "@pytest.mark.parametrize('i', range(2))\n"
        "def test_with(i): import detectron2.layers\n"
        "def test_without(): pass\n"
        "def test_data(shared_data): pass\n"
    )
    path = os.pathsep.join([blocked_detectron2(tmp_path), source_env["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(tmp_path), "-p", "no:cacheprovider"],
        env=source_env | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 3 skipped" in done.stdout
    assert (
        "*** 2 TESTS SKIPPED, DETECTRON2 IS MISSING: make detectron2 builds it. ***" in done.stdout
    )
    assert "*** 1 TESTS SKIPPED, THE EXAMPLE DATA IS MISSING" in done.stdout


def test_demo_without_detectron2_says_so_and_shows_the_layers(
    tmp_path, source_env, monkeypatch, capsys
) -> None:
    demo = runpy.run_path(str(REPOSITORY / "tools" / "demo.py"))
    path = os.pathsep.join([blocked_detectron2(tmp_path), source_env["PYTHONPATH"]])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--iters", "5"])
    written = []
    monkeypatch.setitem(demo["main"].__globals__, "write_digits", lambda: written.append(True))
    assert demo["main"]() == 0
    printed = capsys.readouterr().out
    assert written == [True]
    assert printed.startswith("*** NO DETECTION TRAINING: detectron2 is missing")
    assert all(f"\n{norm} " in printed for norm in ("BN", "GN", "CBN"))
