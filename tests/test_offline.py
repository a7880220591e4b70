"""What the compiler says of the configs that are chosen, and of those for which a card has too little memory."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton

from dorac.kernels.configs import (
    ColumnConfig,
    GateBackwardConfig,
    GateConfig,
    LoraBConfig,
    MixedConfig,
    MlpConfig,
    NormConfig,
    ProductConfig,
    SegmentConfig,
    StackNormConfig,
    TileConfig,
    fits,
)
from dorac.kernels.target import CARDS

HALF, FULL = torch.bfloat16, torch.float32
KIB = 1024
RUN_KERNELS = [name for name in CARDS if name != "sm_75"]
TAKEN = (  # bytes that Triton 3.6 to 3.9 made of a config at most, on both sides of what the card has
    ("gfx942", NormConfig(128, 64, 128, 4, 8, 2, registers=True), (384, HALF), 64 * KIB),
    ("gfx942", NormConfig(128, 64, 128, 4, 8, 3, registers=True), (256, HALF), 80 * KIB),
    ("gfx942", StackNormConfig(64, 128, 16, 4, 1, 8, 3), (HALF,), 48 * KIB),
    ("gfx942", TileConfig(128, 128, 64, 4, 3, descriptors=True), (HALF, HALF), 64 * KIB),
    ("gfx942", TileConfig(64, 128, 64, 8, 4, rows=512), (HALF, HALF), 40 * KIB),
    ("gfx942", ColumnConfig(32, 128, 256, 4, 4), (FULL,), 2 * KIB),
    ("gfx942", LoraBConfig(32, 128, 1024, 8, 3, 128, 3), (), 56 * KIB),
    ("gfx942", LoraBConfig(32, 64, 1024, 8, 4, 128, 3), (), 76 * KIB),
    ("gfx942", MlpConfig(16, 128, 64, 4, 4, 64), (), 16 * KIB),
    ("gfx942", SegmentConfig(32, 128, 1024, 8, 4, 128), (HALF, HALF), 48 * KIB),
    ("gfx942", ProductConfig(64, 128, 64, 1, 4, 3), (HALF, HALF), 66_048),
    ("gfx942", ProductConfig(64, 64, 64, 1, 4, 4), (HALF, FULL), 32 * KIB),
    ("gfx942", MixedConfig("long", 64, 128, 64, 1, 4, 3, 128, 64, 8, up_t=64, rows=256), (HALF, HALF), 64 * KIB),
    ("sm_86", NormConfig(128, 64, 128, 4, 8, 3, registers=True), (128, HALF), 97 * KIB),
    ("sm_86", NormConfig(128, 64, 128, 4, 8, 3, registers=True), (256, HALF), 96 * KIB),
    ("sm_86", NormConfig(128, 64, 128, 4, 8, 2, registers=True), (384, HALF), 128 * KIB),
    ("sm_86", NormConfig(128, 64, 128, 4, 8, 3, registers=True), (256, HALF, 1), 96 * KIB),
    ("sm_86", TileConfig(64, 128, 64, 8, 4, rows=512), (HALF, HALF), 104 * KIB),
    ("sm_120", TileConfig(64, 128, 64, 8, 4, rows=512), (HALF, HALF), 96 * KIB),
    ("sm_86", LoraBConfig(32, 128, 1024, 8, 3, 128, 3), (), 92 * KIB),
    ("sm_86", LoraBConfig(32, 64, 1024, 8, 4, 128, 3), (), 104 * KIB),
    ("sm_86", ProductConfig(64, 128, 64, 1, 4, 4), (HALF, HALF), 101_888),  # with g and columns of lora_B in one piece
    ("sm_86", ProductConfig(32, 32, 32, 1, 4, 3), (FULL, FULL), 20_992),
    ("sm_86", GateConfig(16, 128, 64, 4, 2, rows=64), (HALF,), 40 * KIB),
    ("sm_86", GateBackwardConfig(16, 64, 1024, 4, 3, 64), (HALF,), 16 * KIB),
    ("sm_90", TileConfig(32, 64, 16, 4, 2), (FULL, FULL), 12 * KIB),
    ("sm_90", StackNormConfig(64, 128, 64, 4, 1, 8, 3), (HALF,), 262_656),
    ("sm_100", NormConfig(128, 64, 128, 4, 8, 3, registers=True), (384, HALF), 278_576),
)


@pytest.mark.parametrize(("name", "config", "of", "taken"), TAKEN)
def test_bounds_hold_and_refuse_only_what_does_not_fit(name, config, of, taken):
    card = CARDS[name]
    assert taken <= config.shared_memory(card, *of)
    assert fits(config, card, *of) == (taken <= card.shared_memory)


COMPILE = """
import dataclasses, json, sys, warnings
warnings.simplefilter("ignore")
from dorac.bench import offline
from dorac.kernels import configs
from dorac.kernels.target import CARDS

