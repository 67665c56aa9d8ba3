"""The rooms of the package and who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "cbn_det"

# room -> (rooms of ours it may import, packages it may not import at all)
ENGINES = {"detectron2"}
ROOMS = {
    "norms": (set(), ENGINES),
    "data": (set(), ENGINES),
    "run": ({"norms", "data"}, ENGINES),
    "plugin": ({"norms", "data", "run"}, set()),
    "standalone": ({"norms", "data", "run"}, ENGINES),
    "study": ({"run"}, ENGINES | {"torch", "torchvision"}),  # files alone, which needs no torch
    "commands": ({"norms", "data", "run", "study", "plugin", "standalone"}, ENGINES),
}
# room -> its files that other rooms and the files beside the rooms may import; the rest is its own
DOORS = {
    "data": "__init__ coco_api digits findings image_check pictures pretrained"
    " scenes sets worst_images",
    "norms": "__init__ binding chain convert freeze functional graph numbers recalibration"
    " remembering sites spec trace",
    "plugin": "detector launch lazy norm_hook registry",
    "run": "arguments checkpoint command_line cores detector errors export files"
    " folder job loading measure metrics_file nonfinite norm_schedule precise_bn signals trial",
    "standalone": "detector launch",
}
# files beside the rooms that everybody may import, and what of ours these may
EVERYBODYS = {
    "__init__": "deploy norms norms.convert plugin.norm_hook plugin.registry predict",
    "cli": "",
    "coco_sets": "run.errors",
    "config_files": "run.errors",
    "engines": "run.errors",
    "norm_keys": "",
    "progress": "",
}


@cache
def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports; `from . import x` is resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    package = list(path.relative_to(REPOSITORY).parent.parts)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            # `from cbn_det import norms` imports cbn_det.norms
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def our_rooms(names: set[str]) -> set[str]:
    parts = (name.split(".") for name in names if name.startswith("cbn_det."))
    return {part[1] for part in parts if part[1] in ROOMS}


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    allowed, forbidden = ROOMS[room]
    for path in python_files(PACKAGE / room):
        name = path.relative_to(REPOSITORY).as_posix()
        imported = imports_of(path)
        # The study may reach for torch inside one function (to cut a checkpoint), never at import.
        seen = roots(imports_of(path, top_level_only=room == "study"))
        assert not our_rooms(imported) - allowed - {room}, name
        assert not seen & forbidden, name


def module_of(path: Path) -> str:
    """``cbn_det/run/job.py`` is ``run.job``, a room's ``__init__.py`` is ``run``."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def _known() -> frozenset[str]:
    return frozenset(map(module_of, python_files(PACKAGE)))


