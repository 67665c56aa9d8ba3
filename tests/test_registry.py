"""The registry hook: names of norms, with options, wherever detectron2 takes a norm."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
detectron2 = pytest.mark.detectron2

#: the modules of detectron2 that hold ``get_norm`` by name
HOLDERS = [
    "detectron2.layers.batch_norm",
    "detectron2.layers",
    "detectron2.layers.aspp",
    "detectron2.layers.blocks",
    "detectron2.modeling.backbone.resnet",
    "detectron2.modeling.backbone.regnet",
    "detectron2.modeling.backbone.fpn",
    "detectron2.modeling.backbone.vit",
    "detectron2.modeling.meta_arch.retinanet",
    "detectron2.modeling.meta_arch.semantic_seg",
    "detectron2.modeling.roi_heads.box_head",
    "detectron2.modeling.roi_heads.mask_head",
    "detectron2.projects.deeplab.resnet",
    "detectron2.projects.deeplab.semantic_seg",
    "detectron2.projects.panoptic_deeplab.panoptic_seg",
]
#: source of ``load()``, which imports them all; Panoptic-DeepLab's package needs panopticapi's name
LOAD = f"""
import importlib, sys, types
for _name in ("panopticapi", "panopticapi.utils"):
    sys.modules[_name] = types.ModuleType(_name)
sys.modules["panopticapi.utils"].rgb2id = None
def load():
    importlib.import_module("detectron2.projects.point_rend")
    return [importlib.import_module(name) for name in {HOLDERS}]
"""


@pytest.fixture
def registered() -> Iterator[Any]:
    """The registry module, with the hook in place for one test."""
    from cbn_det.plugin import registry

    registry.register()
    yield registry
    registry.unregister()


@pytest.fixture
def user_norm() -> Iterator[str]:
    """A norm of a user, registered for one test."""
    from cbn_det.norms import register_norm, spec

    @register_norm("Doubling")
    class Doubling2d(nn.BatchNorm2d):
        def __init__(self, num_features, *, factor=2.0):
            super().__init__(num_features)
            self.factor = factor

    yield "Doubling"
    del spec._NORMS["Doubling"]


def run_python(code: str) -> str:
    """Runs code in a fresh interpreter; its output."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def get_norm_now(norm: Any, channels: int = 8) -> Any:
    import detectron2.layers

    return detectron2.layers.get_norm(norm, channels)


# ---- in place, and back --------------------------------------------------------------------------


@detectron2
@pytest.mark.parametrize("first", ["detectron2", "cbn_det"])
def test_every_module_gets_the_hook_whichever_is_imported_first(first):
    """Each module of detectron2 that holds get_norm, loaded before or after ``register()``."""
    imports = {
        "detectron2": "modules = load(); import cbn_det; cbn_det.register()",
        "cbn_det": "import cbn_det; cbn_det.register(); modules = load()",
    }
    out = run_python(LOAD + textwrap.dedent(f"""
            {imports[first]}
            missed = [m.__name__ for m in modules
                      if type(m.get_norm("CBN(window=3)", 8)).__name__ != "CBN2d"]
            kinds = {{m.get_norm for m in modules}}
            original = modules[0].get_norm.__wrapped__
            own = ("cbn_det.plugin.registry", "__main__", "__mp_main__")
            held = [n for n, m in list(sys.modules.items()) if n not in own
                    and any(v is original for v in list(getattr(m, "__dict__", {{}}).values()))]
            print(missed, len(kinds), held)
            cbn_det.unregister()
            kept = [m.__name__ for m in modules if m.get_norm is not original]
            print(kept, len(modules))
            """))
    assert out.splitlines() == ["[] 1 []", "[] 15"]


@detectron2
def test_no_other_module_of_detectron2_holds_get_norm():
    """The list above is the whole installed package's: what a newer detectron2 adds shows here."""
    import detectron2 as package

    folder = Path(package.__file__).parent
    found = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
        if "get_norm" in path.read_text(encoding="utf-8")
    }
    assert found == set(HOLDERS)


