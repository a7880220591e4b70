"""Figures on the pages are the records': each number of a table is found in a record that the table names."""

import json
import re

import pytest
from pages import PAGES, ROOT, sections

RESULTS = ROOT / "dorac" / "bench" / "results"
ROUNDED = 0.0050001
RELATED = ("peft", "fused", "ratio")  # to PEFT's LoRA, to LoRA in blocks, to LoRA in the same layout


def records(name: str) -> list[dict]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["records"]


def names(text: str) -> list[str]:
    return re.findall(r"`([\w-]+\.json)`", text)


def rows(text: str) -> list[list[str]]:
    """The cells of every row of a table but its head."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| |")]


def of_ours(record: dict) -> bool:
    return "lora" not in record["variant"] and record["variant"] != "base-products"


def triples(page: str) -> list[tuple[str, str, list[str]]]:
    """GPU time / wall time / peak memory: each with the label of its row and the records that it names."""
    found = []
    for heading, text in sections(PAGES[page]):
        for label, *cells in rows(text):
            named = names(" ".join(cells)) or names(text)
            found += [(f"{heading}: {label}", cell, named) for cell in cells if cell.count(" / ") == 2]
    return found


@pytest.mark.parametrize(("page", "least"), [("cost.md", 15), ("qdora.md", 17), ("sharding.md", 6)])
def test_gpu_time_wall_time_and_memory(page, least):
    checked = triples(page)
    assert len(checked) >= least
    for label, cell, named in checked:
        figures = [float(figure) for figure in cell.split(" / ")]
        measured = [
            [record[f"{quantity}_{related}"] for quantity in ("gpu", "wall", "peak")]
            for name in named
            for record in records(name)
            for related in RELATED
            if of_ours(record) and record.get(f"gpu_{related}") is not None
        ]
        close = (max(abs(a - b) for a, b in zip(figures, each, strict=True)) for each in measured)
        assert min(close) < ROUNDED, (label, cell, named)


def ratios(name: str) -> list[tuple[str, str, float]]:
    """Each of ours: its case, its variant, and its GPU time relative to the faster LoRA's in the same case."""
    found = records(name)
    lora = {}
    for record in found:
        if record["variant"].startswith("lora-") and record["variant"].endswith("-compiled"):
            lora[record["case"]] = min(record["gpu_us"], lora.get(record["case"], record["gpu_us"]))
    return [(r["case"], r["variant"], r["gpu_us"] / lora[r["case"]]) for r in found if of_ours(r) and r["case"] in lora]


COLUMNS = (("train", ("once", "cached")), ("train", ("every",)), ("inference", ("once",)), ("inference", ("every",)))


@pytest.mark.parametrize(
    ("page", "heading"), [("cost.md", "Compiled, beside plain LoRA"), ("README.md", "What it costs")]
)
def test_compiled_beside_lora(page, heading):
    """A row's figures, of an H100 / of an H200, are those of its shape and rank, and of the column's phase and norm."""
    text, checked = dict(sections(PAGES[page]))[heading], 0
    for label, *cells in rows(text):
        shape = re.search(r"(\d+) x (\d+)", label)
        rank = re.search(r"r = (\d+)", label).group(1)
        named = names(cells[-1]) or names(text)
        for (phase, variants), cell in zip(COLUMNS, cells, strict=False):
            for card, figure in zip(("h100", "h200"), cell.split(" / "), strict=False):
                if not re.fullmatch(r"\d\.\d\d", figure):
                    continue
                measured = [
                    ratio
                    for name in named
                    if name.startswith(card)
                    for case, variant, ratio in ratios(name)
                    if f"r{rank} " in case
                    and (phase in case or "decode" in name)
                    and any(part in variant for part in variants)
                    and (shape is None or f"{shape[1]}x{shape[2]}" in case)
                ]
                assert min(abs(float(figure) - ratio) for ratio in measured) < ROUNDED, (label, phase, card, figure)
                checked += 1
    assert checked >= 20


def test_the_readme_quotes_the_page():
    quoted = re.findall(r"\d+\.\d+", dict(sections(PAGES["README.md"]))["What it costs"])
    assert len(quoted) > 30
    assert set(quoted) <= set(re.findall(r"\d+\.\d+", PAGES["cost.md"]))
