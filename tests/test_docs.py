"""What README and docs have a reader type: Python is run, tools parse their commands."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from snippets import REPOSITORY, Snippet, pages, snippets

from cbn_det.norms import spec

ALL = snippets()
PYTHON = [one for one in ALL if one.language == "python" and one.kind != "skip"]
COMMANDS = [one for one in ALL if one.language == "bash" and one.kind != "skip"]
YAML = [one for one in ALL if one.language == "yaml"]
NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
# what a shell knows by itself
SHELL = {"cd", "export", "mkdir", "git", "source"}
SKIPPED = 1


def ids(found: list[Snippet]) -> list[str]:
    return [f"{one.page}:{one.line}" for one in found]


def of_pages(found: list[Snippet]) -> list[str]:
    return list(dict.fromkeys(one.page for one in found))


@pytest.fixture(autouse=True)
def _own_table_of_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that registers a norm does so for itself."""
    monkeypatch.setattr(spec, "_NORMS", dict(spec._NORMS))


def run_page(page: str, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """The blocks of a page one after the other, in one namespace, as a reader would."""
    names: dict[str, Any] = {"__name__": "__main__", "tmp": tmp_path}
    for one in (one for one in PYTHON if one.page == page and one.kind in kinds):
        for code in (one.setup, "\n" * (one.line - 1) + one.code, one.then):
            exec(compile(code, str(REPOSITORY / page), "exec"), names)


@pytest.mark.parametrize("page", of_pages([one for one in PYTHON if one.kind == ""]))
def test_python_of_a_page_runs(page: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(REPOSITORY)
    run_page(page, tmp_path, ("",))
    outputs = [one.code for one in PYTHON if one.page == page and one.kind == ""]
    printed = capsys.readouterr().out
    for line in re.findall(r"^print\(.*\n# (.*)$", "\n".join(outputs), re.MULTILINE):
        assert line in printed, f"{page} promises another output"


@pytest.mark.detectron2
@pytest.mark.parametrize("page", of_pages([one for one in PYTHON if one.kind == "detectron2"]))
def test_python_of_a_page_runs_with_detectron2(page: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    try:
        run_page(page, tmp_path, ("detectron2",))
    finally:
        import cbn_det

        cbn_det.unregister()


class Parsed(Exception):
    """Carries what a tool's own parser made of a command."""


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the parser of the program makes of its arguments; nothing of it runs.

    Raises:
        SystemExit: the parser refuses them, or there is no such command.
    """

    def stopping(name: str) -> Any:
        parse = getattr(argparse.ArgumentParser, name)

        def stop(self: argparse.ArgumentParser, *args: Any, **rest: Any) -> None:
            raise Parsed(parse(self, *args, **rest))

        return stop

    with monkeypatch.context() as patch:
        patch.chdir(REPOSITORY)
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stopping(name))
        patch.setattr(sys, "argv", list(words))
        patch.setattr(sys, "path", [str(Path(words[0]).parent), *sys.path])
        try:
            if words[0] == "cbn-det":
                runpy.run_module("cbn_det", run_name="__main__")
            else:
                runpy.run_path(words[0], run_name="__main__")
        except Parsed as found:
            return found.args[0]
    raise AssertionError(f"{words[0]} read no arguments")


def program(words: list[str]) -> list[str]:
    """A command from its Python file on, or one of `cbn-det`; empty where it is neither."""
    if words[0] == "cbn-det":
        return words
    files = [place for place, word in enumerate(words) if word.endswith(".py")]
    starts = words[0] in ("python", "torchrun", "docker") and files
    return words[files[0] :] if starts else []


def calls(found: list[Snippet]) -> list[tuple[Snippet, list[str]]]:
    return [(one, words) for one in found for line in one.commands() if (words := program(line))]


def check_other(words: list[str]) -> None:
    """A command that is no Python program. What would install something or run for hours is looked
    at, not run.

    Raises:
        AssertionError: nobody knows this command, or what it is about does not exist.
    """
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=REPOSITORY, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        extras = runpy.run_path(str(REPOSITORY / "setup.py"))["EXTRAS"]
        for names in re.findall(r"^\.\[([\w,]+)\]$", "\n".join(words), re.MULTILINE):
            assert set(names.split(",")) <= set(extras), words
    elif words[:2] == ["python", "-m"]:  # one of ours without flags says what it takes
        asked = [sys.executable, *words[1:3]]
        said = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True).stderr
        takes = ["usage:", *words[:3]]
        assert said.split()[: len(takes)] == takes and len(said.split()) == 1 + len(words), said
    elif words[:2] == ["docker", "compose"]:
        assert (REPOSITORY / words[words.index("-f") + 1]).is_file(), words
    else:
        assert words[0] in SHELL, f"how is this tested: {shlex.join(words)}"


def with_marks(found: list[Snippet]) -> list[Any]:
    needs = {"detectron2": [pytest.mark.detectron2]}
    return [pytest.param(one, marks=needs.get(one.kind, [])) for one in found]


@pytest.mark.parametrize("one", with_marks(COMMANDS), ids=ids(COMMANDS))
def test_commands_are_what_the_tools_take(one: Snippet, monkeypatch, capsys) -> None:
    for words in one.commands():
        call = program(words)
        if not call:
            check_other(words)
        elif call[-1] == "--help":
            with pytest.raises(SystemExit) as end:
                parsed(call, monkeypatch)
            assert end.value.code == 0
        else:
            args = parsed(call, monkeypatch)
            config = str(getattr(args, "config_file", None) or "")
            if config and not config.startswith("output/"):
                own = any(f"# {config}\n" in other.code for other in YAML if other.page == one.page)
                path = config.replace("{norm}", "*")
                places = (path, f"configs/{path}", f"configs/{path}.yaml")
                assert own or any(list(REPOSITORY.glob(place)) for place in places), config


def overrides(args: argparse.Namespace) -> list[str]:
    """The KEY VALUE words of a command, of whichever tool."""
    return list(getattr(args, "opts", None) or [])


@pytest.mark.detectron2
def test_config_keys_in_commands_exist(monkeypatch) -> None:
    from detectron2.config import get_cfg

    keys = set()
    for _, words in calls(COMMANDS):
        if "--help" not in words and "lazyconfig" not in words[0]:
            found = overrides(parsed(words, monkeypatch))
            get_cfg().merge_from_list(found)
            keys |= set(found[::2])
    assert len(keys) > 10


@pytest.mark.parametrize("one", YAML, ids=ids(YAML))
def test_a_config_in_the_docs_is_one(one: Snippet, tmp_path) -> None:
    from cbn_det.standalone.config import read_config

    path = tmp_path / "my.yaml"
    path.write_text(one.code.replace("_BASE_: ", f"_BASE_: {REPOSITORY}/"))
    assert read_config(path).MODEL.ROI_HEADS.NUM_CLASSES == 3


@pytest.mark.detectron2
def test_the_quick_start_runs(tmp_path, source_env) -> None:
    """The commands marked to be run, in the order of the pages, on each other's files."""
    marked = [one for one in COMMANDS if one.kind == "run"]
    order = sorted(marked, key=lambda one: one.page != "docs/quickstart.md")
    assert order
    for one in order:
        for words in one.commands():
            words = [*words, *shlex.split(one.rest)]
            words = [re.sub(r"^output/", f"{tmp_path}/", word) for word in words]
            program_of = {"cbn-det": ["-m", "cbn_det"]}.get(words[0], [])
            done = subprocess.run(
                [sys.executable, *program_of, *words[1:]],
                cwd=REPOSITORY,
                env=source_env,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{one.page}: {done.stdout}{done.stderr}"
    assert (tmp_path / "first" / "result.json").is_file()
    assert (tmp_path / "deployed" / "model.pth").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path: Path, monkeypatch) -> None:
    """Its code cells, one after the other; they print what stands in it, up to numbers."""
    monkeypatch.chdir(path.parent)
    cells = json.loads(path.read_text("utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            source = "".join(cell["source"])
            exec(compile(source, f"{path.name}, code cell {number}", "exec"), names)
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        found, expected = (re.sub(r"\d+", "0", text) for text in (printed.getvalue(), shown))
        assert found == expected, number


def test_the_api_page_has_every_norm() -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text("utf-8")
    classes = [spec.norm_class(name) for name in spec.known_norms()]
    ours = [cls for cls in classes if cls.__module__.startswith("cbn_det.")]
    assert len(ours) >= 9
    assert not [c for c in ours if f"::: {c.__module__}.{c.__name__}\n" not in page]


def test_what_is_skipped_is_counted_and_says_why() -> None:
    skipped = [one for one in ALL if one.kind == "skip"]
    assert len(skipped) == SKIPPED, ids(skipped)
    assert all(one.rest for one in skipped)
    assert {one.kind for one in ALL} <= {"", "skip", "detectron2", "run"}
    counts = Counter(one.language for one in ALL)
    assert set(counts) <= {"python", "bash", "yaml", "text"}, "a language that no test knows"
    markers = sum(path.read_text("utf-8").count("<!-- test:") for path in pages())
    assert markers == sum(one.marker != "" for one in ALL), "a comment that no block follows"
    for name in ("setup", "then"):
        count = sum(path.read_text("utf-8").count(f"<!-- {name}\n") for path in pages())
        assert count == sum(getattr(one, name) != "" for one in ALL), f"{name} without a block"


def test_tables_are_those_of_the_csv_files() -> None:
    tables = runpy.run_path(str(REPOSITORY / "docs" / "tables.py"))
    marked = 0
    for path in tables["pages"]():
        text = path.read_text("utf-8")
        marked += len(tables["MARKED"].findall(text))
        assert tables["written"](text) == text, f"{path.name}: run python docs/tables.py"
    assert marked >= 16


def test_the_picture_is_drawn_from_the_table(tmp_path) -> None:
    tables = runpy.run_path(str(REPOSITORY / "docs" / "tables.py"))
    tables["draw"].__globals__["PICTURE"] = tmp_path / "images" / "bars.png"
    written = tables["draw"]().read_bytes()
    assert written.startswith(b"\x89PNG") and len(written) < 60_000
    short = tables["batch_size_short"]()
    assert len(short) <= 8
    assert {"norm": "CBN", "ranks x images": "4 x 2", "AP": "44.5"}.items() <= short[5].items()


def test_readme_is_one_page() -> None:
    lines = (REPOSITORY / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", "\n".join(lines)):
        assert (REPOSITORY / picture).stat().st_size < 60_000


def test_links_of_the_readme_exist() -> None:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 20
    for link in links:
        path, _, anchor = link.partition("#")
        assert (REPOSITORY / path).exists(), link
        titles = (
            re.findall(r"^#+ (.*)$", (REPOSITORY / path).read_text("utf-8"), re.MULTILINE)
            if anchor
            else []
        )
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in slugs, link
