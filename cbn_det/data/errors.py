from __future__ import annotations


class DataError(ValueError):
    """The data cannot be trained on. The message names the file, the id and the fix."""
