"""Roles of our docstrings on the API pages: ``:func:`name``` becomes the name as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:(`+)~?(.+?)\1")


class Roles(griffe.Extension):
    """Rewrites each docstring once it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that griffe finds."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\2`", obj.docstring.value)
