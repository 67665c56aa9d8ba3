"""Published AP on COCO val2017, as data.

Every number was read at the address beside it; numbers that nobody here has seen in print are not
in this file. AP on the 0-100 scale.
"""

from __future__ import annotations

from dataclasses import dataclass

#: {"bbox": {"AP": 36.8, "AP50": 57.9, ...}, "segm": {...}}
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Source:
    """Where numbers were read: an address that does not change."""

    name: str
    url: str


@dataclass(frozen=True)
class Published:
    """The numbers of one row. ``place`` is the line or table of the source."""

    values: Values
    source: Source
    place: str


@dataclass(frozen=True)
class Elsewhere:
    """Published numbers that no row of a table repeats, and why they are worth knowing."""

    what: str
    published: Published
    remark: str


@dataclass(frozen=True)
class Table:
    """A table: a folder of ``configs/coco``, each config in it a row.

    Args:
        name: of the folder.
        title: detector, schedule, and where the norm is.
        published: numbers by row, "cbn_2img" for ``cbn_2img.yaml``.
        elsewhere: numbers for orientation.
        remarks: what a reader of the differences has to know.
    """

    name: str
    title: str
    published: dict[str, Published]
    elsewhere: tuple[Elsewhere, ...] = ()
    remarks: tuple[str, ...] = ()


def _ap(*numbers: float) -> dict[str, float]:
    return dict(zip(("AP", "AP50", "AP75"), numbers, strict=False))


def _box(*numbers: float) -> Values:
    return {"bbox": _ap(*numbers)}


def _box_mask(box: tuple[float, ...], mask: tuple[float, ...]) -> Values:
    return {"bbox": _ap(*box), "segm": _ap(*mask)}


CBN = Source(
    "CBN authors' README",
    "https://github.com/Howal/Cross-iterationBatchNorm/blob/"
    "f6d35301789c96e52699a9cbc8d2de8681547770/README.md",
)
CBN_FIRST = Source(
    "CBN authors' first release, README",
    "https://github.com/CBN-code-release/mmdetection/blob/"
    "99e7d09ae04f37cfe516b8007f7979a63f1d8284/README.md",
)
ZOO = Source(
    "detectron2 MODEL_ZOO",
    "https://github.com/facebookresearch/detectron2/blob/"
    "02b5c4e295e990042a714712c21dc79b731e8833/MODEL_ZOO.md",
)
MABN = Source(
    "MABN authors' README",
    "https://github.com/megvii-model/MABN/blob/136491f762369852ec4a0246181a7c82aeb4e095/README.md",
)
DETECTRON = Source(
    "Detectron projects/GN README",
    "https://github.com/facebookresearch/Detectron/blob/"
    "0a5101df0d94c6696e3ee1a953f43969c857c99b/projects/GN/README.md",
)


def _cbn(line: int, values: Values) -> Published:
    return Published(values, CBN, f"line {line}")


def _first(what: str, line: int, values: Values) -> Elsewhere:
    remark = "the same setting, another run or evaluation: what one cell varies by"
    return Elsewhere(what, Published(values, CBN_FIRST, f"line {line}"), remark)


def _zoo(line: int, values: Values) -> Published:
    return Published(values, ZOO, f"line {line}")


def _zoo_2fc(line: int, values: Values) -> Elsewhere:
    remark = "another head (2fc): its distance to a row here is not that of the norm"
    return Elsewhere("frozen BN, no norm in FPN and heads", _zoo(line, values), remark)


def _mabn(what: str, values: Values) -> Elsewhere:
    remark = "other code (maskrcnn-benchmark) and schedule (2x): compare differences only"
    return Elsewhere(what, Published(values, MABN, "table COCO"), remark)


def _detectron(what: str, place: str, values: Values) -> Elsewhere:
    remark = (
        "other code (Caffe2), 2x schedule, no scale jitter, same head: compare differences only"
    )
    return Elsewhere(what, Published(values, DETECTRON, place), remark)


_AUTHORS_REMARKS = (
    "Published: 4 GPUs x 4 images in mmdetection 0.x. Differences between norms are what to "
    "compare; the absolute AP also holds what detectron2 does differently.",
    "Two runs of the same cell by the authors differ by up to 0.2 box AP and 0.5 mask AP.",
    "Which burn-in gave the authors' CBN row is not known: their config files say 8 epochs (row "
    "cbn), their code makes 8 iterations of it (row cbn_as_released).",
)
_NO_NUMBERS = (
    "No published numbers with equal heads are known for this setting: the table is new.",
)

