"""docker/: pins that other files state too, and names that have to exist. Nothing is built."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text("utf-8")
COMPOSE = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text("utf-8"))


@pytest.fixture(scope="module")
def setup() -> dict:
    return runpy.run_path(str(REPOSITORY / "setup.py"))


def default_of(argument: str) -> str:
    return re.search(rf'^ARG {argument}="?([^"\n]+)"?$', DOCKERFILE, re.MULTILINE).group(1)


def test_detectron2_is_the_tested_commit(setup) -> None:
    assert default_of("DETECTRON2_COMMIT") == setup["DETECTRON2_COMMIT"]
    url = re.search(r'"(git\+\S+)@\$\{DETECTRON2_COMMIT\}"', DOCKERFILE).group(1)
    assert f"{url}@{setup['DETECTRON2_COMMIT']}" in setup["DETECTRON2"]


@pytest.mark.parametrize("path", ["README.md", "docs/install.md", "tools/run_python.sh"])
def test_torch_and_torchvision_are_the_tested_pair(path: str) -> None:
    text = (REPOSITORY / path).read_text("utf-8")
    pair = re.search(r"torch==([\d.]+)\"? \"?torchvision==([\d.]+)", text)
    assert pair.groups() == (default_of("TORCH"), default_of("TORCHVISION"))
    assert '"torch==${TORCH}" "torchvision==${TORCHVISION}"' in DOCKERFILE


def test_the_base_is_pinned_and_can_compile() -> None:
    base = default_of("BASE")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d\d\.04", base)
    assert re.search(r"^FROM \$\{BASE\}$", DOCKERFILE, re.MULTILINE)
    assert DOCKERFILE.count("\nFROM ") == 1


def test_what_detectron2s_build_needs(setup) -> None:
    (bound,) = [line for line in setup["EXTRAS"]["detectron2"] if line.startswith("setuptools")]
    assert f'"{bound}"' in DOCKERFILE
    build = DOCKERFILE[DOCKERFILE.index("RUN FORCE_CUDA=1") :]
    assert "--no-build-isolation" in build[: build.index("\n\n")]
    order = [DOCKERFILE.index(word) for word in ('"torch==', "RUN FORCE_CUDA=1", "COPY . .")]
    assert order == sorted(order), "a change of this package would build detectron2 anew"


def test_extras_exist(setup) -> None:
    for extra in re.search(r'-e "\.\[([a-z0-9,]+)\]"', DOCKERFILE).group(1).split(","):
        assert extra in setup["EXTRAS"]


def test_compose_builds_this_file_and_mounts_what_the_image_looks_for() -> None:
    service = COMPOSE["services"]["cbn_det"]
    folder = REPOSITORY / "docker"
    context = (folder / service["build"]["context"]).resolve()
    assert context == REPOSITORY
    assert (context / service["build"]["dockerfile"]).read_text("utf-8") == DOCKERFILE
    mounted = {volume.removesuffix(":ro").rpartition(":")[2] for volume in service["volumes"]}
    environment = dict(re.findall(r"(\w+)=(/\w+)", DOCKERFILE[DOCKERFILE.rindex("\nENV ") :]))
    workdir = re.search(r"^WORKDIR (\S+)$", DOCKERFILE, re.MULTILINE).group(1)
    assert mounted == {*environment.values(), f"{workdir}/output"}
    assert set(environment) == {"DETECTRON2_DATASETS", "FVCORE_CACHE"}
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert service["ipc"] == "host"


def test_commands_in_the_readme_exist() -> None:
    text = (REPOSITORY / "docker" / "README.md").read_text("utf-8")
    assert "Not built or run so far" in text
    paths = re.findall(r"\b((?:tools|configs|docker)/[\w./]+\.(?:py|yaml))", text)
    assert len(paths) >= 4
    for path in paths:
        assert (REPOSITORY / path).exists(), path
