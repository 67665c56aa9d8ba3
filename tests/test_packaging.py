"""setup.py, the environment script of the Makefile, and what happens without detectron2."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import write_boxes

import cbn_det

REPOSITORY = Path(__file__).resolve().parents[1]


def start_script(tmp_path: Path, python: str, *arguments: str) -> subprocess.Popen:
    """run_python.sh of a small copy of the repository, so that .venv and .make are not touched."""
    copy = tmp_path / "copy"
    (copy / "tools").mkdir(parents=True, exist_ok=True)
    for name in ("tools/run_python.sh", "setup.py"):
        shutil.copy(REPOSITORY / name, copy / name)
    return subprocess.Popen(
        ["bash", str(copy / "tools" / "run_python.sh"), *arguments],
        env=os.environ | {"PYTHON": python},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job ignores Ctrl-C, and so would everything that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_script(tmp_path: Path, python: str, *arguments: str) -> subprocess.CompletedProcess:
    process = start_script(tmp_path, python, *arguments)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def stub_python(tmp_path: Path, body: str) -> str:
    path = tmp_path / "stub"
    path.write_text(f'#!/usr/bin/env bash\nreal="{sys.executable}"\n{body}\n')
    path.chmod(0o755)
    return str(path)


def bare_python(tmp_path: Path, pip: str, other: str = "", index: str = "exit 1") -> str:
    """A python without detectron2. Its virtual environments are stubs, in which everything imports
    and `-m pip` runs the lines ``pip``; ``other`` are further cases of the python itself, ``index``
    what it does to list an index."""
    venv_python = tmp_path / "venv_python"
    venv_python.write_text(
        "#!/usr/bin/env bash\n"
        'case "$*" in\n'
        f'  "-m pip"*) {pip};;\n'
        '  "-c import torchvision"*) exit 0;;\n'
        f'  *) exec "{sys.executable}" "$@";;\n'
        "esac\n"
    )
    venv_python.chmod(0o755)
    body = f"""
case "$*" in
  {other}
  "-c import detectron2"*) exit 1;;
  "-m pip index"*) {index};;
  "-m venv"*) mkdir -p "${{@: -1}}/bin"; ln -s "{venv_python}" "${{@: -1}}/bin/python";;
  *) exec "$real" "$@";;
