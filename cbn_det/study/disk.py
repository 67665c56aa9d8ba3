"""Tells a full disk, and a folder that cannot be written to, from other ways to fail."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}
DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
# The last is what torch.save says of it.
FULL_IN_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|inline_container\.cc.*unexpected pos"
)
# Less than a checkpoint of any detector: whatever is said to have failed, this is why.
NEARLY_FULL_BYTES = 20 * 2**20


def advice(error: OSError) -> str:
    """One line: what went wrong and what to do."""
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in FULL:
        return (
            f"the disk is full{place}: free some space (df -h shows how much there is), then run "
            "the same command again; it goes on from here"
        )
    if error.errno in DENIED:
        return (
            f"cannot write{place}: {error.strerror}. Choose another folder with --output, or "
            "change the permissions, then run the same command again"
        )
    return f"{error}. Mend that, then run the same command again; it goes on from here"


def full_disk_note(text: str, folder: Path) -> str | None:
    """The words for a run that failed since the disk was full; None where there is no sign of it.

    Args:
        text: what the run said at its end.
        folder: where it wrote.
    """
    free = shutil.disk_usage(folder).free
    if FULL_IN_WORDS.search(text) or free < NEARLY_FULL_BYTES:
        return f"the disk is full ({free / 2**20:.0f} MB free now): free some space, then run again"
    return None