for name, chosen_for, kernels, ranks, edges, only in json.loads(sys.argv[1]):
    card, choose = CARDS[name], offline.refused if chosen_for == "refused" else offline.cells
    for cell in choose(CARDS.get(chosen_for, card), kernels, ranks, edges):
        if only is None or cell.case == only:
            usage = offline.compile_launch(cell.launch, cell.arguments, card)
            fits = cell.config is None or configs.fits(cell.config, card, *cell.of)
            config = str(cell.config)
            cell = name, chosen_for, cell.kernel, cell.case, config, cell.bound(card), fits, *dataclasses.astuple(usage)
            print(json.dumps(cell), flush=True)
"""


class Compiled(NamedTuple):
    name: str
    chosen_for: str
    kernel: str
    case: str
    config: str
    bound: int | None
    fits: bool
    shared: int
    registers: int
    spills: int


def run_compiler(script, cache, *arguments):
    """What the script prints, in a process where kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def compiled(cells, cache):
    """What the compiler says of these cells."""
    printed = run_compiler(COMPILE, cache, json.dumps(cells))
    return [Compiled(*json.loads(line)) for line in printed.splitlines()]


def check(cell, spills=0):
    """Within its bound, that within the card's, and no more spilled."""
    limit = CARDS[cell.name].shared_memory
    assert cell.fits, cell
    assert cell.shared <= (limit if cell.bound is None else cell.bound) <= limit, cell
    assert 0 < cell.registers <= (255 if CARDS[cell.name].backend == "cuda" else 512), cell
    assert cell.spills <= spills, cell


def check_refused(cell):
    """More than the card has, and no more than the bound."""
    assert not cell.fits, cell
    assert CARDS[cell.name].shared_memory < cell.shared <= cell.bound, cell


# Bytes: on the H100 these were the fastest all the same.
SPILLS = {("sm_90", "even"): 264, ("sm_90", "uneven"): 264, "even": 16, "uneven": 48, "odd": 4096}
SAMPLE = (
    ("sm_80", "lora-b-backward", 384),
    ("sm_86", "norm", 384),
    ("sm_100", "norm", 384),
    ("sm_90", "stack-norm", 64),
    ("sm_120", "mlp-backward", 64),
    ("gfx942", "norm", 384),
    ("sm_86", "segment-backward", 64),
    ("gfx942", "segment-product", 128),
    ("sm_90", "segment-gate", 16),
    ("sm_120", "segment-gate-backward", 64),
    ("gfx942", "mixed", 64),
)
REFUSED = (  # of which card's choosers, or what they would take first
    ("sm_86", "sm_90", "norm"),
    ("sm_86", "refused", "lora-b-backward"),
    ("gfx942", "sm_90", "norm"),
    ("gfx942", "refused", "lora-b-backward"),
)


