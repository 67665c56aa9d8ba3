"""The code blocks of README and docs, and the comments in front of them that say how to test one.

- `<!-- test: skip, REASON -->`: not tested; counted by a test.
- `<!-- test: detectron2 -->`: needs detectron2.
- `<!-- test: run, KEY VALUE ... -->`: a command that is run, with these words appended.
- `<!-- setup ... -->`: Python that runs before the next block and that no reader sees;
  `<!-- then ... -->` runs after the block before it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

_FENCE = re.compile(
    r"(?:<!-- setup\n(?P<setup>.*?)-->\n)?"
    r"(?:<!-- test: (?P<marker>[^\n]*) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    r"(?:\n<!-- then\n(?P<then>.*?)-->)?",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Snippet:
    """One block.

    Attributes:
        page: of the repository, "docs/training.md".
        line: of its first line of code in the page, from 1.
        language: behind the backquotes.
        marker: of its comment, "" where there is none.
        setup, then: the Python that nobody sees, before and after it.
    """

    page: str
    line: int
    language: str
    code: str
    marker: str
    setup: str
    then: str

    @property
    def kind(self) -> str:
        """The marker's first word."""
        return self.marker.partition(",")[0]

    @property
    def rest(self) -> str:
        """What stands behind the marker's comma."""
        return self.marker.partition(", ")[2]

    def commands(self) -> list[list[str]]:
        """The words of each command line of a bash block, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def pages() -> list[Path]:
    """README and every page of docs, with what they include."""
    others = [REPOSITORY / "README.md", REPOSITORY / "docker" / "README.md"]
    return [*others, *sorted((REPOSITORY / "docs").rglob("*.md"))]


def snippets() -> list[Snippet]:
    """All blocks of all pages, in their order."""
    found = []
    for path in pages():
        text = path.read_text("utf-8")
        for match in _FENCE.finditer(text):
            found.append(
                Snippet(
                    path.relative_to(REPOSITORY).as_posix(),
                    text.count("\n", 0, match.start("code")) + 1,
                    match["language"],
                    match["code"],
                    match["marker"] or "",
                    match["setup"] or "",
                    match["then"] or "",
                )
            )
    return found