TABLES = {
    table.name: table
    for table in (
        Table(
            "faster_rcnn_R_50_FPN_1x_cbn_authors",
            "Faster R-CNN R50-FPN, 1x, the CBN authors' setting: norm in FPN and box head",
            {
                "none_4img": _cbn(26, _box(36.8, 57.9, 39.8)),
                "syncbn_4img": _cbn(27, _box(37.5, 58.4, 40.6)),
                "gn_4img": _cbn(28, _box(37.7, 59.2, 41.2)),
                "cbn_4img": _cbn(29, _box(37.6, 58.5, 40.9)),
                "cbn_as_released_4img": _cbn(29, _box(37.6, 58.5, 40.9)),
            },
            (
                _first("none", 9, _box(36.8, 57.9, 40.0)),
                _first("SyncBN", 10, _box(37.6, 58.8, 40.8)),
                _first("GN", 11, _box(37.8, 59.2, 41.0)),
                _first("CBN", 12, _box(37.6, 58.5, 40.8)),
            ),
            _AUTHORS_REMARKS,
        ),
        Table(
            "mask_rcnn_R_50_FPN_1x_cbn_authors",
            "Mask R-CNN R50-FPN, 1x, the CBN authors' setting: norm in FPN, box and mask head",
            {
                "none_4img": _cbn(30, _box_mask((37.6, 58.5, 41.0), (34.0, 55.2, 36.2))),
                "syncbn_4img": _cbn(31, _box_mask((38.5, 58.9, 42.0), (34.3, 55.7, 36.7))),
                "gn_4img": _cbn(32, _box_mask((38.5, 59.4, 41.8), (35.0, 56.4, 37.3))),
                "cbn_4img": _cbn(33, _box_mask((38.4, 58.9, 42.2), (34.7, 55.9, 37.0))),
                "cbn_as_released_4img": _cbn(33, _box_mask((38.4, 58.9, 42.2), (34.7, 55.9, 37.0))),
            },
            (
                _first("none", 13, _box_mask((37.8, 58.7, 41.3), (34.1, 55.4, 36.3))),
                _first("SyncBN", 14, _box_mask((38.5, 59.3, 41.9), (34.8, 56.0, 37.5))),
                _first("GN", 15, _box_mask((38.6, 59.3, 42.2), (35.0, 56.7, 37.3))),
                _first("CBN", 16, _box_mask((38.5, 59.1, 42.0), (34.7, 56.1, 37.2))),
            ),
            _AUTHORS_REMARKS,
        ),
        Table(
            "faster_rcnn_R_50_FPN_1x",
            "Faster R-CNN R50-FPN, 1x: frozen BN in the backbone, norm in FPN and box head",
            {},
            (_zoo_2fc(121, _box(37.9)),),
            _NO_NUMBERS,
        ),
        Table(
            "mask_rcnn_R_50_FPN_1x",
            "Mask R-CNN R50-FPN, 1x: frozen BN in the backbone, norm in FPN, box and mask head",
            {},
            (_zoo_2fc(348, _box_mask((38.6,), (35.2,))),),
            _NO_NUMBERS,
        ),
        Table(
            "faster_rcnn_R_50_FPN_1x_everywhere",
            "Faster R-CNN R50-FPN, 1x: norm in backbone, FPN and box head",
            {},
            (_zoo_2fc(121, _box(37.9)),),
            _NO_NUMBERS,
        ),
        Table(
            "mask_rcnn_R_50_FPN_1x_everywhere",
            "Mask R-CNN R50-FPN, 1x: norm in backbone, FPN, box and mask head",
            {},
            (
                _zoo_2fc(348, _box_mask((38.6,), (35.2,))),
                _detectron(
                    "frozen BN, 4conv1fc head",
                    "notes of the table Standard Mask R-CNN recipe",
                    _box_mask((38.8,), (34.4,)),
                ),
                _detectron(
                    "GN, 4conv1fc head",
                    "table Standard Mask R-CNN recipe",
                    _box_mask((40.3,), (35.7,)),
                ),
                _mabn("SyncBN, 2 images x 8 GPUs", _box_mask((38.25,), (34.22,))),
                _mabn("MABN, 2 images per GPU", _box_mask((38.42,), (34.12,))),
            ),
            _NO_NUMBERS,
        ),
        Table(
            "mask_rcnn_R_50_FPN_3x_everywhere",
            "Mask R-CNN R50-FPN, 3x: norm in backbone, FPN, box and mask head",
            {
                "gn_2img": _zoo(944, _box_mask((42.6,), (38.6,))),
                "syncbn_2img": _zoo(955, _box_mask((41.9,), (37.8,))),
            },
            (_zoo_2fc(933, _box_mask((41.0,), (37.2,))),),
            ("Published: 8 GPUs x 2 images; SyncBN with PreciseBN.",),
        ),
        Table(
            "mask_rcnn_R_50_FPN_3x_scratch",
            "Mask R-CNN R50-FPN, 3x from random weights: norm everywhere",
            {"gn_2img": _zoo(966, _box_mask((39.9,), (36.6,)))},
            (
                _mabn("BN, 2 images per GPU, from scratch", _box_mask((32.38,), (29.07,))),
                _mabn("BRN, 2 images per GPU, from scratch", _box_mask((34.07,), (30.98,))),
                _mabn("SyncBN, 2 images x 8 GPUs, from scratch", _box_mask((36.80,), (33.10,))),
                _mabn("MABN, 2 images per GPU, from scratch", _box_mask((36.50,), (32.69,))),
            ),
            ("Published: 8 GPUs x 2 images.",),
        ),
        Table(
            "mask_rcnn_R_50_FPN_9x_scratch",
            "Mask R-CNN R50-FPN, 9x from random weights, 64 images a step: norm everywhere",
            {
                "gn_2img": _zoo(977, _box_mask((43.7,), (39.6,))),
                "syncbn_2img": _zoo(988, _box_mask((43.6,), (39.3,))),
            },
        ),
    )
}
