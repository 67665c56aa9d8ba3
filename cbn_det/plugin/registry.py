"""The registry hook: our norms, by name, wherever detectron2 takes a norm.

``detectron2.layers.get_norm`` is a plain function with a literal table, imported by name into some
twenty modules. :func:`register` puts another function in its place, in its home and in every module
loaded so far that holds it; modules loaded later import the new one. What it does not know it
leaves to the original.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import detectron2.layers.batch_norm as home
from detectron2.config import CfgNode
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import Size, Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..norm_keys import NORM_KEYS
from ..norms import SmallBatchNorm2d, build_norm, known_norms, norm_class, parse_spec, try_norm
from ..norms.binding import ConvBound
from ..norms.recalibration import in_backward
from ..norms.spec import name_of

logger = logging.getLogger(__name__)

#: the names of detectron2's own table (it is rebuilt inside ``get_norm`` at each call)
DETECTRON2_NORMS = tuple("BN SyncBN FrozenBN GN nnSyncBN naiveSyncBN naiveSyncBN_N LN".split())

NormSpec = str | Callable[[int], nn.Module] | None

_original: Callable[[NormSpec, int], nn.Module | None] = home.get_norm
_retinanet_hook: Any = None
_keys: dict[str, list[str]] = {}  # norm -> the keys that name it in the config checked last


@wraps(_original)
def get_norm(norm: NormSpec, out_channels: int) -> nn.Module | None:
    if not isinstance(norm, str) or not norm or norm in DETECTRON2_NORMS:
        return _original(norm, out_channels)
    name, _ = parse_spec(norm)
    if name in known_norms():
        try:
            return build_norm(norm, out_channels)
        except ValueError as error:
            keys = ", ".join(_keys.get(norm, ()))
            raise ValueError(f"{keys}: {error}" if keys else str(error)) from None
    try:  # a name that this detectron2 knows and we do not
        return _original(norm, out_channels)
    except KeyError:
        raise ValueError(_unknown(norm)) from None


def _unknown(norm: str) -> str:
    name = parse_spec(norm)[0]
    ours, theirs = ", ".join(sorted(known_norms())), ", ".join(DETECTRON2_NORMS)
    message = f"unknown norm {norm!r}. Known: {ours} (cbn_det), {theirs} (detectron2), '' for none"
    if name in DETECTRON2_NORMS:
        message = f"norm {norm!r}: detectron2's {name} takes no options. {message}"
    return message


def _rebind(old: Any, new: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name == __name__:
            continue
        for key, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, key, new)


def register() -> None:
    """Makes every name of :func:`cbn_det.norms.known_norms`, with options, valid wherever
    detectron2 takes a norm: YAML, LazyConfig, command line, ``get_norm``.

    Call it in each process, before the model is built; calling it again does nothing.
    """
    global _retinanet_hook
    if home.get_norm is get_norm:
        return
    _rebind(_original, get_norm)
    _retinanet_hook = register_module_module_registration_hook(_unshare_retinanet_norms)
    logging.getLogger(RetinaNetHead.__module__).addFilter(_not_shared)


def unregister() -> None:
    """Puts detectron2's own ``get_norm`` back everywhere. Models built in between keep working."""
    global _retinanet_hook
    if home.get_norm is not get_norm:
        return
    _rebind(get_norm, _original)
    _retinanet_hook.remove()
    logging.getLogger(RetinaNetHead.__module__).removeFilter(_not_shared)
    _retinanet_hook = None


def _not_shared(record: logging.LogRecord) -> bool:
    """Drops RetinaNetHead's warning about shared norms where :func:`_unshare_retinanet_norms` is
    about to take them apart."""
    message = record.getMessage()
    return not (
        "Shared BatchNorm" in message and SmallBatchNorm2d.__module__.split(".")[0] in message
    )


class NormOfLevels(CycleBatchNormList):
    """detectron2's list of norms that take turns, one for each feature level. A turn that ends by
    an exception is over, too: Double Forward leaves its second pass so, inside the last norm.

    An activation checkpoint around a single level recomputes the last level first; its turn is then
    told by the size of its map, and where several have that size, by the level before it.

    Raises:
        RuntimeError: in such a recomputation, of levels of the same size.
    """

    plain_class = CycleBatchNormList  #: what it becomes together with its norms (deploy)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sizes: list[Size | None] = [None] * len(self)
        self._in_order = True

    def forward(self, x: Tensor) -> Tensor:
        if in_backward() and not self._in_order:
            self._pos = self._turn_of(x)
        turn = self._pos
        self._sizes[turn] = x.shape
        try:
            return super().forward(x)
        finally:
            self._pos = (turn + 1) % len(self)

    def begin(self) -> None:
        self._pos, self._in_order = 0, in_backward()

    def _turn_of(self, x: Tensor) -> int:
        turns = [turn for turn, size in enumerate(self._sizes) if size == x.shape]
        if self._pos > 0 and self._pos in turns:
            return self._pos  # a checkpoint around all of them that calls no hook of the head
        if len(turns) != 1:
            raise RuntimeError(
                f"an activation checkpoint recomputes a feature level of {list(x.shape)}, and it"
                f" cannot be told which: {len(turns)} levels have that size. Checkpoint the head as"
                " a whole, or the backbone"
            )
        return turns[0]