def _globals_of_all_modules() -> dict[tuple[str, str], int]:
    return {
        (name, key): id(value)
        for name, module in list(sys.modules.items())
        for key, value in list(getattr(module, "__dict__", {}).items())
        if callable(value)
    }


@detectron2
def test_unregister_restores_every_module_global():
    from torch.nn.modules import module as torch_module

    from cbn_det.plugin import registry

    registry.unregister()  # other tests of this process may have registered
    hooks = dict(torch_module._global_module_registration_hooks)
    before = _globals_of_all_modules()
    registry.register()
    once = _globals_of_all_modules()
    registry.register()
    assert _globals_of_all_modules() == once
    changed = {key for key in before if before[key] != once[key]}
    assert {key for _, key in changed} == {"get_norm"} and len(changed) >= 12
    assert len(torch_module._global_module_registration_hooks) == len(hooks) + 1
    registry.unregister()
    registry.unregister()
    assert _globals_of_all_modules() == before
    assert dict(torch_module._global_module_registration_hooks) == hooks
    with pytest.raises(KeyError):
        get_norm_now("CBN")


@detectron2
def test_a_model_outlives_unregister(registered):
    import torch

    conv_norm = nn.Sequential(nn.Conv2d(3, 8, 3), get_norm_now("CBN(burn_in=0)"))
    registered.unregister()
    optimizer = torch.optim.SGD(conv_norm.parameters(), 0.1)
    for _ in range(2):
        conv_norm(torch.randn(2, 3, 6, 6)).square().mean().backward()
        optimizer.step()
    assert len(conv_norm[1].memory) == 1


# ---- names and what they give --------------------------------------------------------------------


@detectron2
@pytest.mark.parametrize(
    "name", ["BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN"]
)
def test_upstream_names_give_upstream_classes(name):
    import cbn_det

    theirs = get_norm_now(name, 32)
    cbn_det.register()
    try:
        ours = get_norm_now(name, 32)
    finally:
        cbn_det.unregister()
    assert type(ours) is type(theirs) and repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()


@detectron2
def test_none_empty_and_callables_pass_through(registered):
    assert get_norm_now(None) is None
    assert get_norm_now("") is None
    built = nn.Identity()
    assert get_norm_now(lambda channels: built) is built
    assert get_norm_now(nn.BatchNorm2d, 5).num_features == 5


@detectron2
def test_options_in_the_name(registered):
    norm = get_norm_now("CBN(window=7, burn_in=30, compensation='none', ema='batch')", 5)
    assert type(norm).__name__ == "CBN2d"
    assert norm.num_features == 5
    options = norm.options()
    assert (options["window"], options["burn_in"]) == (7, 30)
    assert (options["compensation"], options["ema"]) == ("none", "batch")


@detectron2
def test_an_unknown_name_lists_the_known_ones(registered):
    with pytest.raises(ValueError) as told:
        get_norm_now("CBM(window=4)")
    for known in (
        "'CBM(window=4)'",
        "CBN",
        "BN",
        "SyncBN",
        "FrozenBN",
        "GN",
        "naiveSyncBN_N",
        "LN",
    ):
        assert known in str(told.value)


@detectron2
def test_upstream_names_take_no_options(registered):
    with pytest.raises(ValueError, match=r"GN\(groups=16\).*detectron2's GN takes no options"):
        get_norm_now("GN(groups=16)")


@detectron2
def test_an_unknown_option_lists_the_options(registered):
    with pytest.raises(ValueError, match=r"CBN has no option 'windw'.*window=4"):
        get_norm_now("CBN(windw=4)")


# ---- configs -------------------------------------------------------------------------------------


def _norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "CBN2d"]


