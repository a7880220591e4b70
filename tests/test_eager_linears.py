"""The eager path of several layers of one x (``ops/eager_linears.py``): results, what it keeps, when it steps aside.

On the CPU the kernels run in Triton's interpreter.
"""

import contextlib
import functools
import gc
import itertools

import blocks
import packed_weights
import pytest
import test_eager
import torch
import torch.nn.functional as F
from blocks import activation, check, cotangents, first_in_ci, leaves, path_through, projection, projections
from test_eager import CONSUMERS, DY, KEEPING, MODES, Ops, assert_near, kept_contiguous, shifted
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional, packed
from dorac.ops import eager, eager_linears, packed_product

pytest.importorskip("triton")

HALF = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)]
QKV = ("dora",) * 3
MIXED = ("dora", "lora", "plain")


@pytest.fixture
def path(device, monkeypatch) -> list[str]:
    return path_through(eager_linears, device, monkeypatch)


def run(x, layers, dys=None, autocast=None, **options):
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        for t in leaves(x, layers).values():
            t.grad = None
        ys = functional.dora_linears(x, layers, **options)
    dys = cotangents(ys) if dys is None else dys
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    return ys, {name: t.grad for name, t in leaves(x, layers).items()}, dys


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kinds", [QKV, ("lora",) * 3, MIXED, ("plain", "plain", "dora"), ("lora",)], ids=str)
@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize(("bias", "given", "save_output"), [(True, True, True), (False, False, True), (False, True, 0)])
def test_values_and_gradients(dtype, kinds, factors, bias, given, save_output, path, device):
    options = {"bias": bias, "given": given, "save_output": save_output, "factor_dtype": factors}
    x, layers = activation(dtype, device), projections(*kinds, dtype=dtype, device=device, **options)
    autocast = None if factors is None else dtype
    ys, grads, dys = run(x, layers, autocast=autocast)
    assert path == ["training"]
    check(x, layers, ys, grads, dys, casts=0 if factors is None else 3)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast is not None):
        again = functional.dora_linears(x, layers)
    assert path == ["training", "inference"]
    assert all(map(torch.equal, ys, again))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sizes", [((1, 24), 5, 1), ((3, 11, 24), 700, 136), ((2, 20, 24), 16, 384)], ids=str)
def test_regimes(dtype, sizes, path, device):
    shape, out, rank = sizes
    x = activation(dtype, device, shape)
    layers = [
        projection(kind, out + i, rank, inputs=24, dtype=dtype, device=device, seed=i, save_output=True, bias=i == 1)
        for i, kind in enumerate(("dora", "dora", "lora"))
    ]
    ys, grads, dys = run(x, layers)
    assert [y.shape for y in ys] == [(*shape[:-1], out + i) for i in range(3)]
    assert path == ["training"]
    flat = x.detach().flatten(0, -2).requires_grad_()
    grads["x"] = grads["x"].flatten(0, -2)
    check(flat, layers, [y.flatten(0, -2) for y in ys], grads, [dy.flatten(0, -2) for dy in dys])


EDITS = {
    "one dimension": lambda x: x[0],
    "transposed": lambda x: x.view(3, 11, -1).transpose(0, 1),
    "columns": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "misaligned": shifted,
}


