"""README's picture: its bars are the records', in both colours, and a command draws it anew."""

import json
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pages import PAGES, sections

from dorac.bench import picture
from dorac.bench.__main__ import main

README = PAGES["README.md"]


def description(path: Path) -> dict:
    """The figures in the metadata of a picture."""
    tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    (element,) = tree.iter("{http://purl.org/dc/elements/1.1/}description")
    return json.loads(element.text)


def written(path: Path) -> list[str]:
    """The texts of a picture."""
    tree = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return ["".join(element.itertext()).strip() for element in tree.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("theme", picture.THEMES)
def test_the_picture_that_ships_has_the_figures_of_the_records(theme):
    path = picture.PICTURES / f"cost-{theme}.svg"
    assert description(path) == picture.figures()
    bars = [
        f"{ratio:.2f}"
        for rows in picture.figures().values()
        for of in rows.values()
        for name, ratio in of.items()
        if not name.startswith(picture.BLOCKS)
    ]
    assert len(bars) > 10
    texts = written(path)
    assert all(texts.count(bar) >= bars.count(bar) for bar in bars)
    assert set(picture.PANELS) <= set(texts)


def test_figures_are_what_was_measured():
    """A ratio is the median over turns; stacks have the times of these, so that it can be taken again."""
    figures = picture.figures()
    for row in picture.PANELS["4 Llama layers, 4096 tokens"]:
        records = json.loads((picture.RESULTS / row.record).read_text(encoding="utf-8"))["records"]
        turns = {
            each["variant"]: each["turns_us"] for each in records if each["case"] == row.case and "turns_us" in each
        }
        for variant in (picture.FUSED, picture.BLOCKS):
            pairs = zip(turns[variant], turns["peft-lora-eager"], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            shown = figures["4 Llama layers, 4096 tokens"][row.label]
            assert shown[f"{variant}, wall time"] == pytest.approx(ratio, abs=0.006)
            assert f"{variant}, GPU time" in shown
    for rows in figures.values():
        for of in rows.values():
            assert any(name.startswith("dorac-") for name in of)


def test_the_readme_shows_it_in_both_colours():
    shown = re.search(r"<picture>.*?</picture>", README, re.DOTALL).group()
    dark, light = re.findall(r'(?:srcset|src)="([^"]+)"', shown)
    assert "prefers-color-scheme: dark" in shown.partition(dark)[0]
    assert (dark, light) == ("dorac/bench/pictures/cost-dark.svg", "dorac/bench/pictures/cost-light.svg")
    assert "(dorac/docs/cost.md#readmes-picture)" in README.partition("</picture>")[2][:400]
    named = dict(sections(PAGES["cost.md"]))["README's picture"]
    for record in {row.record for rows in picture.PANELS.values() for row in rows}:
        assert f"`{record}`" in named, record


def test_the_command_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["picture", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [path.name for path in paths] == ["cost-light.svg", "cost-dark.svg"]
    for path in paths:
        assert description(path) == picture.figures()
        assert sorted(written(path)) == sorted(written(picture.PICTURES / path.name))
    light, dark = (path.read_text(encoding="utf-8") for path in paths)
    assert picture.THEMES["dark"]["text"] in dark
    assert picture.THEMES["dark"]["text"] not in light


def test_what_a_record_gains_is_drawn(tmp_path):
    """Stock DoRA over the stack is drawn as soon as a record has it; nothing stands in for what none has."""
    pytest.importorskip("matplotlib")
    for path in {row.record for rows in picture.PANELS.values() for row in rows}:
        content = json.loads((picture.RESULTS / path).read_text(encoding="utf-8"))
        if path == "h200-fused-r16.json":
            case = "r16 train, autocast, save-outputs"
            content["records"].append({"case": case, "variant": picture.STOCK, "gpu_peft": 1.23, "wall_peft": 1.45})
        (tmp_path / path).write_text(json.dumps(content), encoding="utf-8")
    picture.save(tmp_path / "drawn.svg", "light", tmp_path)
    texts = written(tmp_path / "drawn.svg")
    assert {"1.23", "1.45", "PEFT's DoRA, GPU time"} <= set(texts)
    assert not {"1.23", "1.45"} & set(written(picture.PICTURES / "cost-light.svg"))


def test_bad_input(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert main(["picture", str(tmp_path / "nowhere")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["picture", str(tmp_path), "more"]) == 2
    assert "unrecognized arguments" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["picture", str(tmp_path)]) == 2
    assert 'picture needs matplotlib: pip install "dorac[bench]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
