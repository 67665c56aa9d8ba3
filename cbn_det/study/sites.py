"""Where in a detector the compared norm goes: the names of the sites and the config keys behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbn_det.norm_keys import NORM_KEYS
from cbn_det.study.recipes import DETECTRON2_NORM_KEYS, RECIPES, read_yaml

SITES = {row.site: row.key for row in NORM_KEYS}

# The row without any norm: what the backbone came with is frozen, nothing is put elsewhere.
NO_NORM = "none"
_FROZEN = "FrozenBN"


def norm_keys(
    config: Path | None, recipe: str, engine: str, sites: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The config keys that the compared norm is written to.

    Args:
        config: of the user's own; None: the recipe's.
        recipe: a name of `RECIPES`.
        engine: the standalone engine knows no keys of models that it does not have.
        sites: names of `SITES`. None: where the config names a norm that is not frozen; where it
            names none, the recipe's sites that the config does not freeze.

    Raises:
        ValueError: an unknown site.
    """
    known = [
        key for key in SITES.values() if engine == "detectron2" or key not in DETECTRON2_NORM_KEYS
    ]
    if sites is not None:
        unknown = [site for site in sites if SITES.get(site) not in known]
        if unknown:
            names = ", ".join(site for site, key in SITES.items() if key in known)
            raise ValueError(f"site {unknown[0]!r}: known are {names}")
        return tuple(key for key in known if key in {SITES[site] for site in sites})
    if config is None:
        return RECIPES[recipe].norm_keys
    written = read_yaml(config)
    trained = tuple(key for key in known if _value(written, key) not in (None, "", _FROZEN))
    frozen = {key for key in known if _value(written, key) == _FROZEN}
    fallback = {*RECIPES[recipe].norm_keys, *DETECTRON2_NORM_KEYS} - frozen
    return trained or tuple(key for key in known if key in fallback)


def norm_words(keys: Sequence[str], norm: str) -> list[str]:
    """KEY VALUE pairs that put a norm at these keys."""
    if norm != NO_NORM:
        return [word for key in keys for word in (key, norm)]
    frozen = {SITES["backbone"]: _FROZEN}
    return [word for key in keys for word in (key, frozen.get(key, ""))]


def _value(written: dict[str, Any], key: str) -> Any:
    node: Any = written
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
