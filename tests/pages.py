"""README and the pages of dorac/docs, which ship in the package: their texts, sections and Python blocks."""

import re
from pathlib import Path

import dorac

ROOT = Path(dorac.__file__).parents[1]
PATHS = [ROOT / "README.md", *sorted((ROOT / "dorac" / "docs").glob("*.md"))]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS}


def sections(text: str) -> list[tuple[str, str]]:
    """``(heading, what stands under it up to the next heading)``; a comment in a block of code is no heading."""
    found, fenced = [], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        match = None if fenced else re.fullmatch(r"#+ (.*)\n", line)
        if match:
            found.append((match.group(1), ""))
        elif found:
            found[-1] = found[-1][0], found[-1][1] + line
    return found


def blocks(kind: str = "python") -> dict[str, str]:
    """Each block of code by the heading that it stands under, on whatever page, and its number there."""
    found = {}
    for text in PAGES.values():
        for heading, under in sections(text):
            for number, code in enumerate(re.findall(rf"^```{kind}\n(.*?)^```", under, re.DOTALL | re.MULTILINE), 1):
                key = f"{heading}, {number}"
                assert key not in found, f"two pages have a block under {heading!r}"
                found[key] = code
    return found


def recipe(heading: str) -> str:
    """The first Python block under a heading."""
    return blocks()[f"{heading}, 1"]