@detectron2
def test_yaml_file_and_command_line(registered, tmp_path):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    file = tmp_path / "config.yaml"
    file.write_text("""
MODEL:
  DEVICE: cpu
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN:
    IN_FEATURES: [res2, res3, res4, res5]
    NORM: "CBN(window=3, burn_in=10, positions=32)"
""")
    cfg = get_cfg()
    cfg.merge_from_file(str(file))
    norms = _norms_of(build_backbone(cfg))
    assert len(norms) == 8  # a lateral and an output convolution for each of four levels
    assert {(n.window, n.burn_in, n.positions) for n in norms} == {(3, 10, 32)}

    # words of a command line, as detectron2's launchers hand them over
    cfg.merge_from_list(["MODEL.FPN.NORM", "CBN(window=5, compensation='none')"])
    norms = _norms_of(build_backbone(cfg))
    assert {(n.window, n.compensation) for n in norms} == {(5, "none")}
    cfg.merge_from_list(["MODEL.FPN.NORM", "CBN"])
    assert {n.window for n in _norms_of(build_backbone(cfg))} == {4}
    # what is dumped beside a run reads back as it was
    assert get_cfg().load_cfg(cfg.dump()).MODEL.FPN.NORM == "CBN"


@detectron2
def test_lazy_config_and_its_overrides(registered, tmp_path):
    from detectron2.config import LazyConfig, instantiate

    file = tmp_path / "config.py"
    file.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from detectron2.modeling.backbone import BasicStem\n"
        "model = L(BasicStem)(in_channels=3, out_channels=8, norm='CBN(window=3)')\n"
    )
    cfg = LazyConfig.load(str(file))
    stem = instantiate(cfg.model)
    assert stem.conv1.norm.window == 3 and stem.conv1.norm.conv is stem.conv1

    LazyConfig.apply_overrides(cfg, ['model.norm="CBN(window=6, burn_in=20)"'])
    norm = instantiate(cfg.model).conv1.norm
    assert (norm.window, norm.burn_in) == (6, 20)
    LazyConfig.apply_overrides(cfg, ["model.norm=CBN"])
    assert instantiate(cfg.model).conv1.norm.window == 4


@detectron2
def test_lazy_config_with_a_callable_needs_no_hook():
    from functools import partial

    from detectron2.config import LazyCall, instantiate
    from detectron2.modeling.backbone import BasicStem

    from cbn_det.norms import CBN2d

    stem = instantiate(LazyCall(BasicStem)(out_channels=8, norm=partial(CBN2d, window=2)))
    assert stem.conv1.norm.window == 2 and stem.conv1.norm.conv is stem.conv1


@detectron2
def test_a_users_norm_in_a_config(registered, user_norm):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = f"{user_norm}(factor=3.0)"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    registered.check_config_norms(cfg)
    norms = [m for m in build_backbone(cfg).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 10 and {type(n).__name__ for n in norms} == {"Doubling2d"}
    assert {n.factor for n in norms} == {3.0}
    with pytest.raises(ValueError, match="Doubling"):
        get_norm_now("Dubling")


@detectron2
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("MODEL.FPN.NORM", "CBNN", r"MODEL\.FPN\.NORM: unknown norm 'CBNN'.*CBN"),
        ("MODEL.RESNETS.NORM", "CBN(window=0)", r"MODEL\.RESNETS\.NORM: .*window=0: .*1 or more"),
        ("MODEL.ROI_BOX_HEAD.NORM", "CBN(k=4)", r"MODEL\.ROI_BOX_HEAD\.NORM: .*no option 'k'"),
        ("MODEL.ROI_MASK_HEAD.NORM", "GN(groups=16)", r"MODEL\.ROI_MASK_HEAD\.NORM: .*no options"),
        ("MODEL.RETINANET.NORM", "CBN(window=4", r"MODEL\.RETINANET\.NORM: cannot read the norm"),
        ("MODEL.SEM_SEG_HEAD.NORM", "CBN(8)", r"MODEL\.SEM_SEG_HEAD\.NORM: .*named options"),
    ],
)
def test_check_config_names_the_key(key, value, told):
    """Before a model is built, and without the hook in place."""
    from detectron2.config import get_cfg

    from cbn_det.plugin.registry import check_config_norms

    cfg = get_cfg()
    check_config_norms(cfg)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=told):
        check_config_norms(cfg)