esac"""
    return stub_python(tmp_path, body)


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
    assert re.fullmatch(r"detectron2 @ git\+\S+@[0-9a-f]{40}", setup["EXTRAS"]["detectron2"][-1])
    everything = [
        *setup["REQUIRES"],
        *(line for lines in setup["EXTRAS"].values() for line in lines),
    ]
    assert not [line for line in everything if "opencv" in line], "it would overwrite another build"
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


def test_setup_py_packs_every_file_that_is_no_python(monkeypatch) -> None:
    import setuptools

    packed = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: packed.update(given))
    runpy.run_path(str(REPOSITORY / "setup.py"), run_name="__main__")
    for path in (REPOSITORY / "cbn_det").rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc"):
            continue
        package = ".".join(path.parent.relative_to(REPOSITORY).parts)
        patterns = packed["package_data"].get(package, [])
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path


def test_the_script_tries_every_requirement() -> None:
    """One module for each requirement, besides torch and torchvision, which it tries first."""
    setup = runpy.run_path(str(REPOSITORY / "setup.py"))
    script = (REPOSITORY / "tools" / "run_python.sh").read_text("utf-8")
    modules = re.search(r'^MODULES="(.*)"$', script, re.MULTILINE).group(1).split()
    required = setup["REQUIRES"] + setup["EXTRAS"]["dev"]
    assert len(modules) + 2 == len(required)


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
    assert re.search(r"make PYTHON=\S*python3", done.stderr)


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full: free"),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by NewConnectionError\n"
            "ERROR: No matching distribution found for torch==2.14.1",
            "check the network and pip's index",
        ),
        (
            "ERROR: No matching distribution found for torch==2.14.1",
            "pip's index has no torch==2.14.1 for Python 3",
        ),
        ("ERROR: something else", "setting up .venv failed: ERROR: something else"),
    ],
)
def test_a_failing_pip_ends_with_one_line(tmp_path, printed: str, said: str) -> None:
    (tmp_path / "printed").write_text(printed + "\n")
    python = bare_python(tmp_path, f'echo Collecting; cat "{tmp_path}/printed" >&2; exit 1')
    done = run_script(tmp_path, python, "-c", "pass")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert said in lines[-1]
    assert "Collecting" in lines, "progress is shown"
    assert all(line.startswith("cbn_det: ") for line in lines if line != "Collecting")
    make = tmp_path / "copy" / ".make"
    assert not (make / "python").exists(), "a failed install was remembered"


@pytest.mark.parametrize("step", ["pip", "venv"])
def test_a_full_disk_that_nobody_names(tmp_path, step: str) -> None:
    """`python -m venv` hides the reason; what is left on the disk tells."""
    full = (
        '*disk_usage*) exit 1;; "-m venv"*) exit 1;;'
        if step == "venv"
        else "*disk_usage*) exit 1;;"
    )
    done = run_script(tmp_path, bare_python(tmp_path, "exit 1", full), "-c", "pass")
    assert done.returncode == 1
    assert "the disk is full" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("python3: No module named venv", "install its venv module"),
        (
            "not created because ensurepip is not\\navailable.\\n\\nFailing command: x",
            "install its venv module",
        ),
        ("Error: something else", "setting up .venv failed: Error: something else"),
    ],
)
def test_no_venv_module_is_one_line_and_the_next_run_goes_on(tmp_path, printed, said) -> None:
    broken = f'"-m venv"*) printf "{printed}\n"; exit 1;;'
    done = run_script(tmp_path, bare_python(tmp_path, "exit 0", broken), "-c", "pass")
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert done.stderr.count("\n") == 2  # and the line that says that there is no detectron2
    done = run_script(tmp_path, bare_python(tmp_path, "exit 0"), "-c", "print('runs')")
    assert (done.returncode, done.stdout) == (0, "runs\n"), done.stderr


def test_ctrl_c_during_the_installation_and_a_second_run(tmp_path) -> None:
    """pip was stopped between a package's files: the second run does not take them for whole."""
    half = tmp_path / "copy" / ".venv" / "half"
    interrupted = tmp_path / "interrupted.py"  # what pip does: cleans up, exits with 1
    interrupted.write_text(
        "import sys, time\ntry:\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    sys.exit(1)\n"
    )
    stopped = f'touch "{half}"; exec "{sys.executable}" "{interrupted}"'
    process = start_script(tmp_path, bare_python(tmp_path, stopped), "-c", "pass")
    for _ in range(200):
        if half.exists():
            break
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "cbn_det: stopped: run the same command again."
    assert not (tmp_path / "copy" / ".make" / "python").exists()
    done = run_script(tmp_path, bare_python(tmp_path, "exit 0"), "-c", "print('runs')")
    assert done.stdout == "runs\n", done.stderr
    assert not half.exists()


TORCH, VISION = "2.14.1", "0.29.1"


@pytest.mark.parametrize(
    ("listed", "gpu", "installed", "needs"),
    [
        (("+cpu", "+cpu"), False, f"torch=={TORCH}+cpu torchvision=={VISION}+cpu", "2 GB"),
        (("+cpu", ""), False, f"torch=={TORCH} torchvision=={VISION}", "9 GB"),
        (("", ""), False, f"torch=={TORCH} torchvision=={VISION}", "9 GB"),
        (("+cpu", "+cpu"), True, f"torch=={TORCH} torchvision=={VISION}", "9 GB"),
    ],
)
def test_the_cpu_builds_of_torch_where_there_is_no_gpu(
    tmp_path, monkeypatch, listed, gpu: bool, installed: str, needs: str
) -> None:
    nvidia = tmp_path / "bin" / "nvidia-smi"
    nvidia.parent.mkdir()
    nvidia.write_text(f"#!/bin/sh\nexit {int(not gpu)}\n")
    nvidia.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvidia.parent}:{os.environ['PATH']}")
    versions = [f"{v}{local}" for v, local in zip((TORCH, VISION), listed, strict=True)]
    index = f'case "$*" in *torchvision) echo {versions[1]};; *) echo {versions[0]};; esac'
    log = tmp_path / "log"
    python = bare_python(tmp_path, f'echo "$*" >"{log}"', index=index)
    done = run_script(tmp_path, python, "-c", "print('runs')")
    assert done.stdout == "runs\n", done.stderr
    assert log.read_text().startswith(f"-m pip install {installed} -r ")
    before, *_, after = done.stderr.splitlines()[1:]
    assert f"up to {needs}" in before and installed in before
    venv = tmp_path / "copy" / ".venv"
    assert after.endswith(f"is {venv}/bin/python, or: source .venv/bin/activate")


