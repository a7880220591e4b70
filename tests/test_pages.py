"""What README and the pages say beside code: links lead somewhere, records are there, README stays short."""

import json
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from pages import PAGES, PATHS, ROOT, sections

from dorac.bench import options
from dorac.bench.__main__ import SUBCOMMANDS
from dorac.demo import options as demo_options

RESULTS = ROOT / "dorac" / "bench" / "results"


def prose(text: str) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```\n", "", text, flags=re.DOTALL | re.MULTILINE)


def anchor(heading: str) -> str:
    """GitHub's, of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    return {anchor(heading) for heading, _ in sections(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = prose(path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, part = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT / "dorac") or target == ROOT / "README.md", f"{link} does not ship"
        assert not part or part in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\(dorac/docs/([\w.]+)", PAGES["README.md"]))
    assert linked == set(PAGES) - {"README.md"}


def test_records_are_there_and_each_is_named():
    """A figure names its record: every name is a file's, and no record is kept that no page speaks of."""
    named = {name for text in PAGES.values() for name in re.findall(r"`([\w-]+\.json)`", text)}
    named -= {"adapter_config.json"}  # PEFT's
    kept = {path.name for path in RESULTS.iterdir()}
    assert named == kept
    for name in kept:
        record = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        assert all(record[key] for key in ("commit", "device", "records")), name


def test_names_of_code_are_there():
    """Files of the package, and what is written as ``dorac.name``, are where the pages say."""
    text = "\n".join(map(prose, PAGES.values()))
    files = set(re.findall(r"`(dorac/[\w/]+\.\w+)`", text))
    assert len(files) > 5
    assert all((ROOT / file).is_file() for file in files), files
    names = set(re.findall(r"`(?:with |help\()?(dorac(?:\.[A-Za-z]\w*)+)", text))
    assert len(names) > 25
    for name in names:
        pkgutil.resolve_name(name)


def commands(module: str) -> list[list[str]]:
    """The arguments of every ``python -m module ...`` in a span of code, on any page."""
    spans = [" ".join(span.split()) for text in PAGES.values() for span in re.findall(r"`([^`]+)`", prose(text))]
    start = f"python -m {module} "
    return [shlex.split(span.removeprefix(start)) for span in spans if span.startswith(start)]


def test_commands_of_the_benchmark_are_understood():
    given = [arguments for arguments in commands("dorac.bench") if arguments[0] not in ("picture", "--help")]
    assert len(given) > 8
    parser = options._parser(SUBCOMMANDS)
    for arguments in given:
        parser.parse_args(arguments)


def test_options_of_the_demo_are_there():
    known = {option for action in demo_options._parser()._actions for option in action.option_strings}
    text = dict(sections(PAGES["developing.md"]))["The demo"] + dict(sections(PAGES["README.md"]))["The demo"]
    named = set(re.findall(r"`(--[\w-]+)", text))
    assert len(named) > 8
    assert named <= known


def test_the_readme_is_short():
    """The first screen has the promise, the lines to write, the picture and both commands; the rest is on the pages."""
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 250
    first = text[: text.index("| you want |")]
    assert all(part in first for part in ("dorac.apply_dora", "<picture>", "pip install .", "python -m pytest"))
    assert len(first.splitlines()) <= 45
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", text, re.MULTILINE)  # as .ci/run looks for it
    assert "ruff format --check" in command
