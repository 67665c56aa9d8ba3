"""The standalone engine's config: detectron2's defaults, and nothing that is silently ignored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbn_det.run.errors import ConfigError
from cbn_det.standalone import get_cfg, read_config
from cbn_det.standalone.config import _UNREAD, _defaults, norms_in_use

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs" / "quickstart").glob("*.yaml"))
BASE = next(path for path in CONFIGS if path.name.startswith("Base-"))


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def looked_up(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.detectron2
def test_every_default_is_detectron2s() -> None:
    import detectron2.config

    theirs = dict(leaves(detectron2.config.get_cfg()))
    ours = {part: dict(leaves(_defaults(part))) for part in ("honoured", "fixed")}
    assert not ours["honoured"].keys() & ours["fixed"].keys()
    for key, value in (ours["honoured"] | ours["fixed"]).items():
        assert value == theirs[key], key
        assert type(value) is type(theirs[key]), key
    unread = {key for key in theirs if key.split(".")[1:2] and key.split(".")[1] in _UNREAD}
    assert theirs.keys() - unread == ours["honoured"].keys() | ours["fixed"].keys()


@pytest.mark.detectron2
def test_what_detectron2_dumps_means_the_same(tmp_path: Path) -> None:
    """Oracle: detectron2's own reading of the file."""
    import detectron2.config

    theirs = detectron2.config.get_cfg()
    theirs.merge_from_file(str(BASE))
    path = written(tmp_path, theirs.dump())
    assert read_config(path) == read_config(BASE)
    again = read_config(path, ["SOLVER.AMP.ENABLED", "False", "MODEL.RPN.CONV_DIMS", "[-1]"])
    assert again == read_config(BASE)
    theirs.MODEL.RPN.CONV_DIMS = [256]
    message = error_of(written(tmp_path, theirs.dump()))
    assert str(path) in message and "MODEL.RPN.CONV_DIMS" in message
    assert "takes [-1]" in message and "--engine detectron2" in message


def test_a_bad_value_names_the_file_that_holds_it(tmp_path: Path) -> None:
    path = written(tmp_path, f"_BASE_: {BASE}\nMODEL: {{RESNETS: {{DEPTH: 26}}}}")
    assert error_of(path).startswith(f"--config-file {path}: MODEL.RESNETS.DEPTH is 26")
    assert error_of(path, ["MODEL.RESNETS.DEPTH", "27"]).startswith("MODEL.RESNETS.DEPTH is 27")


@pytest.mark.detectron2
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_quick_start_file_means_the_same_to_both_engines(path: Path) -> None:
    import detectron2.config

    opts = ["SOLVER.STEPS", "(7, 9)", "MODEL.MASK_ON", "True", "OUTPUT_DIR", "out/a"]
    theirs = detectron2.config.get_cfg()
    theirs.merge_from_file(str(path))
    theirs.merge_from_list(opts)
    for key, value in leaves(read_config(path, opts)):
        assert value == looked_up(theirs, key), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_quick_start_files_load_and_survive_a_dump(path: Path, tmp_path: Path) -> None:
    cfg = read_config(path)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (160,)  # written as a string in the file
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert read_config(tmp_path / "config.yaml") == cfg


def test_configs_share_nothing() -> None:
    get_cfg().MODEL.RPN.IN_FEATURES.append("p7")
    read_config(BASE, ["SEED", "9"]).MODEL.PIXEL_MEAN[0] = -1.0
    assert get_cfg().MODEL.RPN.IN_FEATURES == ["res4"]
    assert read_config(BASE).MODEL.PIXEL_MEAN[0] == 127.5


def error_of(path: Path, opts: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(path, opts or [])
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MODEL: {RPN: {FOO: 3}}", "Non-existent config key: MODEL.RPN.FOO"),
        ("FOO: {}", "Non-existent config key: FOO"),
        ("SOLVER: {AMP: {ENABLED: True}}", "SOLVER.AMP.ENABLED is True"),
    ],
)
def test_a_key_in_a_file_that_cannot_be_honoured(tmp_path: Path, text: str, expected: str) -> None:
    base = written(tmp_path, f"_BASE_: {BASE}\n{text}")
    message = error_of(base)
    assert expected in message and str(base) in message
    child = tmp_path / "child.yaml"
    child.write_text("_BASE_: config.yaml\nSEED: 3")
    assert expected in error_of(child)


def test_what_detectron2_would_not_read_either_is_left_out(tmp_path: Path) -> None:
    text = f"_BASE_: {BASE}\nMODEL: {{RETINANET: {{NUM_CLASSES: 3}}}}"
    assert read_config(written(tmp_path, text)) == read_config(BASE)