@detectron2
def test_check_config_reaches_the_keys_of_projects():
    from detectron2.config import CfgNode, get_cfg

    from cbn_det.plugin.registry import check_config_norms, norm_keys

    cfg = get_cfg()
    cfg.MODEL.ROI_DENSEPOSE_HEAD = CfgNode({"DECODER_NORM": "CBX", "DEEPLAB": {"NORM": "CBN"}})
    keys = dict(norm_keys(cfg))
    assert keys["MODEL.ROI_DENSEPOSE_HEAD.DEEPLAB.NORM"] == "CBN"
    assert "SOLVER.WEIGHT_DECAY_NORM" not in keys  # a number
    with pytest.raises(ValueError, match=r"MODEL\.ROI_DENSEPOSE_HEAD\.DECODER_NORM: .*'CBX'"):
        check_config_norms(cfg)


@detectron2
def test_a_norm_that_no_layer_was_built_from_is_told(registered):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM = "CBN"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NORM = "CBN"  # the same norm elsewhere hides nothing
    cfg.MODEL.FPN.NORM = "CBN"  # not read: the backbone has no FPN
    keys = ["MODEL.RESNETS.NORM", "MODEL.ROI_BOX_HEAD.NORM"]
    assert sorted(registered.unused_norms(cfg, nn.Identity())) == keys
    model = nn.ModuleDict({"backbone": build_backbone(cfg)})
    assert registered.unused_norms(cfg, model) == ["MODEL.ROI_BOX_HEAD.NORM"]


@detectron2
def test_a_norm_key_of_another_project_counts_as_used_by_a_layer_at_no_known_place(registered):
    from detectron2.config import CfgNode, get_cfg
    from detectron2.layers import get_norm

    cfg = get_cfg()
    cfg.MODEL.MY_HEAD = CfgNode({"NORM": "CBN(window=6)"})
    mine, another = get_norm("CBN(window=6)", 8), get_norm("BGN", 8)
    assert registered.unused_norms(cfg, nn.ModuleDict({"my_head": mine})) == []
    backbone = nn.ModuleDict({"backbone": nn.Sequential(mine)})
    assert registered.unused_norms(cfg, backbone) == []  # a backbone of the project's own
    cfg.MODEL.RESNETS.NORM = "CBN"
    for model in (backbone, nn.ModuleDict({"my_head": another})):
        assert "MODEL.MY_HEAD.NORM" in registered.unused_norms(cfg, model)


def test_norms_that_freeze_at_has_replaced_count_as_used(registered):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "CBN", 5
    assert registered.unused_norms(cfg, build_model(cfg)) == []


def test_without_detectron2_register_says_so_and_the_norms_work():
    out = run_python("""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "detectron2":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Blocker())
        import cbn_det
        from cbn_det.norms import build_norm
        print(build_norm("CBN(window=2)", 4).window)
        for _ in range(2):
            try:
                cbn_det.register()
            except ImportError as error:
                print("detectron2" in str(error))
        """)
    assert out.split() == ["2", "True", "True"]


@detectron2
@pytest.mark.parametrize(
    ("version", "said"), [("2.141.0", "torch 2.14; this is 2.141.0"), ("", "")]
)
def test_an_untested_version_is_told(version: str, said: str) -> None:
    out = run_python(f"""
        import warnings, torch
        torch.__version__ = {version!r} or torch.__version__
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            import cbn_det.plugin
        print(*(w.message for w in found if "cbn_det was tested" in str(w.message)))
        """)
    assert said in out and bool(out.strip()) == bool(said)