def composed(monkeypatch, function):
    """What ``function`` returns where nothing takes a path of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(eager_linears, "dora_linears", lambda *arguments: None)
        patch.setattr(eager, "dora_linear", lambda *arguments, **options: None)
        return function()


def both(monkeypatch, path, function, dtype=torch.bfloat16, taken=("training",)):
    """Runs both ways; the results are near each other."""
    actual = function()
    assert path == [*taken]
    expected = composed(monkeypatch, function)
    assert path == [*taken]
    assert_near(actual, expected, dtype)


def results(x, layers, **options):
    ys, grads, _ = run(x, layers, **options)
    return {f"y {i}": y.detach() for i, y in enumerate(ys)} | {n: g for n, g in grads.items() if g is not None}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dropout_on", [None, *first_in_ci("adapter", "low_rank")])
@pytest.mark.parametrize("save_output", first_in_ci(True, False))
def test_layouts_of_x(edit, dropout_on, save_output, path, monkeypatch, device):
    """Rows with a faint g read x again where y is kept."""
    x = EDITS[edit](activation(torch.bfloat16, device).detach()).requires_grad_()
    options = {"save_output": save_output, "bias": False, "dropout_p": 0.4 if dropout_on else 0.0}
    layers = projections(*MIXED, dtype=torch.bfloat16, device=device, **options)
    with torch.no_grad():
        layers[0].magnitude[:3] = torch.tensor([0.0, 1e-4, -1e-3])

    def seeded():
        torch.manual_seed(3)
        return results(x, layers, dropout_on=dropout_on or "adapter")

    both(monkeypatch, path, seeded)


@pytest.mark.parametrize("how", DY)
@pytest.mark.parametrize("save_output", [True, False])
def test_gradients_of_any_layout(how, save_output, path, monkeypatch, device):
    x = activation(torch.float16, device)
    layers = projections(*MIXED, dtype=torch.float16, device=device, save_output=save_output, bias=False)
    dys = [DY[how](dy) for dy in cotangents(functional.dora_linears(x, layers))]
    both(monkeypatch, path, lambda: results(x, layers, dys=dys), torch.float16, taken=["training"] * 2)


def test_transposed_and_mixed_factors(path, monkeypatch, device):
    """A transposed weight, transposed factors, and under autocast factors of two dtypes."""
    x = activation(torch.bfloat16, device)
    q, k, v = projections(*QKV, dtype=torch.bfloat16, device=device, transposed=True)
    k = k._replace(**{n: getattr(k, n).detach().t().contiguous().t().requires_grad_() for n in ("lora_A", "lora_B")})
    v = v._replace(**{n: getattr(v, n).detach().float().requires_grad_() for n in ("lora_A", "lora_B")})
    both(monkeypatch, path, lambda: results(x, (q, k), autocast=None))
    both(monkeypatch, path, lambda: results(x, (q, k, v), autocast=torch.bfloat16), taken=["training"] * 2)


@pytest.mark.parametrize("unused", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_what_is_not_used_gets_no_gradient(unused, path, device):
    x, layers = activation(torch.bfloat16, device), projections(*MIXED, dtype=torch.bfloat16, device=device)
    dys = cotangents(functional.dora_linears(x.detach(), layers))
    dys = [None if i in unused else dy for i, dy in enumerate(dys)]
    ys, grads, _ = run(x, layers, dys=dys)
    assert path == ["training"] * 2
    check(x, layers, ys, grads, dys)


@pytest.mark.parametrize("kinds", [QKV, MIXED], ids=str)
@pytest.mark.parametrize("frozen", ["x", "bias"])
def test_frozen(kinds, frozen, path, device):
    x, layers = activation(torch.bfloat16, device), projections(*kinds, dtype=torch.bfloat16, device=device)
    for tensor in [x] if frozen == "x" else [p.bias for p in layers]:
        tensor.requires_grad_(False)
    ys, grads, dys = run(x, layers)
    assert path == ["training"]
    check(x, layers, ys, grads, dys)


NOT_TAKEN = {
    "lora_B alone": lambda p: p._replace(lora_A=p.lora_A.detach(), magnitude=p.magnitude.detach()),
    "magnitude frozen": lambda p: p._replace(magnitude=p.magnitude.detach()),
    "one adapter frozen": lambda p: p._replace(
        **{n: getattr(p, n).detach() for n in ("lora_A", "lora_B", "magnitude")}
    ),
    "weight trained": lambda p: p._replace(weight=p.weight.clone().requires_grad_()),
    "misaligned": lambda p: p._replace(weight=shifted(p.weight)),
    "tensor scaling": lambda p: p._replace(scaling=torch.tensor(p.scaling)),
    "bias of LoRA in float32": lambda p: p._replace(magnitude=None, weight_norm=None, bias=p.bias.detach().float()),
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_arrangements_that_are_not_taken(case, path, monkeypatch, device):
    """Each layer that can takes its own path then."""
    alone = []
    apply = eager._apply
    monkeypatch.setattr(eager, "_apply", lambda *arguments: alone.append(1) or apply(*arguments))
    x = activation(torch.bfloat16, device)
    q, k, v = projections(*QKV, dtype=torch.bfloat16, device=device)
    layers = q, NOT_TAKEN[case](k), v
    ys, grads, dys = run(x, layers)
    assert not path
    assert len(alone) == 2
    check(x, layers, ys, grads, dys)


@pytest.mark.parametrize("meaning", ["adapter", "low_rank"])
@pytest.mark.parametrize("kinds", first_in_ci(MIXED, QKV, ("lora", "lora")), ids=str)
@pytest.mark.parametrize("factors", first_in_ci(torch.float32, None))
@pytest.mark.parametrize("save_output", first_in_ci(True, False))
def test_dropout(meaning, kinds, factors, save_output, path, device):
    """One mask for all, of x as it is given."""
    options = {"factor_dtype": factors, "dropout_p": 0.4, "save_output": save_output, "bias": not save_output}
    layers = projections(*kinds, dtype=torch.bfloat16, device=device, **options)
    x = activation(torch.bfloat16, device, (TOKENS := blocks.TOKENS, blocks.IN))
    torch.manual_seed(3)
    mask = (F.dropout(torch.ones_like(x), 0.4) > 0).double() / 0.6
    assert len(mask) == TOKENS
    torch.manual_seed(3)
    autocast = None if factors is None else torch.bfloat16
    ys, grads, dys = run(x, layers, autocast=autocast, dropout_on=meaning)
    assert path == ["training"]
    check(x, layers, ys, grads, dys, dropout_on=meaning, dropped={0.4: mask}, casts=6)
    torch.manual_seed(3)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=factors is not None):
        again = functional.dora_linears(x, layers, dropout_on=meaning)
    assert all(map(torch.equal, ys, again))


@pytest.mark.parametrize("meaning", ["adapter", "low_rank"])
def test_dropout_equals_the_composition(meaning, path, monkeypatch, device):
    """Mask by mask, and where layers of one x have two probabilities, without the path."""
    x = activation(torch.bfloat16, device)
    layers = projections(*QKV, dtype=torch.bfloat16, device=device, dropout_p=0.4)

    def seeded(layers):
        torch.manual_seed(3)
        return results(x, layers, dropout_on=meaning)

    both(monkeypatch, path, lambda: seeded(layers))
    path.clear()
    for other in (0.1, 0.0):
        two = layers[0]._replace(dropout_p=other), *layers[1:]
        alone = layers[0]._replace(dropout_p=0.0, lora_A=None, lora_B=None, magnitude=None, weight_norm=None)
        both(monkeypatch, path, functools.partial(seeded, two), taken=())
        both(monkeypatch, path, functools.partial(seeded, (alone, *layers[1:])))
        path.clear()


@pytest.mark.parametrize("kinds", [QKV, MIXED], ids=str)
@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_two_runs_give_the_same_bits(kinds, factors, dropout_p, path, device):
    options = {"factor_dtype": factors, "dropout_p": dropout_p, "given": False}
    layers = projections(*kinds, dtype=torch.bfloat16, device=device, **options)
    x, runs = activation(torch.bfloat16, device), []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(results(x, layers, autocast=torch.bfloat16 if factors else None))
    assert path == ["training"] * 2
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


@pytest.mark.parametrize("kinds", [QKV, MIXED], ids=str)
@pytest.mark.parametrize("save_output", [True, False])
@pytest.mark.parametrize("factors", [None, torch.float32])
def test_second_derivatives(kinds, save_output, factors, path, monkeypatch, device):
    x = activation(torch.bfloat16, device)
    options = {"bias": not save_output, "save_output": save_output, "factor_dtype": factors}
    layers = projections(*kinds, dtype=torch.bfloat16, device=device, **options)

    def twice():
        for t in leaves(x, layers).values():
            t.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=factors is not None):
            ys = functional.dora_linears(x, layers)
        trained = [t for t in leaves(x, layers).values() if t.requires_grad]
        loss = sum(y.float().square().sum() for y in ys)
        first = torch.autograd.grad(loss, trained, create_graph=True)
        sum(grad.float().square().sum() for grad in first).backward()
        return {name: t.grad for name, t in leaves(x, layers).items() if t.requires_grad and t.grad is not None}

    both(monkeypatch, path, twice)


@pytest.mark.parametrize("kinds", [QKV, MIXED], ids=str)
def test_batched_gradients(kinds, path, monkeypatch, device):
    x, layers = activation(torch.bfloat16, device), projections(*kinds, dtype=torch.bfloat16, device=device)

    def batched():
        ys = functional.dora_linears(x, layers)
        trained = {name: t for name, t in leaves(x, layers).items() if t.requires_grad}
        dys = [torch.stack([dy, -2 * dy]) for dy in cotangents(ys)]
        grads = torch.autograd.grad(ys, [*trained.values()], dys, is_grads_batched=True)
        return dict(zip(trained, grads, strict=True))

    both(monkeypatch, path, batched)


@pytest.mark.parametrize("other", HALF)
def test_backward_inside_autocast(other, path, device):
    """The products stay in the layers' dtype, whatever autocast's is."""
    gradients = []
    for inside in (False, True):
        x, layers = activation(torch.bfloat16, device), projections(*MIXED, dtype=torch.bfloat16, device=device)
        ys = functional.dora_linears(x, layers)
        with torch.autocast(device, other, enabled=inside):
            torch.autograd.backward(ys, cotangents(ys))
        gradients.append([t.grad for t in leaves(x, layers).values() if t.requires_grad])
    assert path == ["training"] * 2
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("bias", [True, False])
def test_backward_twice_adds_up(bias, path, device):
    x, layers = activation(torch.bfloat16, device), projections(*MIXED, dtype=torch.bfloat16, device=device, bias=bias)
    ys = functional.dora_linears(x, layers)
    dys = cotangents(ys)
    torch.autograd.backward(ys, dys, retain_graph=True)
    once = {name: t.grad.clone() for name, t in leaves(x, layers).items() if t.requires_grad}
    torch.autograd.backward(ys, dys)
    for name, grad in once.items():
        assert torch.equal(leaves(x, layers)[name].grad, 2 * grad), name
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(ys, dys)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "magnitude", "weight"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_parameter_that_has_been_written_to_is_refused(name, layer, path, device):
    x, layers = activation(torch.bfloat16, device), projections("dora", "dora", dtype=torch.bfloat16, device=device)
    ys = functional.dora_linears(x, layers)
    with torch.no_grad():
        getattr(layers[layer], name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, cotangents(ys))


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("keeping", first_in_ci(*KEEPING))
@pytest.mark.parametrize("save_output", [True, False])
def test_consumers_in_place(consumer, keeping, save_output, path, monkeypatch, device):
    how = KEEPING[keeping]
    x = activation(torch.bfloat16, device, (3, 11, blocks.IN))
    options = {"save_output": save_output, "bias": not save_output}
    layers = [
        projection(kind, 65, rank, seed=rank, dtype=torch.bfloat16, device=device, **options)
        for kind, rank in (("dora", 8), ("dora", 5), ("lora", 3), ("plain", 1))
    ]

    def consumed():
        for t in leaves(x, layers).values():
            t.grad = None

        def block(x):
            return tuple(map(CONSUMERS[consumer], functional.dora_linears(x, layers)))

        with how() if callable(how) else contextlib.nullcontext():
            ys = checkpoint(block, x, use_reentrant=how) if isinstance(how, bool) else block(x)
        torch.autograd.backward(ys, cotangents(ys))
        return {name: t.grad for name, t in leaves(x, layers).items() if t.grad is not None}

    both(
        monkeypatch,
        path,
        consumed,
        taken=["inference", "training"] if how is True else ["training"] * (1 + (how is False)),
    )


def kept_by(function):
    """What is kept for backward: the bytes of each storage beside parameters and x."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return kept, result


