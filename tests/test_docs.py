"""README and docs: links lead somewhere, the file map is complete, every file of results has its place in results.md."""

from __future__ import annotations

import ast
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from mpo_exporter.cli.main import app as export_app
from mpo_runtime.cli.main import app
from tests import reference

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "formats" / "SPEC.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGES = [
    ROOT / "formats" / "mpo_formats",
    ROOT / "mpo_runtime",
    ROOT / "exporter" / "mpo_exporter",
    ROOT / "server" / "mpo_vllm",
    ROOT / "server" / "mpo_server",
]
# These tell what was true on a day, so files that they name may be gone.
HISTORY = {"log.md", "CHANGELOG.md"}
LONGEST_README = 120


def text_of(path: Path) -> str:
    """A document without its blocks of code, which hold no links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return "\n".join(line for line in text.split("\n") if not line.startswith("    "))


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(path: Path) -> Iterator[str]:
    """The links of a document, within the project, that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            yield link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert list(broken_links(path)) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page, really\n[a](#a-page-really) [b](#b) [c](none.md) [d](https://x.org)\n    [e](code.md)\n")
    assert list(broken_links(page)) == ["#b", "none.md"]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name not in HISTORY], ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"`((?:benchmarks|docs|exporter|formats|mpo_runtime|server|tests)/[\w./-]+)`", text_of(path))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_symbols_that_are_named_exist() -> None:
    named = re.findall(r"`([\w/]+\.py):\s+([\w.]+)`", text_of(ROOT / "docs" / "architecture.md"))
    assert len(named) > 8
    for file, symbol in named:
        sources = [
            path.read_text("utf-8")
            for package in PACKAGES
            for path in package.rglob(Path(file).name)
            if path.as_posix().endswith(f"/{file}")
        ]
        name = symbol.rpartition(".")[2]
        assert any(re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE) for source in sources), (file, symbol)


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_every_option_of_talking_is_told(command: str) -> None:
    page = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    parameters = typer.main.get_command(app).commands[command].params
    options = {name for one in parameters for name in (*one.opts, *one.secondary_opts) if name.startswith("--")}
    assert len(options) > 15
    assert [name for name in sorted(options - {"--help"}) if not re.search(rf"{name}(?![\w-])", page)] == []


def test_the_page_of_commands_is_what_help_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPO_CHI", raising=False)
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python tests/reference.py"
    for name in ("mpo-run bench", "mpo-run eval", "mpo-export export", "mpo-run chat"):
        assert f"## {name}\n" in reference.page()


def commands_of(path: Path) -> list[list[str]]:
    """The commands of mpo-run and mpo-export in a document's blocks of code, as words; what follows a pipe is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        text = line.strip().removeprefix("$ ").removesuffix("\\").strip()
        if not text.startswith(("mpo-run ", "mpo-export ")) or not line.startswith(("    ", "$ ", "mpo-")):
            continue
        words = shlex.split(re.split(r"\s(?:[|>&]|&&)\s|\s#\s", text)[0], comments=True)
        if "…" not in words:
            found.append(words)
    return found


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name not in HISTORY], ids=lambda path: path.name)
def test_every_command_in_a_document_is_understood(path: Path) -> None:
    programs = {"mpo-run": typer.main.get_command(app), "mpo-export": typer.main.get_command(export_app)}
    for program, *words in commands_of(path):
        command = programs[program]
        known = getattr(command, "commands", {})
        if words and words[0] in reference.ELSEWHERE:
            continue
        if words and words[0] in known:
            command, words = known[words[0]], words[1:]
        elif program == "mpo-export":
            command = known["export"]
        # Parses the words and checks their values, without running the command.
        with command.make_context(program, list(words)) as context:
            assert context.params, (program, words)


def test_commands_are_found_in_documents(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run mpo-run x.\n\n    mpo-run chat a.mpo --seed 1   # talks\n    mpo-run list | head\n    make x\n"
    )
    assert commands_of(page) == [["mpo-run", "chat", "a.mpo", "--seed", "1"], ["mpo-run", "list"]]
    assert sum(len(commands_of(path)) for path in DOCUMENTS) > 20


def test_the_readme_is_for_a_stranger() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_README
    results = [line for line in lines if line.startswith("| [")]
    assert len(results) > 8, "every row of the table of results begins with a link"


def file_map(architecture: str) -> list[str]:
    """The paths under "## File map": the items' back-quoted names, in the folder that the heading above them names."""
    section = re.search(r"^## File map\n(.*?)(?=^## |\Z)", architecture, re.MULTILINE | re.DOTALL)
    paths, folder = [], ""
    for line in section[1].splitlines() if section else []:
        if heading := re.match(r"### `([^`]*)`", line):
            folder = heading[1]
            paths.append(folder)
        elif item := re.match(r"- (`.*?) — ", line):
            paths += [folder + name for name in re.findall(r"`([^`]+)`", item[1])]
    return paths


