"""Where detectron2 keeps the pretrained weights that configs name, without importing it."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from fvcore.common.config import CfgNode

from .findings import NOTE, OK, PROBLEM, Finding

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
        remote: it is downloaded; False for a plain file name.
        num_configs: how many configs name it.
    """

    spec: str
    path: Path
    remote: bool
    num_configs: int = 1

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

    def check(self, *, offline: bool = False, needed: bool = True) -> Finding:
        """Whether it is where training looks for it.

        Args:
            offline: nothing can be downloaded: a missing file is a problem.
            needed: so is one that is nowhere to be downloaded.
        """
        of = f" (of {self.num_configs} configs)" if self.num_configs > 1 else ""
        if self.is_whole():
            level, text = OK, f"'{self.path}'"
        elif self.path.exists():
            level, text = PROBLEM, f"'{self.path}' is cut off: delete it, or copy it there again"
        elif not self.remote:
            level = PROBLEM if needed else NOTE
            text = f"there is no file '{self.path}': MODEL.WEIGHTS names it"
        else:
            level = PROBLEM if offline else NOTE
            text = (
                f"not there yet, the first run downloads it to '{self.path}'; for a machine without"
                " network copy it there"
            )
        return Finding(level, f"{self.spec}{of}: {text}")


def pretrained_files(configs: Iterable[str | os.PathLike]) -> list[PretrainedFile]:
    """
    The files that ``MODEL.WEIGHTS`` of YAML configs (with their ``_BASE_``) name, each once.

    Configs that name none train from scratch. A name of the catalogue that is not known here counts
    as a plain file.
    """
    loaded = (CfgNode.load_yaml_with_base(str(one), allow_unsafe=False) for one in configs)
    specs = Counter(cfg.get("MODEL", {}).get("WEIGHTS", "") for cfg in loaded)
    return [pretrained_file(spec, number) for spec, number in specs.items() if spec]


def pretrained_file(spec: str, num_configs: int = 1) -> PretrainedFile:
    """The file that a value of ``MODEL.WEIGHTS`` stands for, by the rules of iopath and
    detectron2."""
    scheme, _, rest = spec.partition("://")
    if scheme == "detectron2" and rest:
        url = f"detectron2/{rest}"
    elif scheme == "catalog" and rest in _CATALOG:
        url = f"detectron/{_CATALOG[rest]}"
    elif scheme in ("http", "https") and rest:
        url = urlparse(spec).path.lstrip("/")
    else:
        return PretrainedFile(spec, Path(spec), remote=False, num_configs=num_configs)
    cache = Path(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
    return PretrainedFile(spec, cache / url, remote=True, num_configs=num_configs)
