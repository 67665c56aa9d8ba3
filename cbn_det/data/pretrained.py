"""Where detectron2 keeps the pretrained weights that configs name, without importing it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from fvcore.common.config import CfgNode

__all__ = ["PretrainedFile", "pretrained_files"]

# ResNets of detectron2's catalogue (detectron2/checkpoint/catalog.py).
_CATALOG = {
    "ImageNetPretrained/MSRA/R-50": "ImageNetPretrained/MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": "ImageNetPretrained/MSRA/R-101.pkl",
    "ImageNetPretrained/FAIR/R-50-GN": "ImageNetPretrained/47261647/R-50-GN.pkl",
    "ImageNetPretrained/FAIR/R-101-GN": "ImageNetPretrained/47592356/R-101-GN.pkl",
}
_PICKLE_STOP = b"."


@dataclass(frozen=True)
class PretrainedFile:
    """A file that ``MODEL.WEIGHTS`` names.

    Attributes:
        spec: the value of ``MODEL.WEIGHTS``.
        path: where it is, or will be after the first download.
        url: path part of where it is downloaded from; None for a plain file name.
        num_configs: how many configs name it.
    """

    spec: str
    path: Path
    url: str | None
    num_configs: int

    def is_whole(self) -> bool:
        """Whether the file is there and its end as well. It is not unpickled, which would run what
        is in it."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return False
        with open(self.path, "rb") as file:
            if file.read(2) == b"PK":
                return zipfile.is_zipfile(self.path)
            if self.path.suffix != ".pkl":
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == _PICKLE_STOP


def pretrained_files(configs: Iterable[str | os.PathLike]) -> list[PretrainedFile]:
    """
    The files that ``MODEL.WEIGHTS`` of YAML configs (with their ``_BASE_``) name, each once.

    Configs that name none train from scratch. A name of the catalogue that is not known here counts
    as a plain file.
    """
    numbers: dict[str, int] = {}
    for config in configs:
        loaded = CfgNode.load_yaml_with_base(str(config), allow_unsafe=False)
        spec = loaded.get("MODEL", {}).get("WEIGHTS", "")
        if spec:
            numbers[spec] = numbers.get(spec, 0) + 1
    return [pretrained_file(spec, number) for spec, number in numbers.items()]


def pretrained_file(spec: str, num_configs: int = 1) -> PretrainedFile:
    """The file that a value of ``MODEL.WEIGHTS`` stands for."""
    return PretrainedFile(spec, *_locate(spec), num_configs)


def _locate(spec: str) -> tuple[Path, str | None]:
    """The file and the path part of its address, by the rules of iopath and detectron2."""
    cache = Path(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    scheme, _, rest = spec.partition("://")
    if scheme == "detectron2" and rest:
        url = f"detectron2/{rest}"
    elif scheme == "catalog" and rest in _CATALOG:
        url = f"detectron/{_CATALOG[rest]}"
    elif scheme in ("http", "https") and rest:
        url = urlparse(spec).path.lstrip("/")
    else:
        return Path(spec), None
    return cache / url, url
