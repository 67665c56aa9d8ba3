"""Where detectron2 keeps the pretrained weights that configs name, without importing it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from urllib.parse import urlparse

from .findings import NOTE, OK, PROBLEM, Finding

# ResNets of detectron2's catalogue (detectron2/checkpoint/catalog.py).
_CATALOG = {
    "ImageNetPretrained/MSRA/R-50": "ImageNetPretrained/MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": "ImageNetPretrained/MSRA/R-101.pkl",
    "ImageNetPretrained/FAIR/R-50-GN": "ImageNetPretrained/47261647/R-50-GN.pkl",
    "ImageNetPretrained/FAIR/R-101-GN": "ImageNetPretrained/47592356/R-101-GN.pkl",
}
_PICKLE_STOP = b"."


def weights_file(spec: str) -> tuple[Path, bool]:
    """The file that a value of ``MODEL.WEIGHTS`` stands for, by the rules of iopath and detectron2,
    and whether it is downloaded to that place. A name of the catalogue that is not known here
    counts as a plain file."""
    scheme, _, rest = spec.partition("://")
    if scheme == "detectron2" and rest:
        url = f"detectron2/{rest}"
    elif scheme == "catalog" and rest in _CATALOG:
        url = f"detectron/{_CATALOG[rest]}"
    elif scheme in ("http", "https") and rest:
        url = urlparse(spec).path.lstrip("/")
    else:
        return Path(spec), False
    return Path(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser() / url, True


def check_weights_file(spec: str) -> Finding:
    """Whether the file that ``MODEL.WEIGHTS`` names is where training looks for it; ok if it is
    there and whole, a note if it has to be downloaded."""
    path, remote = weights_file(spec)
    if _is_whole(path):
        return Finding(OK, f"{spec}: '{path}'")
    if path.exists():
        text = f"'{path}' is cut off: delete it, or copy it there again"
    elif not remote:
        text = f"there is no file '{path}': MODEL.WEIGHTS names it"
    else:
        text = (
            f"not there yet, the first run downloads it to '{path}'; for a machine without network"
            " copy it there"
        )
        return Finding(NOTE, f"{spec}: {text}")
    return Finding(PROBLEM, f"{spec}: {text}")


def _is_whole(path: Path) -> bool:
    """Whether a file is there and its end as well. It is not unpickled, which would run what is in
    it."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            return zipfile.is_zipfile(path)
        if path.suffix != ".pkl":
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == _PICKLE_STOP