def modules(package: Path) -> list[Path]:
    """The modules of a package; of an `__init__.py` those that hold more than a docstring."""
    found = sorted(package.rglob("*.py"))
    return [path for path in found if path.name != "__init__.py" or len(ast.parse(path.read_text("utf-8")).body) > 1]


def test_the_file_map_is_read_as_written() -> None:
    page = "# x\n## File map\n### `a/` — first\n- `b.py`, `c/` — what `d` does\n### `e/`\n## Next\n- `f` — no\n"
    assert file_map(page) == ["a/", "a/b.py", "a/c/", "e/"]
    assert file_map("# x\n- `a` — b\n") == []


def test_the_file_map_is_complete() -> None:
    listed = file_map((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert sorted({path for path in listed if listed.count(path) > 1}) == []
    mapped = {(ROOT / path).resolve() for path in listed}
    native = [ROOT / "mpo_runtime" / "csrc", *filter(Path.is_dir, (ROOT / "mpo_runtime" / "csrc").iterdir())]
    scripts = sorted((ROOT / "benchmarks").glob("*.py"))
    tests = [path for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"]
    wanted = [*(path for package in PACKAGES for path in modules(package)), *native, *scripts, *tests]
    missing = [str(path.relative_to(ROOT)) for path in wanted if path not in mapped]
    assert missing == [], 'each needs a line in docs/architecture.md under "## File map"'


def sections(text: str) -> dict[str, str]:
    """The sections of a document by their headings, up to the next heading of any level."""
    parts = re.split(r"^#{2,} (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def unbacked(text: str, results: Path) -> list[str]:
    """The sections that have a table but name no file of results that exists."""
    return [
        title
        for title, body in sections(text).items()
        if re.search(r"^\|---", body, re.MULTILINE)
        and not any((results / name).exists() for name in re.findall(r"results/([\w.-]+\.json)\)", body))
    ]


def handwritten(text: str) -> list[str]:
    """The first lines of tables with figures that follow no line `<!-- table: NAME -->`."""
    marked = re.sub(r"^<!-- table: [\w-]+ -->\n\n(?:\|.*\n)*", "", text, flags=re.MULTILINE)
    tables = re.findall(r"(?:^\|.*\n)+", marked, re.MULTILINE)
    return [table.splitlines()[0] for table in tables if re.search(r"\| *[\d.]+[ %]*\|", table)]


def test_every_table_of_results_is_backed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    found = []
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.written(text) == text, "run python benchmarks/tables.py"
        # serving.md says what types of llama.cpp are, which nobody measures
        own = [one for one in handwritten(text) if not one.startswith("| our integers, groups of 32 and more |")]
        assert own == [], "a table of figures follows a line <!-- table: NAME --> (benchmarks/tables.py)"
        found += [name for _, name, _ in tables.MARKER.findall(text)]
    assert sorted(found) == sorted(tables.TABLES)
    assert handwritten("<!-- table: a -->\n\n| x |\n|---|\n| 1 |\n") == []
    assert handwritten("| x |\n|---|\n| 1 |\n") == ["| x |"]
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert unbacked(text, ROOT / "benchmarks" / "results") == []
    made_up = "## A\n\n| x |\n|---|\n| 1 |\n\n## B\n\n| x |\n|---|\n\n[b](results/b.json)\n"
    assert unbacked(made_up, tmp_path) == ["A", "B"]
    (tmp_path / "b.json").write_text("{}")
    assert unbacked(made_up, tmp_path) == ["A"]
    assert (
        tables.written("<!-- table: plans -->\n\n| made | up |\n")
        == "<!-- table: plans -->\n\n" + tables.TABLES["plans"]()
    )


def test_every_file_of_results_has_its_place() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("*.json"))
    assert files and [name for name in files if name not in text] == []


def test_every_file_of_results_has_the_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from parts.results import faults

    files = (ROOT / "benchmarks" / "results").glob("*.json")
    found = {path.name: faults(json.loads(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert faults({"rows": [1]}) != []


def test_the_pictures_are_drawn_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pictures

    def words(path: Path) -> list[str]:
        return ["".join(text.itertext()) for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]

    for name in pictures.FIGURES:
        pictures.draw(name, tmp_path / f"{name}.svg")
        assert words(tmp_path / f"{name}.svg") == words(ROOT / "docs" / f"{name}.svg"), "run benchmarks/pictures.py"
    points = [row["kl_mean"] for row in pictures.rows_of(pictures.SMOLLM2)]
    assert len(points) == 14 and len(pictures.healed_points(pictures.rows_of(pictures.HEALING))) == len(pictures.HEALED)
