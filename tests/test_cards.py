"""The choice of a launch by the card: what fits, what is known of each card, and the compiler's word on it."""

import dataclasses
import itertools
import json
import types

import pytest
import torch

pytest.importorskip("triton")

from dorac import functional, reference
from dorac.bench import kernel_times, measure, options, stub
from dorac.bench.__main__ import SUBCOMMANDS, main
from dorac.kernels import backward, compose, configs, lora_b, norm, target
from dorac.kernels.configs import (
    ColumnConfig,
    LoraBConfig,
    MlpBackwardConfig,
    MlpConfig,
    NormConfig,
    TileConfig,
    fits,
)
from dorac.kernels.target import CARDS, Target
from dorac.ops import cards, front
from dorac.testing import linear_inputs

H100, B200, A10G = CARDS["sm_90"], CARDS["sm_100"], CARDS["sm_86"]
HALF, FULL = torch.bfloat16, torch.float32
RUN_KERNELS = [name for name in CARDS if name != "sm_75"]
SIZES = (1, 64), (33, 4096), (700, 1000), (4096, 8192), (4096, 14336), (100_000, 150_000)
RANKS = 1, 16, 17, 33, 64, 65, 128, 200, 256, 257, 384, 385, 1000


def test_the_h100s_table():
    """What sweeps found fastest there, whatever other cards take."""
    chosen = [
        *(configs.norm_config(1, 8192, 8192, rank, HALF, H100) for rank in (16, 64, 256, 384, 512)),
        configs.norm_config(1, 4096, 14336, 128, FULL, H100),
        configs.packed_norm_config(1, 8192, 8192, 2, 384, H100),
        configs.packed_norm_config(1, 8192, 8192, 1, 16, H100),
        *(configs.tile_config(4096, 8192, rank, HALF, HALF, H100) for rank in (16, 64, 384)),
        configs.tile_config(4096, 8192, 128, FULL, HALF, H100),
        configs.tile_config(1, 8192, 16, HALF, HALF, H100),
        configs.column_config(4096, 8192, FULL, H100),
        configs.lora_b_config(4096, 8192, 384, H100),
        configs.lora_b_config(4096, 4096, 16, H100),
        *(configs.mlp_config(4096, 14336, rank, True, H100) for rank in (16, 64, 128)),
        *(configs.mlp_backward_config(4096, 14336, rank, H100) for rank in (16, 64, 128)),
    ]
    assert chosen == [
        NormConfig(64, 128, 16, 2, 8, 3),
        NormConfig(64, 128, 64, 2, 4, 3),
        NormConfig(128, 64, 128, 2, 8, 3, registers=True),
        NormConfig(128, 64, 128, 2, 8, 3, registers=True),
        NormConfig(64, 64, 64, 1, 4, 3),
        NormConfig(32, 32, 32, 2, 4, 2),
        NormConfig(128, 32, 128, 2, 8, 2, registers=True),
        NormConfig(64, 64, 16, 4, 4, 3),
        TileConfig(32, 128, 16, 4, 3, rows=256),
        TileConfig(64, 128, 64, 8, 4, rows=512),
        TileConfig(128, 128, 64, 4, 3, descriptors=True),
        TileConfig(64, 128, 32, 4, 2),
        TileConfig(16, 128, 16, 4, 2),
        ColumnConfig(32, 128, 256, 4, 4),
        LoraBConfig(32, 64, 4096, 8, 4, 128, 3),
        LoraBConfig(32, 128, 1024, 4, 4, 16, 1),
        MlpConfig(16, 128, 128, 4, 4, 16),
        MlpConfig(16, 128, 256, 4, 4, 64),
        MlpConfig(16, 128, 64, 4, 3, 0),
        MlpBackwardConfig(16, 128, 2048, 4, 3, 16),
        MlpBackwardConfig(32, 64, 4096, 4, 3, 64),
        MlpBackwardConfig(16, 128, 256, 4, 4, 0),
    ]