def our_files(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules of ours that a file imports, named as :func:`module_of` names them."""
    known = _known()
    found = set()
    for name in imports_of(path, top_level_only):
        parts = name.split(".")[1:] if name.startswith("cbn_det.") else []
        while parts and ".".join(parts) not in known:
            parts.pop()  # a function or class in it
        found.add(".".join(parts))
    return found - {"", module_of(path)}


@pytest.mark.parametrize("room", DOORS)
def test_a_room_is_entered_by_its_doors(room: str) -> None:
    doors = {f"{room}.{name}".removesuffix(".__init__") for name in DOORS[room].split()}
    assert doors <= set(map(module_of, python_files(PACKAGE))), "a door that is gone"
    for path in python_files(PACKAGE):
        if path.relative_to(PACKAGE).parts[0] != room:
            inside = {name for name in our_files(path) if name.split(".")[0] == room}
            assert not inside - doors - {room}, path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("name", EVERYBODYS)
def test_a_file_that_everybody_may_import(name: str) -> None:
    assert our_files(PACKAGE / f"{name}.py") <= set(EVERYBODYS[name].split())


def test_the_package_imports_itself_relatively() -> None:
    for path in python_files(PACKAGE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert "cbn_det" not in roots(set(named)), f"{path.name}, line {node.lineno}"


def test_no_two_files_need_each_other_to_be_imported() -> None:
    needs = {
        module_of(path): our_files(path, top_level_only=True) for path in python_files(PACKAGE)
    }
    while needs:
        ready = {name for name, needed in needs.items() if not needed & needs.keys()}
        assert ready, f"in a circle: {sorted(needs)}"
        needs = {name: needed for name, needed in needs.items() if name not in ready}


def test_norms_import_torch_and_the_standard_library_only() -> None:
    files = python_files(PACKAGE / "norms")
    assert files
    for path in files:
        foreign = roots(imports_of(path)) - set(sys.stdlib_module_names) - {"torch", "cbn_det"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_only_the_plugin_imports_detectron2() -> None:
    others = [*python_files(REPOSITORY / "tools"), *python_files(PACKAGE)]
    guilty = [
        path.relative_to(REPOSITORY).as_posix()
        for path in others
        if "detectron2" in roots(imports_of(path)) and "plugin" not in path.parts
    ]
    assert not guilty


def test_tools_are_thin() -> None:
    for path in python_files(REPOSITORY / "tools"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)], path.name
        assert len(functions) <= 3, f"{path.name}: parse arguments, call one function"


# what the standalone engine is assembled from, and what it would import to make a part itself
PARTS = {
    "FPN": "torchvision.models.detection.backbone_utils.BackboneWithFPN",
    "RPN": "torchvision.models.detection.rpn.RegionProposalNetwork",
    "RPN head": "torchvision.models.detection.rpn.RPNHead",
    "anchors": "torchvision.models.detection.anchor_utils.AnchorGenerator",
    "RoI heads": "torchvision.models.detection.roi_heads.RoIHeads",
    "RoIAlign": "torchvision.ops.MultiScaleRoIAlign",
    "box head": "torchvision.models.detection.faster_rcnn.FastRCNNConvFCHead",
    "mask head": "torchvision.models.detection.mask_rcnn.MaskRCNNHeads",
    "detector": "torchvision.models.detection.generalized_rcnn.GeneralizedRCNN",
    "augmentation": "torchvision.transforms.v2",
    "evaluation": "pycocotools.cocoeval.COCOeval",
}
RAW_MATERIAL = (
    *(f"torchvision.ops.{name}" for name in ("nms", "batched_nms", "box_iou", "roi_align")),
    *(f"torchvision.ops.{name}" for name in ("roi_pool", "clip_boxes_to_image", "boxes", "focal")),
    "torchvision.models.detection._utils",
    "torchvision.models.resnet.BasicBlock",
    "torchvision.models.resnet.Bottleneck",
)


def test_the_standalone_engine_is_assembled_not_written() -> None:
    """It stays small as long as it imports the parts of a detector and nothing to make them of."""
    files = python_files(PACKAGE / "standalone")
    imported = set().union(*(imports_of(path) for path in files))
    assert not {part: name for part, name in PARTS.items() if name not in imported}
    assert not [name for name in imported if name.startswith(RAW_MATERIAL)]
    modules = [
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any(
            "Module" in ast.unparse(base) or "Sequential" in ast.unparse(base)
            for base in node.bases
        )
    ]
    assert sorted(modules) == ["BoxPredictor", "MaskPredictor", "_Traceable"]


@pytest.mark.parametrize(
    "module", ["cbn_det", "cbn_det.cli", "cbn_det.norms", "cbn_det.commands.compare"]
)
def test_imports_without_detectron2(module: str, source_env: dict[str, str]) -> None:
    blocked = ["detectron2"] + (["fvcore", "pycocotools", "cv2"] if "norms" in module else [])
    code = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import {module}
if {module!r} != "cbn_det.norms":
    assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=source_env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return [path for path in REPOSITORY.rglob("*") if path.is_file()]  # not a git checkout
    paths = [REPOSITORY / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_machine_paths_or_registry_hosts() -> None:
    # Put together here so that this file does not hold them.
    folders = [f"/{name}/" for name in ("work", "root", "tmp", "opt", "home")]
    hosts = [".".join(p) for p in (("pypi", "org"), ("python" "hosted", "org"), ("deb", "debian"))]
    hosts.append(".".join(("download", "pytorch", "org")))
    # A folder inside a longer path ("output/tmp/x", "https://site/home/") is no machine path.
    found_in = re.compile(
        r"(?<![\w.~-])(?:"
        + "|".join(map(re.escape, folders))
        + ")|"
        + "|".join(map(re.escape, hosts))
    )
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        match = found_in.search(text)
        assert not match, f"{path.relative_to(REPOSITORY)}: {match.group(0)}"