def test_two_makes_at_once_install_once(tmp_path) -> None:
    log, go_on = tmp_path / "log", tmp_path / "go_on"
    wait = f'while [ ! -e "{go_on}" ]; do sleep 0.05; done'
    pip = f'echo Collecting; echo begin >>"{log}"; {wait}; echo end >>"{log}"'
    python = bare_python(tmp_path, pip)
    first = start_script(tmp_path, python, "-c", "print('runs')")
    while not log.exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    second = start_script(tmp_path, python, "-c", "print('runs')")
    while "waiting for it" not in (line := second.stderr.readline()):
        assert line, "the second one did not wait"
    go_on.touch()
    outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [out for out, _ in outputs] == ["runs\n", "runs\n"]
    assert log.read_text() == "begin\nend\n"


def test_what_does_not_import_after_the_installation_says_why(tmp_path) -> None:
    python = bare_python(tmp_path, "exit 0")
    venv_python = tmp_path / "venv_python"
    missing = "echo ImportError: libGL.so.1 >&2; exit 1"
    text = venv_python.read_text().replace(
        '"-c import torchvision"*) exit 0', f'x) ;; "-c import torchvision"*) {missing}'
    )
    venv_python.write_text(text)
    done = run_script(tmp_path, python, "-c", "pass")
    assert done.returncode == 1
    assert "(ImportError: libGL.so.1): run make distclean" in done.stderr.splitlines()[-1]


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


# ---- the wheel -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a virtual environment with this package's wheel, over the packages of this
    one; the repository is not on its path."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv = folder / "source", folder / "venv"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("cbn_det", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    install = [*pip[:3], "--python", str(python), *pip[3:], "install", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    # --system-site-packages would show another python's packages where this is an environment
    (site,) = venv.glob("lib/python*/site-packages")
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    return python