@pytest.mark.parametrize("kinds", [QKV, MIXED, ("lora",) * 3], ids=str)
@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("save_output", [True, False])
def test_saved_bytes(kinds, factors, dropout_p, save_output, path, device):
    """x once, h, casts of the factors, the mask at a bit an element; per layer with DoRA a norm and inner, or y."""
    options = {"factor_dtype": factors, "dropout_p": dropout_p, "save_output": save_output, "bias": False}
    layers = projections(*kinds, dtype=torch.bfloat16, device=device, **options)
    x = activation(torch.bfloat16, device, (32, blocks.IN))
    with torch.autocast(device, torch.bfloat16, enabled=factors is not None):
        kept, ys = kept_by(lambda: functional.dora_linears(x, layers, dropout_on="low_rank"))
    assert path == ["training"]
    given = [x, *(t for p in layers for t in (p.weight, p.weight_norm) if t is not None)]
    assert all(kept.pop(t.untyped_storage().data_ptr()) == t.untyped_storage().nbytes() for t in given)
    adapted = [p for p in layers if p.lora_A is not None]
    ranks = sum(len(p.lora_A) for p in adapted)
    expected = [32 * ranks * 2]  # h
    if factors is not None:
        expected.append(2 * sum(p.lora_A.numel() + p.lora_B.numel() for p in adapted))
    if dropout_p:
        expected.append(32 * blocks.IN // 8)
    with_dora = [i for i, p in enumerate(layers) if p.magnitude is not None]
    expected += [32 * len(layers[i].weight) * 2 for i in with_dora]
    shared = [i for i, y in enumerate(ys) if y.untyped_storage().data_ptr() in kept]
    assert shared == (with_dora if save_output else [])
    assert sorted(kept.values()) == sorted(expected)


@pytest.fixture
def no_launches(device, monkeypatch):
    """Triton's interpreter makes cycles of references."""
    if device == "cpu":
        from dorac.kernels import launch

        monkeypatch.setattr(launch.Bound, "__call__", lambda *arguments: None)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("save_output", [True, False])
def test_what_is_kept_goes_with_the_graph(save_output, path, device):
    x = activation(torch.bfloat16, device)
    layers = projections(*QKV, dtype=torch.bfloat16, device=device, save_output=save_output, bias=False)
    gc.disable()
    try:
        for backward in (True, False):
            ys = functional.dora_linears(x, layers)
            kept = [StorageWeakRef(y.untyped_storage()) for y in ys]
            kept += [StorageWeakRef(t.untyped_storage()) for t in ys[0].grad_fn.saved_tensors[6::3][:3]]
            loss = sum(y.float().sum() for y in ys)
            del ys
            assert not any(ref.expired() for ref in kept[3:])
            if backward:
                loss.backward()
            else:
                del loss
            assert all(ref.expired() for ref in kept)
    finally:
        gc.enable()


SAVED = {
    "inner": {},
    "y": {"bias": False, "save_output": True},
    "norm computed": {"given": False},
    "autocast": {"factor_dtype": torch.float32},
    "autocast, y": {"factor_dtype": torch.float32, "bias": False, "save_output": True},
    "dropout": {"dropout_p": 0.4},
    "dropout, autocast": {"dropout_p": 0.4, "factor_dtype": torch.float32},
    "low-rank dropout": {"dropout_p": 0.4, "dropout_on": "low_rank"},
    "low-rank dropout, y": {"dropout_p": 0.4, "dropout_on": "low_rank", "bias": False, "save_output": True},
    "no leaves": {"leaves": False},
}


def seen_in_part(device, call, over_forward, over_backward, kinds=MIXED, leaf=True, **options):
    """The gradients of layers that ``call`` runs, with modes over it."""
    torch.manual_seed(3)
    meaning, leaf = options.pop("dropout_on", "adapter"), options.pop("leaves", True)
    x, autocast = activation(torch.bfloat16, device), "factor_dtype" in options
    layers = projections(*kinds, dtype=torch.bfloat16, device=device, **options)
    used = layers
    if not leaf:
        used = [p._replace(**{n: t.view_as(t) for n, t in p._asdict().items() if torch.is_tensor(t)}) for p in layers]

    def block(x):
        return sum(y.float().square().sum() for y in functional.dora_linears(x, used, dropout_on=meaning))

    with MODES[over_forward](), torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = call(block, x)
    with MODES[over_backward]():
        loss.backward()
    return {name: t.grad for name, t in leaves(x, layers).items() if t.grad is not None}


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("over", [("ops", "none"), ("none", "ops"), ("none", "flops")], ids=str)
def test_a_checkpoint_with_a_mode_over_one_direction(case, over, path, monkeypatch, device):
    """The recomputation keeps what the forward kept, although a mode looks on in one of them alone."""
    call = functools.partial(checkpoint, use_reentrant=False)
    both(monkeypatch, path, lambda: seen_in_part(device, call, *over, **SAVED[case]))


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("over", [("ops", "none"), ("none", "ops"), ("ops", "ops")], ids=str)
@pytest.mark.parametrize(
    "keeping", first_in_ci(contextlib.nullcontext, torch.autograd.graph.save_on_cpu, kept_contiguous)
)
def test_a_mode_over_layers_in_part(case, over, keeping, path, monkeypatch, device):
    def call(block, x):
        with keeping():
            return block(x)

    taken = ["training"] if over[0] == "none" else []
    both(monkeypatch, path, lambda: seen_in_part(device, call, *over, **SAVED[case]), taken=taken)


@pytest.mark.parametrize(
    ("case", "saved"),
    [
        *itertools.product(("inner", "y", "autocast"), ("nothing", "dorac", "everything")),
        *itertools.product(("dropout", "low-rank dropout"), ("nothing", "dorac")),  # torch's writes to what it made
    ],
)
@pytest.mark.parametrize("over", first_in_ci(("none", "none"), ("ops", "none"), ("none", "ops")), ids=str)
def test_selective_checkpointing_sees_the_ops(case, saved, over, path, monkeypatch, device):
    seen = []

    def policy(context, op, *args, **kwargs):
        if op.namespace == "dorac":
            seen.append(op._schema.name.removeprefix("dorac::"))
        saves = saved == "everything" or op.namespace == saved
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    call = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    eager.forget_plans()  # making one is not seen
    both(monkeypatch, path, lambda: seen_in_part(device, call, *over, **SAVED[case]), taken=[])
    assert seen


def test_a_dispatch_mode_sees_the_ops(path, device):
    x, layers = activation(torch.bfloat16, device), projections(*QKV, dtype=torch.bfloat16, device=device)
    with Ops() as forward:
        ys = functional.dora_linears(x, layers)
    with Ops() as backward:
        torch.autograd.backward(ys, cotangents(ys))
    assert (forward.seen, backward.seen) == ({"up_compose_forward"}, test_eager.BACKWARD_OPS)
    with torch.no_grad(), Ops() as inference:
        functional.dora_linears(x, layers)
    assert inference.seen == {"up_compose"}
    assert not path


@pytest.mark.parametrize("save_output", [True, False])
@pytest.mark.parametrize("kinds", [QKV, MIXED], ids=str)
def test_flops_are_those_of_the_composition(kinds, save_output, path, monkeypatch, device):
    def flops():
        x = activation(torch.bfloat16, device)
        layers = projections(*kinds, dtype=torch.bfloat16, device=device, save_output=save_output, bias=False)
        with FlopCounterMode(display=False) as counter:
            sum(y.sum() for y in functional.dora_linears(x, layers)).backward()
        return counter.get_total_flops()

    counted = flops()
    assert not path
    assert counted == composed(monkeypatch, flops) > 4 * blocks.TOKENS * blocks.IN * sum(blocks.OUT)


def traced(x, layers):
    make_fx(lambda x: functional.dora_linears(x, layers))(x)


class Block(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return functional.dora_linears(x, self.layers)


def loss_of(layers):
    return lambda x: sum(y.float().sum() for y in functional.dora_linears(x, layers))


STEPS_ASIDE = {
    "make_fx": traced,
    "vmap": lambda x, layers: torch.vmap(Block(layers))(x[None].repeat(2, 1, 1)),
    "grad": lambda x, layers: torch.func.grad(loss_of(layers))(x),
    "jvp": lambda x, layers: torch.func.jvp(loss_of(layers), (x,), (x,)),
    "compile": lambda x, layers: torch.compile(Block(layers), fullgraph=True, backend="aot_eager")(x),
    "export": lambda x, layers: torch.export.export(Block(layers), (x,)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("observer", STEPS_ASIDE)
def test_steps_aside(observer, path, device):
    x = activation(torch.bfloat16, device).detach()
    layers = [
        p._replace(**{n: t.detach() for n, t in p._asdict().items() if torch.is_tensor(t)})
        for p in projections(*MIXED, dtype=torch.bfloat16, device=device)
    ]
    functional.dora_linears(x, layers)  # a plan is there
    assert path == ["inference"]
    STEPS_ASIDE[observer](x, layers)
    assert path == ["inference"]
    functional.dora_linears(x, layers)
    assert path == ["inference"] * 2


CHANGES = {
    "values": {"seed": 5},
    "factors": {"factor_dtype": torch.float32},
    "rank": {"rank": 9},
    "outputs": {"out": 50},
    "bias": {"bias": False},
    "kind": {"kind": "lora"},
    "transposed": {"transposed": True},
    "save_output": {"save_output": True, "bias": False},
    "dropout": {"dropout_p": 0.5},
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_plan_serves_another_combination(change, path, monkeypatch, device):
    """Called as it was, then with another second layer, and again as it was."""
    x = activation(torch.bfloat16, device)
    first, second = projections("dora", "dora", dtype=torch.bfloat16, device=device)
    options = {"out": blocks.OUT[1], "rank": blocks.RANKS[1], "seed": 1} | CHANGES[change]
    other = projection(dtype=torch.bfloat16, device=device, **options)
    for layers in ((first, second), (first, other), (first, second)):
        path.clear()

        def seeded(layers=layers):
            torch.manual_seed(3)
            return results(x, layers, autocast=torch.bfloat16)

        both(monkeypatch, path, seeded, taken=[] if layers[1].dropout_p else ["training"])


def test_a_flag_flipped_in_place_is_another_plan(path, device):
    x, layers = activation(torch.bfloat16, device), projections(*QKV, dtype=torch.bfloat16, device=device)
    for flag in (True, False, True):
        path.clear()
        for tensor in (layers[1].lora_A, layers[1].lora_B, layers[1].magnitude):
            tensor.requires_grad_(flag)
        ys, grads, dys = run(x, layers)
        assert path == (["training"] if flag else [])
        check(x, layers, ys, grads, dys)


def test_switches_between_two_calls(path, monkeypatch, device):
    """Gradients and autocast's dtype: each call has its own plan, and comes out as without."""
    x = activation(torch.bfloat16, device)
    layers = projections(*QKV, dtype=torch.bfloat16, device=device, factor_dtype=torch.float32)
    for training, dtype in [*itertools.product((True, False), (torch.bfloat16, torch.float16, None))] * 2:
        path.clear()

        def call(training=training, dtype=dtype):
            with torch.set_grad_enabled(training), torch.autocast(device, dtype, enabled=dtype is not None):
                ys = functional.dora_linears(x, layers)
            assert all(y.requires_grad == training for y in ys)
            return {f"{i}": y.detach() for i, y in enumerate(ys)}

        kind = ["training" if training else "inference"] if dtype is torch.bfloat16 else []
        both(monkeypatch, path, call, taken=kind)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [QKV, MIXED], ids=str)
def test_cuda_graphs(kinds, path):
    x, layers = activation(torch.bfloat16, "cuda"), projections(*kinds, dtype=torch.bfloat16, device="cuda")
    trained = [t for t in leaves(x, layers).values() if t.requires_grad]
    dys = cotangents(functional.dora_linears(x, layers))

    def step():
        ys = functional.dora_linears(x, layers)
        return *(y.detach() for y in ys), *torch.autograd.grad(ys, trained, dys)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, actual, expected))


def packed_layers(kinds, device="cpu", factors=None, dropout_p=0.0, given=True, save_output=False):
    """Layers over 4-bit weights, and the same over what these stand for; without a bias if they save the output."""
    options = {"factor_dtype": factors, "given": False, "save_output": save_output, "bias": not save_output}
    layers = projections(*kinds, inputs=64, dtype=torch.bfloat16, device=device, **options)
    over, dense = [], []
    for i, p in enumerate(layers):
        value, weight = packed_weights.bnb_4bit((len(p.weight), 64), nested=i != 1, seed=i)
        value = value._replace(**{n: t.to(device) for n, t in value._asdict().items() if torch.is_tensor(t)})
        p = p._replace(weight=weight.to(device), dropout_p=dropout_p)
        if p.magnitude is not None and given:
            norm = functional.norm_factored(p.weight, p.lora_A.detach(), p.lora_B.detach(), p.scaling)
            p = p._replace(weight_norm=norm)
        over.append(p._replace(weight=value))
        dense.append(p)
    return over, dense


@pytest.mark.parametrize("kinds", first_in_ci(MIXED, QKV), ids=str)
@pytest.mark.parametrize("factors", first_in_ci(torch.float32, None))
@pytest.mark.parametrize(("dropout_p", "meaning"), [(0.0, "adapter"), (0.4, "adapter"), (0.4, "low_rank")])
@pytest.mark.parametrize(("given", "save_output"), [(True, False), (True, True), (False, False)])
def test_packed_weights(kinds, factors, dropout_p, meaning, given, save_output, path, device):
    """The bits of the layers over dense weights, and nothing of a weight's size is kept."""
    over, dense = packed_layers(kinds, device, factors, dropout_p, given, save_output)
    x, outcomes = activation(torch.bfloat16, device, (blocks.TOKENS, 64)), []
    for layers in (over, dense):
        torch.manual_seed(3)
        tensors = [x, *(t for p in layers for t in p[1:5] if t is not None)]
        for t in tensors:
            t.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=factors is not None):
            kept, ys = kept_by(functools.partial(functional.dora_linears, x, layers, dropout_on=meaning))
        weights = {2 * 64 * out for out in blocks.OUT}
        assert weights.isdisjoint(kept.values()) == (layers is over)
        keeps_y = save_output and not (dropout_p and meaning == "adapter")
        for p, y in zip(layers, ys, strict=True):
            assert (y.untyped_storage().data_ptr() in kept) == (keeps_y and p.magnitude is not None)
        torch.autograd.backward(ys, cotangents(ys))
        outcomes.append([*ys, *(t.grad for t in tensors if t.requires_grad)])
    assert path == ["training"] * (1 + given)
    if given:
        assert all(map(torch.equal, *outcomes))
    else:
        named = [dict(enumerate(map(torch.Tensor.detach, outcome))) for outcome in outcomes]
        assert_near(*named, torch.bfloat16)


@pytest.mark.parametrize("save_output", [True, False])
@pytest.mark.parametrize("case", ["second", "mode over backward", "mode over forward", "no grad"])
def test_packed_weights_when_looked_at(case, save_output, path, device):
    over, dense = packed_layers(MIXED, device, save_output=save_output)
    x, outcomes = activation(torch.bfloat16, device, (blocks.TOKENS, 64)), []
    for layers in (over, dense):
        trained = [x, *(t for p in layers for t in p[1:5] if t is not None and t.requires_grad)]
        with Ops() if case == "mode over forward" else torch.set_grad_enabled(case != "no grad"):
            ys = functional.dora_linears(x, layers)
        if case == "no grad":
            outcomes.append(ys)
            continue
        with Ops() if case == "mode over backward" else contextlib.nullcontext():
            grads = torch.autograd.grad(ys, trained, cotangents(ys), create_graph=case == "second")
        if case == "second":
            grads = torch.autograd.grad(sum(g.float().square().sum() for g in grads), trained, allow_unused=True)
        outcomes.append([g for g in grads if g is not None])
    assert all(map(torch.equal, *outcomes))


FAINT = torch.tensor([0.0, 1e-4, -1e-3])


@pytest.mark.parametrize("consumer", ["keeps y", "writes to y", "gives y back"])
@pytest.mark.parametrize("factors", first_in_ci(torch.float32, None))
def test_rows_of_packed_weights_with_a_faint_g(consumer, factors, path, device):
    """Their gradient is not in y: it comes from the weight, as that of all where y is no longer y."""
    x, outcomes = activation(torch.bfloat16, device, (blocks.TOKENS, 64)), []
    for save_output in (True, False):
        over, _ = packed_layers(QKV, device, factors, save_output=save_output)
        over = [p._replace(bias=None) for p in over]
        trained = [x, *(t for p in over for t in p[1:4])]
        with torch.no_grad():
            for p in over:
                p.magnitude[:3] = FAINT
        with torch.autocast(device, torch.bfloat16, enabled=factors is not None):
            ys = functional.dora_linears(x, over)
        dys = cotangents(ys)
        if consumer == "writes to y":
            ys = [torch.relu_(y) for y in ys]
        elif consumer == "gives y back":
            dys = [y.detach() if save_output else y.detach().clone() for y in ys]
        grads = torch.autograd.grad(ys, trained, dys)
        assert all(grad[consumer != "keeps y" : 3].all() for grad in grads[3::3])  # of a y that is 0 it is 0
        outcomes.append(dict(enumerate(grads)) | {f"faint {i}": grad[:3] for i, grad in enumerate(grads[3::3])})
    assert path == ["training"] * 2
    assert_near(*outcomes, torch.bfloat16)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("factors", [torch.float32, None])
def test_saved_output_over_a_packed_weight_is_the_single_layers(rank, factors, path, device):
    """Bit by bit, but for two gradients: that of x is accumulated here and added up there, and the magnitude's in rows
    with a faint g is summed in another order."""
    x, outcomes = activation(torch.bfloat16, device, (blocks.TOKENS, 64)), []
    (p,), _ = packed_layers(("dora",), device, factors, save_output=True)
    lora_A, lora_B = p.lora_A.detach()[:rank], p.lora_B.detach()[:, :rank].contiguous()
    norm = functional.norm_factored(p.weight, lora_A, lora_B, p.scaling)
    p = p._replace(lora_A=lora_A.requires_grad_(), lora_B=lora_B.requires_grad_(), weight_norm=norm)
    with torch.no_grad():
        p.magnitude[:3] = FAINT

    def alone():
        base, adapter = packed_product.product(x, p.weight), (p.lora_A, p.lora_B, p.magnitude)
        options = {"weight_norm": p.weight_norm, "scaling": p.scaling, "save_output": True, "weight": p.weight}
        return functional.dora_over(base, x, *adapter, **options)

    for layer in (lambda: functional.dora_linears(x, (p,))[0], alone):
        with torch.autocast(device, torch.bfloat16, enabled=factors is not None):
            y = layer()
        outcomes.append([y, *torch.autograd.grad(y, [p.lora_A, p.lora_B, p.magnitude, x], cotangents([y]))])
    assert path == ["training"]
    (*block, d_m, dx), (*single, d_m_alone, dx_alone) = outcomes
    assert all(map(torch.equal, (*block, d_m[3:]), (*single, d_m_alone[3:])))
    assert_near({"faint": d_m[:3]}, {"faint": d_m_alone[:3]}, torch.float16)
    assert_near({"x": dx}, {"x": dx_alone}, torch.bfloat16)


@pytest.mark.parametrize("x_is_trained", [True, False])
@pytest.mark.parametrize("piece", ["codes", "absmax", "nested_absmax"])
def test_a_packed_weight_that_has_been_written_to_is_refused(piece, x_is_trained, path, device):
    """With a saved output also where no product needs it: rows with a faint g read it."""
    over, _ = packed_layers(QKV, device, save_output=not x_is_trained)
    x = activation(torch.bfloat16, device, (blocks.TOKENS, 64)).requires_grad_(x_is_trained)
    ys = functional.dora_linears(x, over)
    getattr(over[0].weight, piece).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: the bitsandbytes 4-bit weight"):
        torch.autograd.backward(ys, cotangents(ys))


def test_bitsandbytes_makes_its_weights_dense(path, monkeypatch, device):
    """As its own kernels do, nested statistics or not, both tables; a table that it does not have, by the definition.

    Our kernel does, and where a mode looks on its own: both have the same bits.
    """
    library = pytest.importorskip("bitsandbytes")
    asked = []
    by_library = packed_product._by_bitsandbytes
    monkeypatch.setattr(packed_product, "_by_bitsandbytes", lambda *args: asked.append(args[1]) or by_library(*args))
    for quant_type, nested in itertools.product(("nf4", "fp4"), (True, False)):
        torch.manual_seed(0)
        weight = torch.randn(128, 256, dtype=torch.bfloat16, device=device)
        options = {"quant_type": quant_type, "compress_statistics": nested}
        layer = library.nn.Params4bit(weight, requires_grad=False, **options).to(device)
        if getattr(layer, "quant_state", None) is None:
            layer = layer._quantize(device)
        value = packed.of(layer)
        expected = library.functional.dequantize_4bit(layer.data, layer.quant_state)
        assert torch.equal(packed_product.dense(value, torch.bfloat16), expected)
        assert not asked
        other = value._replace(code=value.code.flip(0))
        with Ops():
            assert torch.equal(packed_product.dense(value, torch.bfloat16), expected)
            assert asked.pop() == quant_type
            assert torch.equal(packed_product.dense(other, torch.bfloat16), other.rows(0, 128))
        assert torch.equal(packed_product.dense(other, torch.bfloat16), other.rows(0, 128))
        assert not asked
