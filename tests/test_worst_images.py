"""The evaluation on its own: the sheet of the worst images, AP of each class, pycocotools' AP."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_run import arguments, evaluation_of, result_of, run_loggers_removed, write_inputs

from cbn_det.data.scenes import Scenes
from cbn_det.data.worst_images import score_images, write_worst_images
from cbn_det.launch import main
from cbn_det.run.display import class_table

SIZE = 60


def annotation(ann_id: int, image: int, box: list[float], category: int = 1, **more) -> dict:
    area = box[2] * box[3]
    return {
        "id": ann_id,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": area,
        "iscrowd": 0,
        **more,
    }


def prediction(image: int, box: list[float], score: float, category: int = 1) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def make_coco(annotations: list[dict], images: int = 6) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cell"}, {"id": 7, "name": "seed"}],
    }
    coco.createIndex()
    return coco


A, B, FAR = [5.0, 5.0, 20.0, 20.0], [35.0, 35.0, 20.0, 20.0], [5.0, 40.0, 10.0, 10.0]
NEAR_A = [7.0, 5.0, 20.0, 20.0]  # IoU 18/22
HALF_A = [5.0, 5.0, 20.0, 9.0]  # IoU 0.45


def test_scores_worked_out_by_hand() -> None:
    crowd = annotation(9, 5, [0.0, 0.0, 30.0, 30.0], iscrowd=1)
    crowd["segmentation"] = {"size": [SIZE, SIZE], "counts": [0, SIZE * SIZE]}
    coco = make_coco(
        [
            annotation(1, 1, A),
            annotation(2, 1, B),
            annotation(3, 2, A),
            annotation(4, 3, A),
            annotation(5, 3, B, category=7),
            crowd,
            annotation(8, 5, B),
        ]
    )
    made = [
        prediction(1, NEAR_A, 0.9),  # finds 1; B is missed
        prediction(1, A, 0.8),  # a second time: false
        prediction(1, B, 0.49),  # too unsure to count
        prediction(2, HALF_A, 0.9),  # too far off: missed and false
        prediction(3, A, 0.9, category=7),  # another class: missed and false
        prediction(3, B, 0.5, category=7),  # finds 5
        prediction(4, FAR, 0.6),  # nothing there
        prediction(5, A, 0.9),  # on the crowd: does not count
        prediction(5, B, 0.9),
    ]
    scores = {score.image_id: score for score in score_images(coco, made)}
    counts = {i: (len(s.found), s.missed, s.false) for i, s in scores.items()}
    assert counts == {1: (1, 1, 1), 2: (0, 1, 1), 3: (1, 1, 1), 4: (0, 0, 1), 5: (1, 0, 0)}
    assert [round(scores[i].f1, 9) for i in (1, 2, 3, 4, 5)] == [0.5, 0, 0.5, 0, 1]
    # worst first, more errors first among equals, then by id; image 6 is empty and silent
    assert list(scores) == [2, 4, 1, 3, 5]
    assert all(type(image) is int for image in scores)
    assert scores[1].right == {0} and scores[1].found == {1}
    assert scores[3].right == {5} and scores[3].found == {5}


@pytest.mark.parametrize("ids", [(0, -7), (2**70 + 1, 2**70 + 2), (2**53, 2**53 + 1)])
def test_objects_are_found_whatever_their_ids(ids: tuple[int, int], tmp_path: Path) -> None:
    data = make_coco([annotation(ids[0], 1, A), annotation(ids[1], 1, B)]).dataset
    (tmp_path / "set.json").write_text(json.dumps(data))
    made = [prediction(1, A, 0.9), prediction(1, B, 0.9), prediction(1, FAR, 0.8)]
    for left_out, found in ((0, {1, 2}), (1, {2})):  # by their place in the file
        (tmp_path / "made.json").write_text(json.dumps(made[left_out:]))
        files = tmp_path / "made.json", tmp_path / "set.json", tmp_path
        (score,) = write_worst_images(Scenes(*files), tmp_path / "worst.png")
        assert (score.found, score.missed, score.false) == (found, left_out, 1)


def test_without_any_prediction_all_objects_are_missed() -> None:
    coco = make_coco([annotation(1, 4, A), annotation(2, 4, B), annotation(3, 2, A)])
    for made in ([], [prediction(2, A, 0.1)]):
        scores = score_images(coco, made)
        # of two images at 0 the one with more errors comes first, whatever its id
        assert [(s.image_id, s.missed, s.false) for s in scores] == [(4, 2, 0), (2, 1, 0)]


def test_counts_are_those_of_a_matching_of_ones_own() -> None:
    """Oracle: greedy matching, written down plainly, on random boxes."""
    rng = np.random.default_rng(3)

    def random_box() -> list[float]:
        x, y = rng.uniform(0, 25, 2)
        return [float(x), float(y), *map(float, rng.uniform(8, 30, 2))]

    def iou(a: list[float], b: list[float]) -> float:
        low = np.maximum(a[:2], b[:2])
        high = np.minimum(np.add(a[:2], a[2:]), np.add(b[:2], b[2:]))
        both = float(np.prod(np.maximum(high - low, 0)))
        return both / (a[2] * a[3] + b[2] * b[3] - both)

    annotations = [
        annotation(i + 1, int(rng.integers(1, 7)), random_box(), int(rng.choice([1, 7])))
        for i in range(40)
    ]
    made = [
        prediction(
            int(rng.integers(1, 7)), random_box(), float(rng.uniform()), int(rng.choice([1, 7]))
        )
        for _ in range(60)
    ]
    for one in annotations[::3]:  # some nearly right
        box = [side + float(rng.uniform(-2, 2)) for side in one["bbox"]]
        made.append(prediction(one["image_id"], box, 0.95, one["category_id"]))
    want = {}
    for image in range(1, 7):
        open_ = [a for a in annotations if a["image_id"] == image]
        objects, found, false = len(open_), 0, 0
        chosen = [p for p in made if p["image_id"] == image and p["score"] >= 0.5]
        for one in sorted(chosen, key=lambda p: -p["score"]):
            same = [a for a in open_ if a["category_id"] == one["category_id"]]
            best = max(same, key=lambda a: iou(a["bbox"], one["bbox"]), default=None)
            if best is not None and iou(best["bbox"], one["bbox"]) >= 0.5:
                open_.remove(best)
                found += 1
            else:
                false += 1
        want[image] = (found, objects - found, false)
    scores = score_images(make_coco(annotations), made)
    assert {s.image_id: (len(s.found), s.missed, s.false) for s in scores} == want
    assert sum(found for found, _, _ in want.values()) > 5


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path, Path]:
    """Predictions, annotations and images: right in 1, wrong in 2 and 3, silent in 4."""
    coco = make_coco([annotation(1, 1, A), annotation(2, 2, A), annotation(3, 3, B)], images=4)
    (tmp_path / "set.json").write_text(json.dumps(coco.dataset))
    for i in range(1, 5):
        Image.new("RGB", (SIZE, SIZE), (0, 0, 40)).save(tmp_path / f"{i}.png")
    made = [prediction(1, A, 0.9), prediction(2, B, 0.9)]
    (tmp_path / "made.json").write_text(json.dumps(made))
    return tmp_path / "made.json", tmp_path / "set.json", tmp_path


def test_the_sheet_shows_errors_only(files, tmp_path) -> None:
    path = tmp_path / "worst.png"
    worst = write_worst_images(Scenes(*files), path)
    assert [score.image_id for score in worst] == [2, 3]
    sheet = np.asarray(Image.open(path)).astype(int)
    first, second = sheet[:, 8 : 8 + 640], sheet[:, 656 : 656 + 640]
    width = 640
    red, orange, green = ((230, 40, 40), (255, 150, 0), (40, 180, 60))

    def has(part: np.ndarray, color: tuple) -> bool:
        return bool((part == color).all(axis=-1).any())

    half = width // 2
    assert has(first[:, :half], red) and has(first[:, half:], orange)
    assert not has(second[:, :half], red) and has(second[:, half:], orange)
    assert not has(sheet, green)
    assert len(write_worst_images(Scenes(*files), path, count=1)) == 1
    assert Image.open(path).width < sheet.shape[1]


def test_nothing_wrong_is_no_sheet_and_a_lost_image_is_grey(files, tmp_path) -> None:
    made = [prediction(1, A, 0.9), prediction(2, A, 0.9), prediction(3, B, 0.9)]
    files[0].write_text(json.dumps(made))
    assert write_worst_images(Scenes(*files), tmp_path / "worst.png") == []
    assert not (tmp_path / "worst.png").exists()
    files[0].write_text("[]")
    (tmp_path / "2.png").unlink()
    assert len(write_worst_images(Scenes(*files), tmp_path / "worst.png")) == 3


def test_a_phone_photo_is_shown_upright_under_its_boxes(tmp_path) -> None:
    """Stored on its side and rotated by EXIF; red on top as shown, and annotated as shown."""
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:, :20, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(stored).save(tmp_path / "1.png", exif=exif)
    data = make_coco([annotation(1, 1, [10.0, 5.0, 20.0, 40.0])], images=1).dataset
    data["images"][0] |= {"width": 48, "height": 64}
    (tmp_path / "set.json").write_text(json.dumps(data))
    (tmp_path / "made.json").write_text("[]")
    files = tmp_path / "made.json", tmp_path / "set.json", tmp_path
    assert len(write_worst_images(Scenes(*files), tmp_path / "worst.png")) == 1
    sheet = np.asarray(Image.open(tmp_path / "worst.png")).astype(int)
    picture = sheet[8 + 20 : 8 + 20 + 320, 8 : 8 + 235]  # 48 x 64 in a place 320 high
    assert (abs(picture[:90] - (255, 0, 0)) < 20).all()
    assert (picture[110:] < 20).all()


def test_an_older_sheet_goes_where_nothing_is_wrong_any_more(files, tmp_path) -> None:
    path = tmp_path / "worst.png"
    assert write_worst_images(Scenes(*files), path) and path.exists()
    made = [prediction(1, A, 0.9), prediction(2, A, 0.9), prediction(3, B, 0.9)]
    files[0].write_text(json.dumps(made))
    assert write_worst_images(Scenes(*files), path) == []
    assert not path.exists()


def test_the_class_table_is_sorted_worst_first_in_columns() -> None:
    names = {"a": 50.0, "b": 2.0, "c": None, "d": 30.26, "e": 7.0}
    boxes = {"AP": 20.0, "AP50": 30.0, **{f"AP-{name}": ap for name, ap in names.items()}}
    masks = {"AP": 10.0, **{f"AP-{name}": 1.0 for name in names if name != "b"}}
    lines = class_table({"bbox": boxes, "segm": masks}).splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert found[0] == ["class", "box AP", "mask AP"] * 3
    assert found[2] == ["b", "2.0", "-", "d", "30.3", "1.0", "c", "-", "1.0"]
    assert found[3] == ["e", "7.0", "1.0", "a", "50.0", "1.0", "", "", ""]
    assert class_table({}) == class_table({"bbox": {"AP": 1.0}}) == ""


def pycocotools_ap(annotations: Path, predictions: Path, task: str) -> dict[str, float | None]:
    """AP in percent as pycocotools itself computes it, of each class too."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        made = json.loads(predictions.read_text())
        if task == "segm":
            made = [{k: v for k, v in p.items() if k != "bbox"} for p in made]
        scores = COCOeval(coco, coco.loadRes(made), task)
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    found = dict(zip(names, scores.stats, strict=False))
    for i, category in enumerate(scores.params.catIds):
        precision = scores.eval["precision"][:, :, i, 0, -1]
        precision = precision[precision > -1]
        name = coco.cats[category]["name"]
        found[f"AP-{name}"] = precision.mean() if precision.size else -1
    return {key: value * 100 if value > -1 else None for key, value in found.items()}


