"""The YAML files of this package, and how a config is found by its name."""

from __future__ import annotations

import difflib
from pathlib import Path

from .run.errors import ConfigError

_HERE = Path(__file__).resolve().parent
#: in a wheel they are inside the package, in a clone (installed or not) beside it
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"

_SUFFIXES = (".yaml", ".py")


def find_config(name: str) -> str:
    """The path of a config: of a file as it is; else of one of this package, named by its path in
    ``configs/`` with or without ``.yaml`` (``"quickstart/faster_rcnn_R_18_FPN_digits_cbn"``).
    In a name with ``{norm}`` any norm's file will do.

    Raises:
        ConfigError: neither is there; names what comes near.
    """
    if "://" in name or _exists(Path(name)):
        return name
    inside = name.removeprefix("./").removeprefix("configs/")
    for suffix in ("", *_SUFFIXES):
        path = CONFIGS / f"{inside}{suffix}"
        if _exists(path):
            return str(path)
    known = {
        path.relative_to(CONFIGS).with_suffix("").as_posix(): None
        for path in sorted(CONFIGS.rglob("*"))
        if path.suffix in _SUFFIXES and path.parent.name != "base"
    }
    wanted = inside.removesuffix(".yaml")
    by_stem = {known_name.rpartition("/")[2]: known_name for known_name in known}
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.7) or [
        by_stem[stem]
        for stem in difflib.get_close_matches(wanted.rpartition("/")[2], by_stem, n=3, cutoff=0.7)
    ]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise ConfigError(
        f"--config-file {name}: no such file, and no config of this package has that name{hint}"
    )


def _exists(path: Path) -> bool:
    if "{norm}" not in path.name:
        return path.is_file()
    return any(path.parent.glob(path.name.replace("{norm}", "*")))