def _from_the_first_level(head: nn.Module, args: tuple[Any, ...]) -> None:
    """All levels follow, in order. An iteration that broke off between two of them (out of memory)
    does not shift the next; and a checkpoint around the head recomputes them like this."""
    for module in head.modules():
        if isinstance(module, NormOfLevels):
            module.begin()


def _unshare_retinanet_norms(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Gives each feature level statistics of its own, as RetinaNetHead does for "BN" and "SyncBN".

    The head (and FCOS's, which inherits it) is one stack of convolutions run on five levels. It
    takes detectron2's ``CycleBatchNormList`` only for those two names; shared by all levels, one
    norm would mix their statistics and be called five times an iteration.
    """
    if not isinstance(parent, RetinaNetHead) or not isinstance(child, nn.Sequential):
        return
    levels = parent._num_features
    for index, norm in enumerate(child):
        if not isinstance(norm, SmallBatchNorm2d):
            continue
        conv = norm.conv if isinstance(norm, ConvBound) else None
        options = {key: value for key, value in norm.options().items() if key != "affine"}
        cycle = NormOfLevels(
            length=levels, bn_class=partial(type(norm), **options), num_features=norm.num_features
        )
        child[index] = cycle
        if _from_the_first_level not in parent._forward_pre_hooks.values():
            parent.register_forward_pre_hook(_from_the_first_level)
        for layer in cycle:
            if conv is not None and layer.needs_conv:
                layer.bind(conv)
    logger.info(f"{type(parent).__name__}.{name}: statistics of {levels} levels are kept apart")


def norm_keys(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every (key, value) of a config that names a norm: ``("MODEL.FPN.NORM", "CBN")``."""
    for key, value in cfg.items():
        path = f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from norm_keys(value, f"{path}.")
        elif isinstance(value, str) and (key == "NORM" or key.endswith("_NORM")):
            yield path, value


def check_config_norms(cfg: CfgNode) -> None:
    """Builds a layer for each norm of a config once, so that a mistake is told with its key. Call
    it before the model is built: a layer that cannot have as many channels as its place has is told
    with the keys known from here.

    Raises:
        ValueError: an unknown name or option; names the config key and the known values.
    """
    _keys.clear()
    for key, value in norm_keys(cfg):
        if value and value not in DETECTRON2_NORMS:
            try:
                if parse_spec(value)[0] in known_norms():
                    try_norm(value)
                else:
                    get_norm(value, 32)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
            _keys.setdefault(value, []).append(key)


def norms_in_use(cfg: CfgNode) -> dict[str, str]:
    """The ``*NORM`` keys that the configured model reads, with their values."""
    model = cfg.MODEL
    architecture, backbone = model.META_ARCHITECTURE, model.BACKBONE.NAME.lower()
    rcnn = architecture in ("GeneralizedRCNN", "PanopticFPN")
    read = {
        "MODEL.RESNETS.NORM": "resnet" in backbone,
        "MODEL.FPN.NORM": "fpn" in backbone,
        "MODEL.ROI_BOX_HEAD.NORM": rcnn and model.ROI_HEADS.NAME != "Res5ROIHeads",
        "MODEL.ROI_MASK_HEAD.NORM": rcnn and model.MASK_ON,
        "MODEL.RETINANET.NORM": architecture == "RetinaNet",
        "MODEL.SEM_SEG_HEAD.NORM": architecture not in ("GeneralizedRCNN", "RetinaNet"),
    }
    return {key: norm for key, norm in norm_keys(cfg) if read.get(key, True)}


def unused_norms(cfg: CfgNode, model: nn.Module) -> list[str]:
    """The config keys in use that name one of our norms, but of which the model has no layer:
    neither where the key's layers are nor at a place whose own key does not name this norm. Layers
    that ``FREEZE_AT`` has made FrozenBatchNorm count.

    Some heads take no norm, and some code compares names and falls through to "no norm" for those
    it does not know; nothing else would tell.
    """
    norms = norms_in_use(cfg)
    names = {key: parse_spec(norm)[0] if norm else "" for key, norm in norms.items()}
    found = [(type(module), site_of(place)) for place, module in model.named_modules()]

    def is_used(key: str) -> bool:
        name, cls = names[key], norm_class(names[key])
        others = {other for other, of_other in names.items() if of_other == name} - {key}
        return any(
            (site == key and issubclass(kind, FrozenBatchNorm2d))
            or (site not in others and issubclass(kind, cls) and name_of(kind) in (None, name))
            for kind, site in found
        )

    ours = [k for k, n in norms.items() if names[k] in known_norms() and n not in DETECTRON2_NORMS]
    return [key for key in ours if not is_used(key)]


def site_of(name: str) -> str:
    """The ``*NORM`` key of the part of a model that a module or tensor is in; "" if unknown."""
    return next((row.key for row in NORM_KEYS if re.match(row.modules, name)), "")