MASKS = ("MODEL.MASK_ON", "True", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1")


@pytest.mark.parametrize(
    ("engine", "config"),
    [
        ("standalone", "standalone.yaml"),
        pytest.param("detectron2", "tiny.yaml", marks=pytest.mark.detectron2),
    ],
)
def test_eval_only_gives_pycocotools_ap_a_class_table_and_the_sheet(
    engine: str, config: str, tmp_path: Path
) -> None:
    inputs, out = tmp_path / engine, tmp_path / "out"
    write_inputs(inputs)

    def run(*words: str) -> dict:
        command = arguments(inputs, out, "--engine", engine, *words, *MASKS, config=config)
        with run_loggers_removed():
            assert main(command) == 0
        return evaluation_of(out) if "--eval-only" in words else result_of(out)

    trained = run("SOLVER.MAX_ITER", "8")
    assert not list(out.rglob("worst_images.png"))
    assert (out / "log.txt").read_text().count("AP of each class, worst first") == 1
    result = run("--eval-only", "MODEL.WEIGHTS", str(out / "model_final.pth"))
    assert result["results"] == trained["results"]
    for task in ("bbox", "segm"):
        predictions = out / "evaluation" / "coco_instances_results.json"
        want = pycocotools_ap(inputs / "boxes.json", predictions, task)
        assert set(want) == set(result["results"][task])
        for name, value in want.items():
            found = result["results"][task][name]
            if value is None:
                assert found is None, name
            else:
                assert found == pytest.approx(value, rel=0, abs=1e-9), name
    assert result["results"]["bbox"]["AP"] is not None
    log = (out / "log.txt").read_text()
    assert log.count("AP of each class, worst first") == 2 and "images with the lowest F1" in log
    with Image.open(out / "evaluation" / "worst_images.png") as sheet:
        assert sheet.width > 600
