"""The families that people adapt, in the drop-in and in ``apply_dora``, beside stock PEFT and beside the textbook.

``pytest tests/test_families.py -m "" -s`` prints the table.
"""

import inspect

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import families
from families import FAMILIES, STEPS, Applied, DropIn, Stock
from transformers.core_model_loading import WeightRenaming

from dorac.apply import dora_layers

EXPERTS = "mixtral", "gpt_oss"  # whose adapters PEFT reads by transformers' rules for names
RENAMES_FOR_PEFT = "loading_info" in inspect.signature(WeightRenaming.convert).parameters
CI = {("whisper", torch.float64), ("gpt_oss", torch.float64)}
CASES = [
    pytest.param(name, dtype, marks=() if (name, dtype) in CI else pytest.mark.full)
    for name in FAMILIES
    for dtype in (torch.float32, torch.float64)
]


@pytest.fixture(scope="module")
def table():
    rows = [("family", "dtype", "stock PEFT", "drop-in", "apply_dora", "textbook", "difference", "PEFT lacks")]
    yield rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print(" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def started(way, family, dtype, directory, targets=None):
    """Writes an adapter off its start."""
    with way.enabled():
        model = families.off_start(way.begin(family, family.model(dtype), targets))
        way.save(family, model, directory)


def kept(way, family, dtype, model, directory):
    """Saved, read again with the same output, and merged; the merged output and the adapter's."""
    y = families.outputs(family, model, dtype)
    way.save(family, model, directory)
    again = way.read(family, family.model(dtype), directory)
    assert torch.equal(families.outputs(family, again, dtype), y)
    base = families.outputs(family, family.model(dtype), dtype)
    assert (y - base).abs().max() > 1e-3 * y.abs().max()
    return families.outputs(family, way.merge(family, again), dtype), y


def assert_near(actual, expected, bound):
    error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= bound, f"{error} > {bound}"


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_family(name, dtype, tmp_path, table):
    family = FAMILIES[name]
    if family.diffusers:
        pytest.importorskip("diffusers")
    if name in EXPERTS and not RENAMES_FOR_PEFT:
        pytest.skip("PEFT 0.21 gives transformers' WeightRenaming an argument that 5.0 does not have")
    usual = tuple(target for target in family.targets if target not in family.beyond_peft)
    losses, layers = {}, {}

    # PEFT's, of what it adapts
    started(Stock(), family, dtype, tmp_path / "stock", usual)
    if family.beyond_peft:
        with pytest.raises((ValueError, AttributeError), match=f"(?s){family.peft_says}"):
            families.train(family, Stock().begin(family, family.model(dtype)), dtype, tmp_path / "out")
    lacks = ", ".join(family.beyond_peft)
    for way in (Stock(), DropIn()):
        kind = type(way).__name__
        with way.enabled():
            model = way.read(family, family.model(dtype), tmp_path / "stock")
            losses[kind] = families.train(family, model, dtype, tmp_path / "out")
            if kind == "Stock":
                expected = families.outputs(family, model, dtype)
            else:
                layers[kind] = sum(hasattr(m, "lora_magnitude_vector") for m in model.modules())
                merged, y = kept(way, family, dtype, model, tmp_path / kind)
                assert_near(merged, y, families.tolerance(layers[kind], dtype))
                assert_near(y, expected, families.tolerance(layers[kind], dtype, STEPS))

    # apply_dora's, of the same, or of all
    way, start = Applied(), tmp_path / "stock"
    if family.beyond_peft or family.diffusers:  # whose adapter files have no config
        started(way, family, dtype, start := tmp_path / "start")
    model = way.read(family, family.model(dtype), start)
    layers["Applied"] = len(dora_layers(model))
    losses["Applied"] = families.train(family, model, dtype, tmp_path / "out")
    merged, y = kept(way, family, dtype, model, tmp_path / "Applied")
    assert_near(merged, y, families.tolerance(layers["Applied"], dtype))
    twin = families.textbook(way.read(family, family.model(dtype), start))
    losses["textbook"] = families.train(family, twin, dtype, tmp_path / "out")
    assert_near(families.outputs(family, twin, dtype), y, families.tolerance(layers["Applied"], dtype, STEPS))

    differences = []
    for ours, theirs in (("DropIn", "Stock"), ("Applied", "textbook")):
        mine, other = (torch.tensor(losses[kind], dtype=torch.float64) for kind in (ours, theirs))
        differences.append(((mine - other) / other).abs().max().item())
        assert differences[-1] <= families.tolerance(layers[ours], dtype, STEPS)
        assert len(set(losses[ours])) == STEPS
    first_and_last = [(losses[kind][0], losses[kind][-1]) for kind in ("Stock", "DropIn", "Applied", "textbook")]
    columns = [f"{first:.6f} .. {last:.6f}" for first, last in first_and_last]
    table.append((name, str(dtype).removeprefix("torch."), *columns, f"{max(differences):.1e}", lacks))
