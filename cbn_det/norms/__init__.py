"""The norm layers. Needs torch only.

``build_norm("CBN(window=8)", channels)`` builds a layer; ``register_norm`` adds one of your own.
"""

from .base import Estimate, SmallBatchNorm2d
from .cbn import CBN2d
from .functional import Moments
from .model import (
    NormRow,
    check_bindings,
    format_norm_table,
    load_memory_state_dict,
    memory_state_dict,
    norm_diagnostics,
    norm_rows,
    resolve_burn_in,
    sync_running_stats,
)
from .spec import build_norm, known_norms, norm_class, options_of, parse_spec, register_norm

__all__ = [
    "CBN2d",
    "Estimate",
    "Moments",
    "NormRow",
    "SmallBatchNorm2d",
    "build_norm",
    "check_bindings",
    "format_norm_table",
    "known_norms",
    "load_memory_state_dict",
    "memory_state_dict",
    "norm_class",
    "norm_diagnostics",
    "norm_rows",
    "options_of",
    "parse_spec",
    "register_norm",
    "resolve_burn_in",
    "sync_running_stats",
]