def in_wheel(python: Path, cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command of the wheel's environment."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}
    command = [str(python.with_name(words[0])), *words[1:]]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def test_the_wheel_is_complete(wheel_python: Path, tmp_path: Path) -> None:
    code = (
        "import cbn_det, cbn_det.config_files as c, os; print(os.path.dirname(cbn_det.__file__));"
        "[print(p.relative_to(c.CONFIGS)) for p in c.CONFIGS.rglob('*.*') if p.suffix != '.pyc']"
    )
    done = in_wheel(wheel_python, tmp_path, "python", "-c", code)
    place, *files = done.stdout.splitlines()
    assert Path(place).is_relative_to(wheel_python.parents[1]), done.stderr
    configs = REPOSITORY / "configs"
    ours = {str(p.relative_to(configs)) for p in configs.rglob("*.*") if p.suffix != ".pyc"}
    assert set(files) == ours and len(ours) > 140
    modules = {
        p.relative_to(REPOSITORY / "cbn_det") for p in (REPOSITORY / "cbn_det").rglob("*.py")
    }
    assert not [path for path in modules if not Path(place, path).exists()]


CONFIG = "quickstart/faster_rcnn_R_18_FPN_digits_cbn"
FIVE = ["SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0"]
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0"]


def own_set(folder: Path) -> tuple[list[str], list[str]]:
    """Options and config keys of a set of six images."""
    write_boxes(folder / "boxes")
    files = [str(folder / "boxes" / name) for name in ("boxes.json", "images")]
    keys = ["DATASETS.TRAIN", "('boxes',)", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    return ["--coco-dataset", "boxes", *files], keys


def check_run(folder: Path, command: str) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["iterations"]) == ("finished", 5)
    assert result["command"].startswith(command)


def test_the_wheel_trains_on_the_built_in_digits(wheel_python: Path, tmp_path: Path) -> None:
    """In a folder that knows nothing of the repository."""
    words = ["cbn-det", "train", CONFIG, "--engine", "standalone", *FIVE, *SMALL]
    done = in_wheel(wheel_python, tmp_path, *words, "OUTPUT_DIR", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    check_run(tmp_path / "out", f"cbn-det train --config-file {CONFIG} --engine standalone")
    assert (tmp_path / "datasets" / "digits" / "stamp.json").exists()


@pytest.mark.detectron2
def test_the_wheel_trains_on_detectron2(wheel_python: Path, tmp_path: Path) -> None:
    options, keys = own_set(tmp_path)
    words = ["-m", "cbn_det", "train", CONFIG, "--engine", "detectron2", *options, *FIVE, *SMALL]
    done = in_wheel(wheel_python, tmp_path, "python", *words, *keys, "OUTPUT_DIR", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    check_run(
        tmp_path / "out", f"python -m cbn_det train --config-file {CONFIG} --engine detectron2"
    )


def test_the_wheel_compares_and_plans(wheel_python: Path, tmp_path: Path) -> None:
    options, keys = own_set(tmp_path)
    words = ["--norms", "CBN", "--engine", "standalone", "--iters", "5", "--output", "out"]
    words += ["--precise-bn-iters", "0", *options, "--opts", *SMALL, *keys]
    done = in_wheel(wheel_python, tmp_path, "cbn-det", "compare", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "out" / "runs").iterdir()
    check_run(run, "python -m cbn_det train --config-file ")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["command"].startswith("cbn-det compare --norms CBN")
    plan = ["reproduce", "mask_rcnn_R_50_FPN_1x", "--rows", "cbn_2img", "--dry-run"]
    done = in_wheel(wheel_python, tmp_path, "cbn-det", *plan)
    words = shlex.split(done.stdout)
    assert words[:4] == ["python", "-m", "cbn_det", "train"], done.stderr
    assert Path(words[words.index("--config-file") + 1]).is_file()


def test_what_needs_torch_only(wheel_python: Path, tmp_path: Path) -> None:
    """convert_norm, the layers, PreciseBN, EvalNorm and fold, with nothing else to import."""
    code = """
import sys
finders = sys.meta_path[:]
class TorchOnly:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "torchvision", "fvcore", "pycocotools", "PIL", "yaml",
                                  "tqdm", "tabulate", "sklearn", "tensorboard", "detectron2"):
            return None
        found = (finder.find_spec(name, path, target) for finder in finders)
        return next((spec for spec in found if spec), None)
sys.meta_path[:] = [TorchOnly()]
import torch, cbn_det
from torch import nn
from cbn_det.run.precise_bn import recompute_statistics
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
assert cbn_det.convert_norm(model, "CBN(window=2)", max_iter=3).converted
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.rand(2, 3, 8, 8)).mean().backward()
    optimizer.step()
print(recompute_statistics(model, iter([torch.rand(2, 3, 8, 8)] * 2), 2))
model.eval()
with cbn_det.norms.image_share(model, 0.5) as layers:
    print(len(layers), bool(model(torch.rand(1, 3, 8, 8)).isfinite().all()))
print(len(cbn_det.deploy.fold(model).folded))
from cbn_det.cli import main
print(main(["check", "x.yaml"]), main(["compare"]), main(["train", "x.yaml"]))
"""
    done = in_wheel(wheel_python, tmp_path, "python", "-c", code)
    assert done.stdout.split() == [*("1", "1", "True", "1"), *"222"], done.stdout + done.stderr
    told = done.stderr.splitlines()
    assert [line.partition(": pip")[2] for line in told[:2]] == [
        " install 'cbn-det[standalone]'",
        " install 'cbn-det[compare]'",
    ]
    assert "--config-file x.yaml: no such file" in told[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "error: there is no command 'trian': did you mean train?"),
        (["nonsense"], "error: there is no command 'nonsense': known are train, compare,"),
        (["train", "quickstart/faster_rcnn_R_18_FPN_digit_cbn"], "did you mean quickstart/faster"),
        (["train", "coco/mask_rcnn_R_50_FPN_1x/cbn_3img"], "did you mean coco/mask_rcnn_R_50_FPN"),
        (["train", "mine.yaml"], "--config-file mine.yaml: no such file, and no config of this"),
        (["compare", "--config-file", "mine.yaml"], "compare: --config-file mine.yaml: no such"),
    ],
)
def test_what_the_command_refuses(wheel_python, tmp_path, words: list[str], said: str) -> None:
    done = in_wheel(wheel_python, tmp_path, "cbn-det", *words)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and done.stderr.count("\n") == 1