def test_an_unknown_key_on_the_command_line() -> None:
    message = error_of(BASE, ["MODEL.RPN.NMS_TRESH", "0.5"])
    assert message.endswith("Non-existent key: MODEL.RPN.NMS_TRESH")


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["SEED"], "KEY VALUE pairs expected, got 1 words: ['SEED']"),
        (["SEED", "1", "--resume"], "--resume must stand before the KEY VALUE pairs"),
        (["SEED", "one"], "SEED"),
        (["SOLVER.BASE_LR", "'a'"], "SOLVER.BASE_LR"),
        (["MODEL.RPN", "3"], "MODEL.RPN"),
        (["SEED", "None"], "SEED is None, expected something like -1"),
    ],
)
def test_bad_words_on_the_command_line(opts: list[str], expected: str) -> None:
    assert expected in error_of(BASE, opts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not a mapping"),
        ("[1, 2]", "not a mapping"),
        ("just words", "not a mapping"),
        ("SEED: [", "config.yaml"),
        ("SEED: one", "SEED"),
        ("MODEL: 3", "MODEL"),
        ("_BASE_: config.yaml", "its _BASE_ leads back to it"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("SEED: !!python/object/apply:os.getpid []", "python/object"),
        ("VERSION: 1", "VERSION is 1"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error_of(written(tmp_path, text))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    assert error_of(tmp_path / "no.yaml").endswith("no.yaml: no such file")
    assert error_of(tmp_path).endswith("no such file")
    (tmp_path / "b.yaml").write_bytes(bytes(range(256)))
    assert "b.yaml" in error_of(tmp_path / "b.yaml")


R50 = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "'GeneralizedRCNN'"),
        (["MODEL.BACKBONE.NAME", "build_resnet_backbone"], "'build_resnet_fpn_backbone'"),
        (["MODEL.BACKBONE.FREEZE_AT", "6"], "5"),
        (["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"], "'StandardROIHeads'"),
        (["MODEL.ROI_BOX_HEAD.NAME", ""], "'FastRCNNConvFCHead'"),
        (["MODEL.ROI_MASK_HEAD.NAME", "X"], "'MaskRCNNConvUpsampleHead'"),
        (["MODEL.RPN.IN_FEATURES", "['p3']"], "'p6'"),
        (["MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"], "'res2'"),
        (["MODEL.RESNETS.DEPTH", "26"], "152"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "128"], "64 with MODEL.RESNETS.DEPTH 18"),
        (["MODEL.RESNETS.NUM_GROUPS", "32"], "1 with MODEL.RESNETS.DEPTH 18"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True", *R50], "False with MODEL.RESNETS.DEPTH 50"),
        (["INPUT.FORMAT", "L"], "'BGR' or 'RGB'"),
        (["INPUT.RANDOM_FLIP", "both"], "'horizontal'"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"], "'value' or 'norm'"),
    ],
)
def test_values_that_only_detectron2_knows(opts: list[str], expected: str) -> None:
    message = error_of(BASE, opts)
    assert message.startswith(f"{opts[0]} is ") and expected in message
    assert "--engine detectron2" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32]]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [96], [96, 128]]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[16, 32, 64, 96, 128]"),
        ("SOLVER.MAX_ITER", "0"),
        ("SOLVER.STEPS", "('a',)"),
    ],
)
def test_values_of_another_kind_or_number(key: str, value: str) -> None:
    assert error_of(BASE, [key, value]).startswith(key)


@pytest.mark.parametrize("key", ["RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"])
@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("Nope", "without options BN, SyncBN, FrozenBN, GN, or '' for none"),
        ("LN", "--engine detectron2 takes more"),
        ("CBN(windw=3)", "window=4"),
        ("CBN(window=0)", "window"),
        ("GN(groups=2)", "without options BN, SyncBN, FrozenBN, GN"),
        ("CBN(", "cannot read the norm"),
    ],
)
def test_bad_norms_name_their_key_and_what_is_known(key: str, norm: str, expected: str) -> None:
    message = error_of(BASE, ["MODEL.MASK_ON", "True", f"MODEL.{key}.NORM", norm])
    assert message.startswith(f"MODEL.{key}.NORM: ") and expected in message


def test_norms_without_a_layer() -> None:
    message = error_of(BASE, ["MODEL.ROI_BOX_HEAD.NORM", "CBN", "MODEL.ROI_BOX_HEAD.NUM_CONV", "0"])
    assert message.startswith("MODEL.ROI_BOX_HEAD.NORM") and "NUM_CONV" in message
    unused = ["MODEL.ROI_MASK_HEAD.NORM", "CBN", "MODEL.ROI_MASK_HEAD.NUM_CONV", "0"]
    assert "MODEL.ROI_MASK_HEAD.NORM" not in norms_in_use(read_config(BASE, unused))
    assert "ROI_MASK_HEAD" in error_of(BASE, ["MODEL.MASK_ON", "True", *unused])
    assert error_of(BASE, ["MODEL.RESNETS.NORM", "CBN(affine=False)"]).startswith("MODEL.RESNETS")
    headless = ["MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NUM_FC", "0"]
    assert "NUM_FC are both 0" in error_of(BASE, headless)
