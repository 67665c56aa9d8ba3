"""What norms that are GroupNorms have in common: their options."""

from __future__ import annotations

from typing import Any

from torch import nn

from .base import SmallBatchNorm2d, is_number
from .spec import name_of, shown_options
from .traced import Unscriptable


class GroupNorm2d(Unscriptable, nn.GroupNorm):
    """GroupNorm over [N, C, H, W] with the options of a norm string.

    Args:
        num_channels: channels C.
        groups: number of groups; must divide C.
        eps: added to the variance of a group.
        affine: whether there are a weight and a bias per channel.
        device, dtype: of weight and bias.

    Raises:
        ValueError: an option out of range, or groups that do not divide the channels.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        **factory: Any,
    ) -> None:
        if type(groups) is not int or groups < 1:
            raise ValueError(f"groups={groups!r}: expected a positive int")
        if num_channels % groups:
            fitting = max(g for g in range(1, groups) if num_channels % g == 0)
            norm = name_of(type(self)) or type(self).__name__
            raise ValueError(
                f"groups={groups} does not divide the {num_channels} channels: use"
                f" {norm}(groups={fitting}) there"
            )
        if not (is_number(eps) and eps >= 0.0):
            raise ValueError(f"eps={eps!r}: expected a number of at least 0")
        super().__init__(groups, num_channels, eps=eps, affine=affine, **factory)

    def options(self) -> dict[str, Any]:
        """The constructor's options with their present values, as ``type(self)(C, **options)``
        takes."""
        return {"groups": self.num_groups, "eps": self.eps, "affine": self.affine}

    def extra_repr(self) -> str:
        return f"{self.num_channels}, {shown_options(self)}"

    _replicate_for_data_parallel = SmallBatchNorm2d._replicate_for_data_parallel