def test_the_compiler_agrees(tmp_path):
    """A sample of the two matrices below."""
    of_kernel = {
        "segment-backward": "bf16/fp32 m",
        "segment-product": "bf16/bf16 g",
        "segment-gate": "bf16/bf16 interleaved",
        "segment-gate-backward": "bf16/fp32 halves",
        "mixed": "8x512 bf16/bf16 down",
    }
    cells = [
        (name, name, [kernel], [rank], ["even"], f"{of_kernel.get(kernel, 'bf16')} r{rank} even")
        for name, kernel, rank in SAMPLE
    ]
    cells += [(name, chosen_for, [kernel], [384], ["even"], "bf16 r384 even") for name, chosen_for, kernel in REFUSED]
    found = compiled(cells, tmp_path)
    assert [(cell.name, cell.kernel) for cell in found] == [
        *((name, kernel) for name, kernel, _ in SAMPLE),
        *((name, kernel) for name, _, kernel in REFUSED),
    ]
    for cell in found[: len(SAMPLE)]:
        check(cell, spills=SPILLS["even"])
        if cell.kernel == "norm":
            assert cell.bound <= 4 / 3 * cell.shared + 12_288, cell
    for cell in found[len(SAMPLE) :]:
        check_refused(cell)


@pytest.mark.full
@pytest.mark.parametrize("edge", ["even", "uneven", "odd"])
@pytest.mark.parametrize("name", RUN_KERNELS)
def test_every_kernel_compiled_for_every_card(name, edge, tmp_path, capsys):
    """Rows that do not end at multiples of 16 may spill, as on the H100: each number is loaded alone."""
    found = compiled([(name, name, None, [1, 16, 64, 128, 256, 384, 512], [edge], None)], tmp_path)
    with capsys.disabled():
        print(f"\n{name}, {edge}: KiB of {CARDS[name].shared_memory / 1024:.0f}, registers, spills")
        for cell in found:
            of_bound = "" if cell.bound is None else f"(at most {cell.bound / 1024:.0f})"
            print(
                f"  {cell.kernel:16} {cell.case:28} {cell.shared / 1024:6.1f} {of_bound:14} {cell.registers:4}"
                f" {cell.spills:5}"
            )
    for cell in found:
        check(cell, spills=SPILLS.get((name, edge), SPILLS.get(edge, 0)))


SUMS = """
import re, warnings
warnings.simplefilter("ignore")
from dorac.bench import offline, offline_compile
from dorac.kernels.target import CARDS

for cell in offline.cells(CARDS["sm_90"], ["mixed"], [16], ["odd"]):
    if cell.case.startswith("1x1") and "up" in cell.case:
        ptx = offline_compile.compile_kernel(cell.launch, cell.arguments, CARDS["sm_90"]).asm["ptx"]
        brought = re.findall(r"shfl\\.sync\\.bfly\\.b32\\s+(%r\\d+)", ptx)
        contracted = re.findall(r"fma\\.rn\\.f32\\s+%r\\d+, %r\\d+, %r\\d+, (%r\\d+);", ptx)
        print(len(brought), len(set(brought) & set(contracted)))
"""


def test_threads_of_one_sum_agree(tmp_path):
    """They all write it to shared memory: one bit between them is a race. A thread with one product to add to another
    thread's must round it first, as that one did."""
    counts = [line.split() for line in run_compiler(SUMS, tmp_path).splitlines()]
    assert len(counts) == 3  # dtypes
    for brought, contracted in counts:
        assert int(brought) > 0
        assert contracted == "0"


VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
NEWER = "sm_100", "norm"  # what refuses them is Triton 3.6 to 3.8: 3.9 makes 224 KiB where these make 272


@pytest.mark.full
@pytest.mark.parametrize("name", RUN_KERNELS)
def test_what_choosers_would_take_first_would_not_launch(name, tmp_path, capsys):
    """Of rows at multiples of 16, as every config may be launched on; others are read with fewer copies ahead."""
    found = compiled([(name, "refused", None, [1, 16, 64, 128, 256, 384, 512], ["even"], None)], tmp_path)
    with capsys.disabled():
        for cell in found:
            print(f"\n{name} refuses {cell.kernel} {cell.case} {cell.config}: {cell.shared / KIB:.1f} KiB", end="")
    for cell in found:
        if VERSION < (3, 9) or (name, cell.kernel.removeprefix("packed-")) != NEWER:
            check_refused(cell)
