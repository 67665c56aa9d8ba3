"""The norm layers. Needs torch only.

``build_norm("CBN(window=8)", channels)`` builds a layer; ``register_norm`` adds one of your own.
"""

from .base import SmallBatchNorm2d
from .bgn import BGN2d
from .bn import BN2d
from .brn import BRN2d
from .cbn import CBN2d
from .chain import ChainRow, format_chain, kn_chain
from .clock import tick
from .convert import Conversion, ConvertedNorm, LeftNorm, convert_norm
from .double_forward import DoubleForward
from .evaluation import image_share
from .functional import Estimate, Moments
from .gkn import GKN2d
from .gn_ws import GNWS2d
from .group_norm import GroupNorm2d
from .kn import KN2d
from .mbn import MBN2d
from .model import (
    NormRow,
    check_bindings,
    format_norm_table,
    load_memory_state_dict,
    memory_state_dict,
    norm_diagnostics,
    norm_rows,
    reading_memory,
    resolve_burn_in,
    settle,
    sync_running_stats,
)
from .spec import (
    build_norm,
    known_norms,
    norm_class,
    options_of,
    parse_spec,
    register_norm,
    try_norm,
)
from .sync_bn import SyncBN2d
from .trace import find_chain, find_chain_at_call

__all__ = [
    "BGN2d",
    "BN2d",
    "BRN2d",
    "CBN2d",
    "ChainRow",
    "Conversion",
    "ConvertedNorm",
    "DoubleForward",
    "Estimate",
    "GKN2d",
    "GNWS2d",
    "GroupNorm2d",
    "KN2d",
    "LeftNorm",
    "MBN2d",
    "Moments",
    "NormRow",
    "SmallBatchNorm2d",
    "SyncBN2d",
    "build_norm",
    "check_bindings",
    "convert_norm",
    "find_chain",
    "find_chain_at_call",
    "format_chain",
    "format_norm_table",
    "image_share",
    "kn_chain",
    "known_norms",
    "load_memory_state_dict",
    "memory_state_dict",
    "norm_class",
    "norm_diagnostics",
    "norm_rows",
    "options_of",
    "parse_spec",
    "reading_memory",
    "register_norm",
    "resolve_burn_in",
    "settle",
    "sync_running_stats",
    "tick",
    "try_norm",
]
