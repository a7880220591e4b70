"""A pool of adapters: what it computes while adapters come and go, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from dorac import functional
from dorac.functional import Adapter
from dorac.nn import AdapterPool


def base_layer(device="cpu", dtype=torch.float32, bias=True):
    return nn.Linear(24, 40, bias=bias, dtype=dtype, device=device)


def adapter(rank, seed, device="cpu", dtype=torch.float32, scaling=0.7):
    generator = torch.Generator().manual_seed(seed)
    lora_A, lora_B, magnitude = (torch.randn(s, generator=generator) for s in ((rank, 24), (40, rank), (40,)))
    return Adapter(lora_A.to(device, dtype), lora_B.to(device, dtype), magnitude.abs().to(device) + 0.5, scaling)


def alone(base, x, given):
    """Each row by itself, ``given``: its adapter or None."""
    rows = [
        base(row) if one is None else functional.dora_linear(row, base.weight, *one[:3], base.bias, scaling=one.scaling)
        for row, one in zip(x, given, strict=True)
    ]
    return torch.stack(rows)


def check(pool, x, held, names):
    with torch.no_grad():
        y = pool(x, pool.index(names))
        expected = alone(pool.base_layer, x, [None if name is None else held[name] for name in names])
    half = y.dtype is torch.bfloat16
    # In half precision the base product is rounded, too, where its sum with the adapter's may be next to nothing.
    atol = torch.finfo(y.dtype).eps / 2 * expected.abs().max().item() if half else 1e-5
    torch.testing.assert_close(y, expected, rtol=2e-2 if half else 1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_adapters_come_and_go(dtype, bias, device):
    base = base_layer(device, dtype, bias)
    pool = AdapterPool(base, 3, 8)
    storages = [t.data_ptr() for t in pool.buffers()]
    held = {name: adapter(rank, rank, device, dtype) for name, rank in (("a", 8), ("b", 1), ("c", 5))}
    x = torch.randn(5, 3, 24, dtype=dtype, device=device)
    assert [pool.add(name, one) for name, one in held.items()] == [0, 1, 2]
    check(pool, x, held, ["c", None, "a", "b", "c"])
    held["b"] = adapter(4, 17, device, dtype, scaling=torch.tensor(1.5))
    assert pool.replace("b", held["b"]) == 1
    held["a"] = adapter(2, 18, device, dtype)  # of a smaller rank than what was there
    assert pool.replace("a", held["a"]) == 0
    check(pool, x, held, ["b", "a", "a", "c", None])
    pool.evict("a")
    held["d"] = adapter(3, 19, device, dtype, scaling=2)
    assert pool.add("d", held["d"]) == 0
    check(pool, x, held, ["d", "c", "d", None, "b"])
    assert storages == [t.data_ptr() for t in pool.buffers()]
    assert set(pool.state_dict()) == {f"base_layer.{name}" for name in base.state_dict()}
    assert "capacity=3, r=8, adapters=[b, c, d]" in repr(pool)


def test_an_empty_slot_is_the_base_layer(device):
    """Whatever was there before."""
    pool = AdapterPool(base_layer(device), 2, 4)
    broken = adapter(4, 0, device)
    broken.lora_A[0, 0] = float("nan")
    pool.add("broken", broken)
    pool.evict("broken")
    x = torch.randn(3, 24, device=device)
    y = pool(x, torch.tensor([0, 1, -1], device=device))
    torch.testing.assert_close(y, pool.base_layer(x))


def test_norms_are_kept(device):
    pool, one = AdapterPool(base_layer(device, torch.bfloat16), 2, 4), adapter(3, 0, device)
    slot = pool.add("a", one)
    assert pool.lora_A.dtype is torch.bfloat16
    # Of the factors as they are in the pool.
    factors = one.lora_A.to(torch.bfloat16), one.lora_B.to(torch.bfloat16)
    norm = functional.norm_factored(pool.base_layer.weight, *factors, one.scaling)
    assert torch.equal(pool.weight_norm[slot], norm)
    assert torch.equal(pool.mag_scale[slot], functional.magnitude_scale(one.magnitude, norm))


@pytest.mark.parametrize("when", ["before", "after"])
def test_scales_stay_float32_under_casts(when, device):
    pool, one = AdapterPool(base_layer(device), 2, 4), adapter(3, 0, device)
    if when == "after":
        pool.add("a", one)
        scales = pool.mag_scale.clone()
    nn.Sequential(pool).to(torch.bfloat16)
    if when == "before":
        pool.add("a", one)
    assert {t.dtype for t in (pool.mag_scale, pool.weight_norm, pool.scaling)} == {torch.float32}
    assert pool.lora_A.dtype is pool.base_layer.weight.dtype is torch.bfloat16
    assert pool.scaling[0] == torch.tensor(one.scaling)  # bfloat16 has 0.699
    if when == "after":
        assert torch.equal(pool.mag_scale, scales)
    check(
        pool, torch.randn(3, 24, dtype=torch.bfloat16, device=device), {"a": pool_adapter(pool, one)}, ["a", None, "a"]
    )


def pool_adapter(pool, one):
    """An adapter with the factors as the pool has them."""
    return one._replace(lora_A=one.lora_A.to(pool.lora_A), lora_B=one.lora_B.to(pool.lora_B))


def test_gradients_reach_x_alone():
    pool = AdapterPool(base_layer(), 2, 4)
    pool.base_layer.requires_grad_(False)
    held = {"a": adapter(3, 0)}
    pool.add("a", held["a"])
    x = torch.randn(4, 24, requires_grad=True)
    names = ["a", None, "a", None]
    (found,) = torch.autograd.grad(pool(x, pool.index(names)).sin().sum(), x)
    expected = alone(pool.base_layer, x, [held.get(name) for name in names]).sin().sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, x)[0])


def test_nothing_is_compiled_anew():
    pool = AdapterPool(base_layer(), 2, 8)
    pool.add("a", adapter(4, 0))
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    x, index = torch.randn(4, 24), torch.tensor([0, -1, 1, 0])
    with torch.no_grad():
        compiled(x, index)
        with torch.compiler.set_stance("fail_on_recompile"):
            pool.replace("a", adapter(8, 1, scaling=3.0))
            pool.add("b", adapter(1, 2))
            torch.testing.assert_close(compiled(x, index), pool(x, index))
            pool.evict("a")
            torch.testing.assert_close(compiled(x, index), pool(x, index))


def test_copies():
    pool = AdapterPool(base_layer(), 2, 4)
    pool.add("a", adapter(3, 0))
    copied = copy.deepcopy(pool)
    copied.add("b", adapter(2, 1))
    assert list(pool.slots) == ["a"]
    check(copied, torch.randn(3, 24), {"a": adapter(3, 0), "b": adapter(2, 1)}, ["a", "b", None])


def test_made_in_inference_mode():
    """As servers do; written to and called anywhere."""
    with torch.inference_mode():
        pool = AdapterPool(base_layer(), 2, 4)
        pool.add("a", adapter(3, 0))
    held = {"a": adapter(2, 1), "b": adapter(4, 2)}
    pool.replace("a", held["a"])
    with torch.inference_mode():
        pool.add("b", held["b"])
    check(pool, torch.randn(3, 24), held, ["a", "b", None])
    pool.evict("b")


REFUSED = {
    "full": (lambda pool: pool.add("c", adapter(2, 0)), "the pool is full: 'a', 'b' take its 2 slots; evict one first"),
    "rank": (
        lambda pool: pool.replace("a", adapter(5, 0)),
        "adapter 'a' has rank 5, the pool was made for ranks up to 4",
    ),
    "name": (lambda pool: pool.add(None, adapter(2, 0)), "name must be a string, got None"),
    "known": (lambda pool: pool.add("a", adapter(2, 0)), "adapter 'a' is in the pool: replace it, or evict it first"),
    "replace": (lambda pool: pool.replace("d", adapter(2, 0)), "adapter 'd' is not in the pool, which holds 'a', 'b'"),
    "evict": (lambda pool: pool.evict("d"), "adapter 'd' is not in the pool"),
    "index": (lambda pool: pool.index(["a", "d"]), "adapter 'd' is not in the pool"),
    "lora_A": (lambda pool: pool.replace("a", adapter(2, 0)._replace(lora_A=torch.ones(2, 23))), "lora_A must be"),
    "lora_B": (lambda pool: pool.replace("a", adapter(2, 0)._replace(lora_B=torch.ones(40, 3))), "lora_B must be"),
    "magnitude": (lambda pool: pool.replace("a", adapter(2, 0)._replace(magnitude=torch.ones(3))), "magnitude must be"),
    "no tensor": (lambda pool: pool.replace("a", adapter(2, 0)._replace(magnitude=None)), "magnitude must be a tensor"),
    "scaling": (lambda pool: pool.replace("a", adapter(2, 0, scaling=float("inf"))), "scaling must be finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    """And nothing has changed."""
    pool = AdapterPool(base_layer(), 2, 4)
    for one in ("a", "b"):
        pool.add(one, adapter(3, 0))
    before, slots = [t.clone() for t in pool.buffers()], dict(pool.slots)
    call, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call(pool)
    assert slots == pool.slots
    assert all(map(torch.equal, before, pool.buffers()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Embedding(3, 4), 2, 4), TypeError, "base_layer must be an nn.Linear, got Embedding"),
        ((base_layer(), 0, 4), ValueError, "capacity must be a whole number of at least 1, got 0"),
        ((base_layer(), 2, 1.5), ValueError, "r must be a whole number of at least 1, got 1.5"),
        ((nn.Linear(3, 4, device="meta"), 2, 4), ValueError, "base_layer is on meta"),
        ((base_layer(), 2, 4, torch.int8), TypeError, "dtype must be .* got torch.int8"),
        ((base_layer(), 2, 4, "float16"), TypeError, "dtype must be .* got 'float16'"),
    ],
    ids=["kind", "capacity", "rank", "meta", "integer", "word"],
)
def test_refuses_to_be_made(arguments, error, message):
    *arguments, dtype = arguments if len(arguments) == 4 else (*arguments, None)
    with pytest.raises(error, match=message):
        AdapterPool(*arguments, dtype=dtype)


@pytest.mark.gpu
def test_a_captured_graph_runs_on():
    base = base_layer("cuda", torch.bfloat16)
    pool, x = AdapterPool(base, 4, 16), torch.randn(6, 24, device="cuda", dtype=torch.bfloat16)
    pool.add("a", adapter(4, 0, "cuda", torch.bfloat16))
    index = pool.index(["a", None, "a", None, None, None])
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            pool(x, index)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = pool(x, index)
        for turn, names in enumerate((["b"] * 6, ["a", "b", "c", None, "c", "b"], ["c", "b", None, "a", "a", "a"])):
            for name, rank in (("a", 16 - turn), ("b", 3 + turn), ("c", 9)):
                write = pool.replace if name in pool.slots else pool.add
                write(name, adapter(rank, 10 * turn + rank, "cuda", torch.bfloat16))
            index.copy_(pool.index(names))
            graph.replay()
            assert torch.equal(y, pool(x, index))
