"""Checks a COCO 2017 folder, laid out as detectron2 expects it, before days are spent on it.

Everything here costs minutes and would otherwise be noticed after hours, or never: half an archive
unpacked, train and val exchanged, images in both, a disk that the checkpoints will fill.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cbn_det.data.coco_check import check_coco, naming
from cbn_det.data.errors import DataError
from cbn_det.data.overlap import same_files
from cbn_det.data.pretrained import PretrainedFile

__all__ = ["COCO_2017", "Finding", "GB_PER_RUN", "check_folder", "find_coco"]

#: images of each split, https://cocodataset.org/#download
COCO_2017 = {"train2017": 118287, "val2017": 5000}
NUM_CATEGORIES = 80
# A Mask R-CNN R50-FPN with 4conv1fc head has 47 M parameters: 190 MB of weights, as much momentum,
# and up to 100 MB that CBN in FPN and heads remembers; 18 checkpoints in a 1x schedule.
GB_PER_RUN = 10

OK, NOTE, PROBLEM = "ok", "note", "problem"
# COCO's own files name their first image in the first kilobytes.
_HEAD_BYTES = 2**20

Progress = Callable[..., None]


@dataclass(frozen=True)
class Finding:
    """One line about one thing that was checked. ``level`` is "ok", "note" (nothing has to be done)
    or "problem" (the text says what to do)."""

    level: str
    text: str


def find_coco(root: str | os.PathLike) -> Path:
    """
    The folder with ``annotations/`` and the image folders: ``root/coco`` (``root`` being what
    ``DETECTRON2_DATASETS`` names) or ``root`` itself.

    Raises:
        DataError: neither is there.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder '{root}': give the one that holds coco/")
    for folder in (root / "coco", root):
        if any((folder / name).is_dir() for name in ("annotations", *COCO_2017)):
            return folder
    raise DataError(
        f"'{root}' holds neither coco/ nor annotations/, train2017/ and val2017/: unpack COCO 2017 "
        f"into '{root / 'coco'}'"
    )


def check_folder(
    coco: Path,
    *,
    expected: Mapping[str, int] | None = COCO_2017,
    sample: int = 1000,
    progress: Progress = lambda what, done=None, total=None: None,
) -> Iterator[Finding]:
    """
    Checks layout, number of files, annotations and a sample of images; findings as they come.

    Args:
        coco: of :func:`find_coco`.
        expected: images of each split; None takes any number, for a subset in COCO's layout.
        sample: images of each split that are decoded completely, evenly spaced.
        progress: called with what is being done, and with how many images of how many.
    """
    yield from _check_place(coco)
    complete = yield from _check_layout(coco)
    swapped = yield from _check_pairs(coco, complete)
    files = {}
    for split in [name for name in complete if name not in swapped]:
        progress(f"counting the images of {split}")
        yield _check_count(coco / split, expected)
        found = yield from _check_annotations(coco, split, expected, sample, progress)
        files |= {split: found} if found else {}
    if len(files) == len(COCO_2017):
        yield check_overlap(files, progress)


def check_overlap(files: Mapping[str, list[Path]], progress: Progress) -> Finding:
    """Whether two sets, given by name, hold the same images; told by their content, since sets that
    were split or numbered by hand share ids or names and not images, or the other way round."""
    (first, some), (second, others) = files.items()
    both = same_files(some, others, partial(progress, f"comparing {first} with {second}"))
    if not both:
        return Finding(OK, f"no image is in both {first} and {second}")
    pairs = [a.name if a.name == b.name else f"{a.name} = {b.name}" for a, b in both]
    return Finding(
        PROBLEM,
        f"{len(both)} images are in both {first} and {second} ({_first(pairs)}): AP would be "
        "measured on training images; remove them from one of the two annotation files",
    )


def check_disk(output: Path, runs: int = 1) -> Finding:
    """Whether the checkpoints of ``runs`` runs with a 1x schedule fit on the disk of ``output``."""
    free = disk_of(output)[1] / 1e9
    text = (
        f"{free:.1f} GB free for '{output}'; a 1x run leaves up to {GB_PER_RUN} GB of checkpoints"
    )
    if free >= GB_PER_RUN * runs:
        return Finding(OK, text)
    return Finding(
        PROBLEM,
        f"{text}, {runs} of them {GB_PER_RUN * runs} GB: free some space, choose another --output, "
        "or raise SOLVER.CHECKPOINT_PERIOD",
    )


