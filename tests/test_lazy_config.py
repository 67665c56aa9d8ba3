"""The LazyConfig example and the launcher that trains it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import REPOSITORY, run_loggers_removed, write_boxes

pytestmark = pytest.mark.detectron2

EXAMPLE = REPOSITORY / "configs" / "examples" / "mask_rcnn_R_50_FPN_1x_cbn.py"
TOOL = REPOSITORY / "tools" / "lazyconfig_train_net.py"

# ResNet-50 and its heads as they are (a LazyConfig has no width to set), on few pixels and RoIs
SMALL = [
    "train.device=cpu",
    "train.init_checkpoint=''",
    "train.max_iter=2",
    "train.log_period=1",
    "train.seed=1",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    "model.proposal_generator.post_nms_topk=[32,16]",
    "model.roi_heads.batch_size_per_image=16",
    "model.roi_heads.box_predictor.test_score_thresh=0",
    "model.roi_heads.box_head.conv_dims=[32,32,32,32]",
    "model.roi_heads.mask_head.conv_dims=[32,32,32,32,32]",
]


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DETECTRON2_DATASETS names it, with six images of COCO's format and classes."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    root = tmp_path_factory.mktemp("datasets")
    write_boxes(root / "coco")
    content = json.loads((root / "coco" / "boxes.json").read_text())
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    content["categories"] = [{"id": c["id"], "name": c["name"]} for c in things]
    (root / "coco" / "annotations").mkdir()
    for split, count in (("train2017", 6), ("val2017", 2)):
        content["images"] = content["images"][:count]
        ids = [image["id"] for image in content["images"]]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        annotations = root / "coco" / "annotations" / f"instances_{split}.json"
        annotations.write_text(json.dumps(content))
        (root / "coco" / split).symlink_to(root / "coco" / "images")
    return root


def start(root: Path, output: Path, *options: str) -> Any:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    env |= {"DETECTRON2_DATASETS": str(root)}
    env.pop("PYTHONPATH", None)  # the launcher must find the package of its own clone
    command = [sys.executable, str(TOOL), "--config-file", str(EXAMPLE), *options]
    command += [*SMALL, f"train.output_dir={output}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def config(tmp_path: Path, *words: str) -> Any:
    """The example, made small, with a loader that needs no files."""
    from detectron2.config import LazyConfig

    cfg = LazyConfig.load(str(EXAMPLE))
    LazyConfig.apply_overrides(cfg, [*SMALL, f"train.output_dir={tmp_path}", *words])
    cfg.dataloader = {"train": {"_target_": "test_lazy_config.batches"}}
    return cfg


def batches() -> list[list[dict[str, Any]]]:
    import torch
    from detectron2.structures import BitMasks, Boxes, Instances

    target = Instances((64, 64))
    target.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 48.0]]))
    target.gt_classes = torch.tensor([3])
    target.gt_masks = BitMasks(torch.ones(1, 64, 64, dtype=torch.bool))
    image = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
    return [[{"image": image, "height": 64, "width": 64, "instances": target}]] * 8


def test_the_example_is_detectron2s_with_norms_and_a_4conv1fc_head() -> None:
    from detectron2 import model_zoo
    from detectron2.config import LazyConfig, instantiate

    def nodes(cfg: Any) -> dict[str, str]:
        found: dict[str, str] = {}

        def walk(node: Any, path: str) -> None:
            if hasattr(node, "items"):
                for key in node:
                    walk(node[key], f"{path}.{key}" if path else key)
            else:
                found[path] = str(node)

        walk({key: cfg[key] for key in ("model", "dataloader", "optimizer", "train")}, "")
        return found

    zoo = nodes(model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"))
    cfg = LazyConfig.load(str(EXAMPLE))
    ours = nodes(cfg)
    assert {key for key in {*zoo, *ours} if zoo.get(key) != ours.get(key)} == {
        "model.backbone.norm",
        "model.roi_heads.box_head.conv_norm",
        "model.roi_heads.box_head.conv_dims",
        "model.roi_heads.box_head.fc_dims",
        "model.roi_heads.mask_head.conv_norm",
        "train.output_dir",
    }
    model = instantiate(cfg.model)
    box, mask = model.roi_heads.box_head, model.roi_heads.mask_head
    convs = [getattr(box, f"conv{i}") for i in (1, 2, 3, 4)]
    convs += [getattr(mask, f"mask_fcn{i}") for i in (1, 2, 3, 4)]
    convs += [model.backbone.fpn_lateral2, model.backbone.fpn_output5]
    assert {type(conv.norm).__name__ for conv in convs} == {"CBN2d"}
    assert box.fc1.out_features == 1024 and not hasattr(box, "fc2")


def test_two_processes_train_and_evaluate_it(coco_root: Path, tmp_path: Path) -> None:
    done = start(coco_root, tmp_path, "--num-gpus", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines[:2]] == [0, 1]
    assert all(math.isfinite(line["total_loss"]) for line in lines[:2])
    assert "segm/AP" in lines[-1]
    assert "fpn_lateral2" in (tmp_path / "log.txt").read_text().partition("Starting training")[0]
    assert (tmp_path / "model_final.pth").exists()


def test_a_checkpoint_is_evaluated(
    coco_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import torch
    from detectron2.config import LazyConfig, instantiate

    from cbn_det.plugin import lazy
    from cbn_det.plugin.datasets import register_coco

    name = f"lazy_{coco_root.name}"
    coco = coco_root / "coco"
    register_coco(name, coco / "annotations" / "instances_val2017.json", coco / "val2017")
    cfg = LazyConfig.apply_overrides(LazyConfig.load(str(EXAMPLE)), [*SMALL])
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "weights.pth")
    words = [*SMALL, f"train.init_checkpoint={tmp_path / 'weights.pth'}"]
    words += [f"train.output_dir={tmp_path}", f"dataloader.test.dataset.names={name}"]
    results = []
    monkeypatch.setattr(lazy, "print_csv_format", results.append)
    with run_loggers_removed():
        assert lazy.main(["--config-file", str(EXAMPLE), "--eval-only", *words]) == 0
    assert set(results[0]) == {"bbox", "segm"}
    weights = torch.load(tmp_path / "weights.pth")["model"]
    del weights["backbone.fpn_lateral2.norm.running_mean"]
    torch.save({"model": weights}, tmp_path / "weights.pth")
    with run_loggers_removed():
        assert lazy.main(["--config-file", str(EXAMPLE), "--eval-only", *words]) == 2
    assert len(results) == 1
    said = capfd.readouterr().err
    assert "backbone.fpn_lateral2.norm.running_mean is not in the file" in said


def test_the_norms_are_looked_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detectron2.config import LazyCall as L
    from detectron2.config import instantiate
    from detectron2.engine import hooks
    from fvcore.common.param_scheduler import LinearParamScheduler

    from cbn_det.plugin import lazy, norm_hook

    words = ("train.max_iter=5", "train.eval_period=2", "train.checkpointer.period=3")
    cfg = config(tmp_path, *words, 'model.backbone.norm="MBN(burn_in=0)"')
    model = instantiate(cfg.model).to("cpu")
    done: list[str] = []

    def note(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(what)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(norm_hook, "sync_running_stats", "pool")
    note(lazy, "evaluate", "evaluate")
    note(norm_hook.DoubleForward, "refresh", "second pass")
    note(lazy.AtomicCheckpointer, "save", "save")
    note(hooks.IterationTimer, "before_step", "step")
    with run_loggers_removed():
        lazy.train(cfg, model)
    step = ["step", "second pass"]
    assert done == [
        *step,
        *(*step, "pool", "evaluate"),
        *(*step, "pool", "save"),
        *(*step, "pool", "evaluate"),
        *(*step, "pool", "save", "evaluate"),
    ]
    assert model.roi_heads.box_head.conv1.norm.burn_in_steps == round(5 * 2 / 3)
    assert model.backbone.fpn_lateral2.norm.steps == 4

    cfg.train.max_iter = 6
    cfg.optimizer.lr, cfg.optimizer.weight_decay = 0.3, 0.07
    cfg.lr_multiplier = L(LinearParamScheduler)(start_value=1.0, end_value=0.5)
    again = instantiate(cfg.model).to("cpu")
    with run_loggers_removed():
        trainer = lazy.train(cfg, again, resume=True)
    groups = trainer.optimizer.param_groups
    assert {group["lr"] for group in groups} == {0.15}  # after the last step
    assert {group["weight_decay"] for group in groups} == {0.0, 0.07}  # norms, others
    memory = trainer.optimizer.state[again.backbone.fpn_lateral2.weight]["momentum_buffer"]
    assert memory.isfinite().all() and memory.any()
    layer = again.backbone.fpn_lateral2.norm
    assert layer.steps == 5, "its burn-in began anew"
    assert len(layer.memory) == 5, "what it remembers began anew"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: dataloader.train: [Errno 2] No such file or directory: "),
        (["train.amp.enabled=True"], "error: train.amp.enabled needs a GPU"),
        (["model.backbone.norm=CBNN"], "error: model: unknown norm 'CBNN'. Known: "),
        (["model.backbone.norm=CBN(window=8)"], "error: model.backbone.norm=CBN(window=8): "),
        (["train.init_checkpoint=absent.pth"], "error: train.init_checkpoint absent.pth: "),
    ],
)
def test_what_cannot_run_is_one_line(
    coco_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    """Without a GPU and without data, and where the config is wrong."""
    import torch
    from detectron2.data import DatasetCatalog

    from cbn_det.plugin import lazy
    from cbn_det.plugin.datasets import register_coco

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = [*SMALL, f"train.output_dir={tmp_path}", "train.device=cuda"]
    if words:
        name, coco = f"few_{coco_root.name}", coco_root / "coco"
        if name not in DatasetCatalog.list():
            register_coco(name, coco / "annotations" / "instances_val2017.json", coco / "val2017")
        options += [f"dataloader.{split}.dataset.names={name}" for split in ("train", "test")]
    with run_loggers_removed():
        assert lazy.main(["--config-file", str(EXAMPLE), *options, *words]) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if "Warning" not in line]
    assert sum(line.startswith("error: ") for line in err) == 1
    assert any(line.startswith(said) for line in err), err
    assert not any("Traceback" in line for line in err)
    if not words:
        assert "note: train.device: no GPU here, 'cuda' is replaced by 'cpu'" in err


def test_without_a_file_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from cbn_det.launch import main as launch
    from cbn_det.plugin.lazy import main

    assert main(["--config-file", str(tmp_path / "absent.py")]) == 2
    words = ["--config-file", "examples/mask_rcnn_R_50_FPN_1x_cbn", "train.max_iter"]
    assert launch(words) == 2  # it is a LazyConfig
    assert "error: train.max_iter: " in capsys.readouterr().err
    assert main(["--config-file", str(tmp_path / "absent.py")]) == 2
    assert "absent.py" in capsys.readouterr().err
    assert main(["--config-file", str(EXAMPLE), "--num-gpus", "0"]) == 2
    assert "--num-gpus" in capsys.readouterr().err