def test_a_b200_has_no_room_for_the_h100s_norm_of_large_ranks():
    """Triton 3.6 makes 278 576 bytes of it: the products of these tensor cores take lora_B from shared memory."""
    for rank in (257, 384):
        wanted = configs.norm_config(1, 8192, 8192, rank, HALF, H100)
        assert wanted.shared_memory(B200, rank, HALF) >= 278_576 > B200.shared_memory
        chosen = configs.norm_config(1, 8192, 8192, rank, HALF, B200)
        assert chosen.registers
        assert 213_040 <= chosen.shared_memory(B200, rank, HALF) <= B200.shared_memory


@pytest.mark.parametrize("name", RUN_KERNELS)
def test_what_is_chosen_fits(name):
    assert_choices_fit(CARDS[name])


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_the_least_memory_that_is_enough(name):
    """What why_not asks for at one size is what every size needs."""
    least, enough = 16 * 1024, CARDS[name].shared_memory
    while enough - least > 512:
        middle = (least + enough) // 2
        if configs.why_not(CARDS[name]._replace(shared_memory=middle)) is None:
            enough = middle
        else:
            least = middle
    assert_choices_fit(CARDS[name]._replace(shared_memory=enough, processors=46))


def assert_choices_fit(card):
    for (first, second), rank in itertools.product(SIZES, RANKS):
        for dtype in (HALF, torch.float16, FULL):
            assert fits(configs.norm_config(2, first, second, rank, dtype, card), card, rank, dtype)
            assert fits(configs.column_config(first, second, dtype, card), card, dtype)
        for halves in (1, 2):
            assert fits(configs.packed_norm_config(1, first, second, halves, rank, card), card, rank, HALF, halves)
        for h, base in ((HALF, HALF), (FULL, HALF), (FULL, FULL)):
            config = configs.tile_config(first, second, rank, h, base, card)
            assert fits(config, card, h, base)
            assert card.products_from_shared or not config.descriptors
            assert fits(configs.segment_tile_config(first, 8, second, rank, h, base, card), card, h, base)
            assert fits(configs.segment_product_config(first, 8, second, rank, base, h, card), card, base, h)
            assert fits(configs.segment_backward_config(first, second, rank, base, h, card), card, base, h)
            assert fits(configs.segment_gate_config(first, 8, second, rank, h, card), card, h)
            assert fits(configs.segment_gate_backward_config(first, second, rank, h, card), card, h)
        config = configs.lora_b_config(first, second, min(rank, 384), card)
        strips, columns = -(-first // config.rows), -(-second // config.block_o)
        assert fits(config, card)
        assert strips == 1 or strips * columns <= card.processors
        for training in (False, True):
            assert fits(configs.mlp_config(first, second, rank, training, card), card)
        assert fits(configs.mlp_backward_config(first, second, rank, card), card)
        for dtype in (HALF, FULL):
            assert fits(configs.stack_norm_config(16, first, second, min(rank, 64), dtype, card), card, dtype)
        for h, base, rows in itertools.product((HALF, FULL), (HALF, FULL), ((1, 1), (64, 1), (2000, 1), (8, 512))):
            assert fits(configs.mixed_config(*rows, 16, first, second, rank, h, base, card), card, h, base)


def test_fewer_processors_have_fewer_programs():
    few = H100._replace(processors=46)
    assert configs.lora_b_config(8192, 4096, 16, few).rows > configs.lora_b_config(8192, 4096, 16, H100).rows
    assert configs.mlp_config(512, 14336, 16, True, few).rows > configs.mlp_config(512, 14336, 16, True, H100).rows
    assert (
        configs.norm_config(1, 1024, 8192, 16, HALF, few).splits
        < configs.norm_config(1, 1024, 8192, 16, HALF, H100).splits
    )


def test_more_programs_are_preferred_where_both_fit():
    config = configs.column_config(4096, 8192, FULL, A10G)
    assert fits(config, A10G, FULL, programs=2)
    assert not fits(dataclasses.replace(config, stages=4), A10G, FULL, programs=2)
    assert fits(dataclasses.replace(config, stages=4), A10G, FULL)


def test_why_aten():
    assert configs.why_not(H100) is configs.why_no_packed(H100) is None
    assert "sm_80" in configs.why_not(CARDS["sm_75"])
    assert configs.why_not(None) == "no kernels are wanted"
    small = A10G._replace(shared_memory=32 * 1024)
    assert "bytes of shared memory, sm_86 has 32768" in configs.why_not(small)
    with pytest.raises(configs.DoesNotFitError, match="sm_86 has 32768"):
        configs.lora_b_config(4096, 4096, 384, small)
    for name in RUN_KERNELS:
        assert configs.why_not(CARDS[name]) is None
        assert (configs.why_no_packed(CARDS[name]) is None) == (CARDS[name].backend == "cuda")
    assert "gfx1100" in configs.why_not(CARDS["gfx942"]._replace(capability="gfx1100"))


def card_of(monkeypatch, hip=None, **properties):
    """Has torch find such a GPU."""
    properties = types.SimpleNamespace(**properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    target._cards.clear()
    front._has_kernels.cache_clear()
    front._reads_packed.cache_clear()


@pytest.fixture
def device_caches(monkeypatch):
    """The device's own card, even under --card, and nothing kept of it for other tests."""
    monkeypatch.setattr(target, "_given", [])
    yield
    target._cards.clear()
    front._has_kernels.cache_clear()
    front._reads_packed.cache_clear()


@pytest.mark.usefixtures("device_caches")
def test_a_card_is_read_once(monkeypatch):
    device = torch.device("cuda", 0)
    sizes = {"multi_processor_count": 82, "warp_size": 32, "shared_memory_per_multiprocessor": 100 * 1024}
    card_of(monkeypatch, major=8, minor=6, **sizes)
    assert target.of_device(device) == A10G
    tensor = types.SimpleNamespace(get_device=lambda: 0, device=device)
    assert target.of(tensor) is target.of(tensor) == A10G
    assert front._has_kernels(device)
    assert front._reads_packed(device, False)
    assert not front._reads_packed(device, True)
    card_of(monkeypatch, major=12, minor=1, shared_memory_per_block_optin=101_376, **sizes)
    assert target.of_device(device) == Target("cuda", 121, 82, 101_376)
    assert front._has_kernels(device)
    card_of(monkeypatch, major=7, minor=5, **sizes)
    assert not front._has_kernels(device)
    sizes = {"multi_processor_count": 304, "warp_size": 64, "shared_memory_per_block": 65_536}
    card_of(monkeypatch, hip="7.0", gcnArchName="gfx942:sramecc+:xnack-", **sizes)
    assert target.of_device(device) == CARDS["gfx942"]
    assert not front._has_kernels(device)  # until it is asked for
    with cards.launched_for(CARDS["gfx942"]):
        assert front._has_kernels(device)
        assert not front._reads_packed(device, False)


def fails_within(card):
    with cards.launched_for(card):
        raise ValueError("within")


@pytest.mark.usefixtures("device_caches")
def test_a_card_given_by_hand(monkeypatch):
    device = torch.device("cuda", 0)
    sizes = {"multi_processor_count": 132, "warp_size": 32, "shared_memory_per_multiprocessor": 228 * 1024}
    card_of(monkeypatch, major=9, minor=0, **sizes)
    assert front._has_kernels(device)
    with cards.launched_for(A10G):
        assert target.of_device(device) is A10G
        with cards.launched_for(None):
            assert not front._has_kernels(device)
        assert front._has_kernels(device)
        with pytest.raises(ValueError, match="within"):
            fails_within(CARDS["sm_75"])
        assert target.of_device(device) is A10G
    assert target.of_device(device) == H100


@pytest.mark.parametrize("name", [*RUN_KERNELS, "46 processors"])
def test_kernels_compute_the_same_for_every_card(name, monkeypatch, device):
    """With the config of that card, which differs from the H100's in tiles and in how columns are split."""
    card = CARDS.get(name) or A10G._replace(processors=46)
    if device == "cuda" and card.shared_memory > target.of_device(torch.device("cuda")).shared_memory:
        pytest.skip("has more shared memory than this one")
    inputs = linear_inputs((5, 70, 33, 70), dtype=HALF, device=device)
    seen = []
    launches = norm.norm_launches
    monkeypatch.setattr(norm, "norm_launches", lambda *args: seen.append(args[5]) or launches(*args))
    weight, lora_A, lora_B, magnitude = (
        t.double() for t in (inputs.weight, inputs.lora_A, inputs.lora_B, inputs.magnitude)
    )
    expected = reference.row_norm(weight, lora_A, lora_B, 0.7)
    base, h = (torch.randn(5, 70, device=device).to(HALF) for _ in range(2))
    with cards.launched_for(card):
        row_norm = norm.row_norm(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7)
        y, _ = compose.compose(base, h, inputs.lora_B, inputs.magnitude, row_norm, 0.7, None)
    assert seen == [configs.norm_config(1, *inputs.weight.shape, 70, HALF, card)]
    torch.testing.assert_close(row_norm.double(), expected, rtol=1e-3, atol=0)
    y_expected = magnitude / expected * (base.double() + 0.7 * h.double() @ lora_B.T)
    torch.testing.assert_close(y.double(), y_expected, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("device_caches")
def test_plans_are_made_for_the_card(monkeypatch):
    """And made anew where another one is given, in eager as in the layer's leaves."""
    seen = []
    for name in ("tile_config", "lora_b_config", "norm_config", "column_config"):
        choose = getattr(configs, name)

        def recorded(*args, choose=choose):
            seen.append((choose.__name__, args[-1]))
            return choose(*args)

        for module in (configs, compose, norm, backward, lora_b):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recorded)

    def step(dtype):
        inputs = linear_inputs((64, 24, 16, 4), dtype=dtype).leaves()
        factors = inputs.lora_A, inputs.lora_B, inputs.magnitude
        functional.dora_linear(inputs.x, inputs.weight.detach(), *factors, scaling=0.7).sum().backward()

    with stub.stubbed_kernels():
        for card in (A10G, B200):
            with cards.launched_for(card):
                seen.clear()
                step(HALF)
                step(FULL)
                assert {chooser for chooser, _ in seen} >= {
                    "tile_config",
                    "lora_b_config",
                    "norm_config",
                    "column_config",
                }
                assert {card for _, card in seen} == {card}
        seen.clear()
        step(HALF)
        assert {card for _, card in seen} == {H100}


@pytest.mark.parametrize("name", [*CARDS])
def test_bench_card_says_what_runs(name, tmp_path, capsys):
    path = tmp_path / "card.json"
    assert main(["card", "--device", "cpu", "--target", name, "--ranks", "384", "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    table = capsys.readouterr().out
    if name == "sm_75":
        assert [(record["variant"], record["why"]) for record in records] == [("aten", configs.why_not(CARDS[name]))]
        return
    (of_norm,) = (record for record in records if record["case"] == "norm bf16 r384 even")
    config = configs.norm_config(1, 4096, 4096, 384, HALF, CARDS[name])
    assert of_norm["limit_kib"] == CARDS[name].shared_memory / 1024
    assert of_norm["bound_kib"] == config.shared_memory(CARDS[name], 384, HALF) / 1024 <= of_norm["limit_kib"]
    assert f"block_o={config.block_o} " in of_norm["variant"]
    assert of_norm["variant"] in table
    packed = [record["variant"] for record in records if record["case"].startswith("packed")]
    assert (packed == ["aten"]) == name.startswith("gfx")


NVIDIA = {"multi_processor_count": 20, "warp_size": 32}
AMD = {"multi_processor_count": 96, "shared_memory_per_block": 65_536, "warp_size": 32}
USERS = {  # cards that the table has not, or takes otherwise; whether they run kernels, and the line that says so
    "T4": (NVIDIA | {"major": 7, "minor": 5, "shared_memory_per_multiprocessor": 65_536}, "came with sm_80"),
    "Orin": (NVIDIA | {"major": 8, "minor": 7, "shared_memory_per_multiprocessor": 167_936}, "came with sm_89"),
    "little memory": (NVIDIA | {"major": 8, "minor": 9, "shared_memory_per_multiprocessor": 49_152}, "sm_89 has 48128"),
    "B300": (NVIDIA | {"major": 10, "minor": 3, "shared_memory_per_block_optin": 232_448}, None),
    "Thor": (NVIDIA | {"major": 11, "minor": 0, "shared_memory_per_block_optin": 232_448}, "compiled for sm_110"),
    "GB10": (NVIDIA | {"major": 12, "minor": 1, "shared_memory_per_block_optin": 101_376}, None),
    "RX 7900": (AMD | {"gcnArchName": "gfx1100", "hip": "7.0"}, "nothing was compiled for gfx1100"),
    "MI300X": (AMD | {"gcnArchName": "gfx942:xnack-", "hip": "7.0"}, "kernels for gfx942 were never run"),
}


@pytest.mark.usefixtures("device_caches")
@pytest.mark.parametrize("name", USERS)
def test_bench_card_on_a_users_card(name, monkeypatch):
    """It runs what fits, or aten and says why in one line."""
    properties, why = USERS[name]
    card_of(monkeypatch, **properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = options.parse(["card", "--device", "cuda", "--ranks", "16", "384"], SUBCOMMANDS)
    records = [*SUBCOMMANDS["card"].run(args)]
    whys = [record["why"] for record in records if record["variant"] == "aten"]
    assert len(whys) == (why is not None)
    assert all(why in line for line in whys)
    runs = [record for record in records if record["variant"] != "aten"]
    assert front._has_kernels(args.device) == bool(runs)
    assert front._reads_packed(args.device, True) == (bool(runs) and not whys)
    limit = target.of_device(args.device).shared_memory / 1024
    assert all((record["bound_kib"] or 0) <= limit == record["limit_kib"] for record in runs)


def test_bench_card_without_a_gpu(tmp_path):
    path = tmp_path / "card.json"
    assert main(["card", "--device", "cpu", "--json", str(path)]) == 0
    (record,) = json.loads(path.read_text())["records"]
    assert record["variant"] == "aten"
    assert "there is no GPU" in record["why"]


def test_bench_card_times_aten_where_there_is_no_gpu(tmp_path):
    path = tmp_path / "card.json"
    assert main(["card", "--device", "cpu", "--times", "--ranks", "8", "--json", str(path)]) == 0
    records = [record for record in json.loads(path.read_text())["records"] if "ratio" in record]
    assert [record["case"].removesuffix(" r8") for record in records] == TIMED
    assert all(record["variant"] == "aten" and record["ratio"] == 1 < record["wall_us"] for record in records)


def test_bench_card_times_three_beside_one_another(monkeypatch):
    """With the configs of the card, of another and in aten, each of them for as long as it is timed."""
    seen = []
    choose = configs.norm_config
    monkeypatch.setattr(norm, "norm_config", lambda *args: seen.append(args[-1]) or choose(*args))
    args = options.parse(["card", "--device", "cpu", "--times", "--ranks", "8"], SUBCOMMANDS)
    args.ceilings = measure.Ceilings(1e3, 1e3, 1e3)
    with stub.stubbed_kernels():
        records = [*kernel_times.run(H100, CARDS["gfx942"], args)]
    for case in TIMED:
        variants = [record["variant"] for record in records if record["case"] == f"{case} r8"]
        assert variants == [
            name for name in ("chosen", "as gfx942", "aten") if "gfx" not in name or case != "packed-norm"
        ]
    assert {*seen} == {H100, CARDS["gfx942"]}


@pytest.mark.usefixtures("device_caches")
def test_bench_card_times_only_what_can_be_launched(monkeypatch, capsys):
    sizes = {"multi_processor_count": 82, "warp_size": 32, "shared_memory_per_multiprocessor": 100 * 1024}
    card_of(monkeypatch, major=8, minor=6, **sizes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("sm_90", "gfx942"):
        assert main(["card", "--device", "cuda", "--times", "--target", name]) == 2
        assert f"kernels for {name} cannot be launched on sm_86" in capsys.readouterr().err


TIMED = ["norm", "packed-norm", "up", "compose", "backward", "lora-b-backward", "mlp step"]