def disk_of(output: Path) -> tuple[Path, int]:
    """The nearest folder to a future one that is there already, and the bytes free for both."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    return place, shutil.disk_usage(place).free


def check_weights(
    files: list[PretrainedFile], *, offline: bool = False, all_needed: bool = True
) -> Iterator[Finding]:
    """
    Whether pretrained weights are where training looks for them.

    Args:
        offline: nothing can be downloaded: a missing file is a problem.
        all_needed: so is one that is nowhere to be downloaded, as every config is to be run.
    """
    for file in files:
        needed = file.spec + (f" (of {file.num_configs} configs)" if file.num_configs > 1 else "")
        if file.is_whole():
            yield Finding(OK, f"{needed}: '{file.path}'")
        elif file.path.exists():
            yield Finding(
                PROBLEM, f"{needed}: '{file.path}' is cut off: delete it, or copy it there again"
            )
        elif file.url is None:
            yield Finding(
                PROBLEM if all_needed else NOTE,
                f"{needed}: there is no file '{file.path}': MODEL.WEIGHTS names it",
            )
        elif offline:
            yield Finding(
                PROBLEM,
                f"{needed}: missing; download it on a machine with network and copy it to "
                f"'{file.path}'",
            )
        else:
            yield Finding(
                NOTE,
                f"{needed}: not there yet, the first run downloads it to '{file.path}' (a machine "
                "without network needs a copy there)",
            )


def _check_place(coco: Path) -> Iterator[Finding]:
    if coco.absolute().name == "coco":
        root = coco.absolute().parent
        now = os.environ.get("DETECTRON2_DATASETS")
        if now is None or Path(now).absolute() != root:
            yield Finding(NOTE, f"training finds this set with: export DETECTRON2_DATASETS={root}")
    else:
        yield Finding(
            PROBLEM,
            f"training looks for a folder of the name coco: ln -s {coco.absolute()} PLACE/coco and "
            "export DETECTRON2_DATASETS=PLACE",
        )


def _check_layout(coco: Path) -> Iterator[Finding]:
    """Returns the splits of which both annotation file and image folder are there."""
    complete = []
    for split in COCO_2017:
        images, annotations = coco / split, _annotations(coco, split)
        if not annotations.is_file():
            yield Finding(
                PROBLEM,
                f"'{annotations}' is missing: unpack annotations_trainval2017.zip into '{coco}'",
            )
        if not images.is_dir():
            yield Finding(PROBLEM, f"'{images}' is missing: unpack {split}.zip into '{coco}'")
        elif (images / split).is_dir():
            yield Finding(
                PROBLEM,
                f"'{images / split}': the images lie one folder too deep: move them up to "
                f"'{images}'",
            )
        elif annotations.is_file():
            complete.append(split)
    if len(complete) == len(COCO_2017):
        yield Finding(OK, f"layout: annotations/, {', '.join(COCO_2017)}")
    return complete


def _check_count(folder: Path, expected: Mapping[str, int] | None) -> Finding:
    split = folder.name
    number = sum(name.endswith(".jpg") for name in os.listdir(folder))
    wanted = expected[split] if expected else number
    if number < wanted:
        return Finding(
            PROBLEM, f"'{folder}' holds {number} of {wanted} images: unpack {split}.zip again"
        )
    if number > wanted:
        # Files that the annotations do not name do no harm; those that they name are checked below.
        return Finding(NOTE, f"{split}: {number} images, {number - wanted} more than COCO's")
    return Finding(OK, f"{split}: {number} images")


def _check_pairs(coco: Path, splits: list[str]) -> Iterator[Finding]:
    """Returns the splits whose annotations name images of another split."""
    swapped = []
    for split in splits:
        name = _first_image(_annotations(coco, split))
        if name is None or (coco / split / name).exists():
            continue
        others = [other for other in splits if other != split and (coco / other / name).exists()]
        if others:
            swapped.append(split)
            yield Finding(
                PROBLEM,
                f"'{_annotations(coco, split)}' names images that lie in {others[0]} ('{name}'): "
                "the annotation files, or the image folders, of train and val are swapped",
            )
    return swapped


def _check_annotations(
    coco: Path,
    split: str,
    expected: Mapping[str, int] | None,
    sample: int,
    progress: Progress,
) -> Iterator[Finding]:
    """Returns the split's image files, None if the annotations cannot be used."""
    progress(f"reading the annotations of {split}")
    try:
        report = check_coco(
            _annotations(coco, split),
            coco / split,
            masks=True,
            for_training=split.startswith("train"),
            decode=sample,
            progress=partial(progress, f"decoding images of {split}"),
        )
    except DataError as error:
        for line in str(error).splitlines():
            yield Finding(PROBLEM, line)
        return None
    for warning in report.warnings:
        yield Finding(NOTE, warning)
    if expected and report.num_images != expected[split]:
        yield Finding(
            PROBLEM,
            f"'{report.annotations}' lists {report.num_images} images, COCO's own "
            f"{expected[split]}: unpack annotations_trainval2017.zip again (--subset takes any "
            "number)",
        )
    if len(report.categories) != NUM_CATEGORIES:
        yield Finding(
            PROBLEM,
            f"'{report.annotations}' has {len(report.categories)} categories, COCO "
            f"{NUM_CATEGORIES}: the configs' NUM_CLASSES would not fit",
        )
    unused = report.unused_classes
    yield Finding(
        OK,
        f"{split}: {report.num_annotations} annotations of {report.num_images} images "
        f"({report.num_images_without_objects} without an object, {report.num_crowd} crowd "
        f"regions), {report.num_images_decoded} images decoded"
        + (f"; classes without an object: {naming(unused)}" if unused else ""),
    )
    return [report.images / name for name in report.file_names]


def _annotations(coco: Path, split: str) -> Path:
    return coco / "annotations" / f"instances_{split}.json"


def _first_image(annotations: Path) -> str | None:
    """The first file name in an annotation file, without reading all of it; None if it comes
    late."""
    with open(annotations, encoding="utf-8", errors="replace") as file:
        found = re.search(r'"file_name"\s*:\s*"([^"\\]+)"', file.read(_HEAD_BYTES))
    return found[1] if found else None


def _first(values: list) -> str:
    return ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")
