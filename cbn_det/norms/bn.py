"""BatchNorm, with what the layers of this package add to it.

``"BN"`` alone is torch's in a config; ``"BN(freeze=0.8)"`` is this one. Until it is frozen it
computes what ``nn.BatchNorm2d`` computes.
"""

from __future__ import annotations

from typing import Any

from .base import SmallBatchNorm2d
from .spec import register_norm


@register_norm("BN")
class BN2d(SmallBatchNorm2d):
    """Batch Normalization over [N, C, H, W].

    Args:
        num_features: channels C.
        freeze, ema, momentum, eps, affine, device, dtype: see :class:`SmallBatchNorm2d`.

    Raises:
        ValueError: an option out of range.
    """

    is_batchnorm = True

    def __init__(self, num_features: int, *, ema: str = "batch", **shared: Any) -> None:
        super().__init__(num_features, ema=ema, **shared)
