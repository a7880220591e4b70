"""The probes of ops/front.py say what they are named for, and what of torch is not public is where dorac reads it."""

import private_names
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.testing._internal.logging_tensor import LoggingTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

if private_names.moved():
    pytest.fail("\n".join(private_names.moved()), pytrace=False)

from dorac.ops import front  # reads some of them when it is imported

LIBRARY = torch.library.Library("dorac_front_test", "DEF")
SEEN: dict[str, bool] = {}


def _body(x):
    SEEN.clear()
    SEEN.update(
        transform=front.under_transform(),
        exporting=front.exporting(),
        eager=front.all_eager(x),
        plain=front.all_plain(x, None),
        autocast=type(front.autocast_off(x)) is torch.autocast,
        dtype=front.autocast_dtype(x),
    )
    return x * 2


LIBRARY.define("probe(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("probe", _body, "CompositeImplicitAutograd")
LIBRARY.impl("probe", _body, "FuncTorchBatchedDecomposition")


def test_private_names():
    assert {name for names in private_names.PRIVATE.values() for name in names} == private_names.read()


def test_a_private_name_that_moved(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    (sentence,) = private_names.moved()
    assert sentence.startswith(f"torch {torch.__version__} has no torch._C._current_graph_task_id; ops/front.py asks")
    assert "look in torch/utils/checkpoint.py" in sentence


def probe(x):
    return torch.ops.dorac_front_test.probe(x)


def seen(**changed):
    plain_call = {
        "transform": False,
        "exporting": False,
        "eager": True,
        "plain": True,
        "autocast": False,
        "dtype": None,
    }
    assert plain_call | changed == SEEN


def test_plain_call():
    probe(torch.ones(3))
    seen()
    probe(torch.nn.Parameter(torch.ones(3)))
    seen()


def test_transforms():
    for call in (torch.vmap(probe), torch.func.grad(lambda x: probe(x).sum()), torch.func.jacrev(probe)):
        call(torch.ones(3))
        seen(transform=True)
    torch.func.jvp(probe, (torch.ones(3),), (torch.ones(3),))
    seen(transform=True)
    probe(torch.ones(3))
    seen()


def test_batched_gradients():
    """The vmap of torch.autograd's own, under which a gradient has no memory."""
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda dy: seen.append(front.unobserved()))
    torch.autograd.grad(y, x, torch.ones(2, 3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    assert seen == [False, True]


def test_dual_numbers():
    with forward_ad.dual_level():
        probe(forward_ad.make_dual(torch.ones(3), torch.ones(3)))
        seen(transform=True)
    probe(torch.ones(3))
    seen()


def test_compiling_is_plain_but_not_eager():
    torch.compile(probe, fullgraph=True, backend="aot_eager")(torch.ones(3, requires_grad=True))
    seen(eager=False)
    torch._dynamo.reset()
    torch.compile(lambda x: torch.vmap(probe)(x), fullgraph=True, backend="aot_eager")(torch.ones(3))
    seen(transform=True)


def test_exporting():
    class Probe(torch.nn.Module):
        def forward(self, x):
            return probe(x)

    for strict in (False, True):
        program = torch.export.export(Probe(), (torch.ones(3),), strict=strict)
        program.run_decompositions()
        seen(eager=False, exporting=True)
    probe(torch.ones(3))
    seen()


def test_subclasses_are_not_plain():
    class Subclass(torch.Tensor):
        pass

    assert not front.all_plain(torch.ones(3).as_subclass(Subclass))
    assert not front.all_eager(torch.ones(3), torch.ones(3).as_subclass(Subclass))


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe(torch.ones(3))
        seen(autocast=True, dtype=torch.bfloat16)
        probe(torch.ones(3, device="meta"))
        seen()


def test_kernels_take_cuda_tensors_alone():
    assert not front.has_kernels(torch.ones(3))
    assert not front.has_kernels(torch.ones(3, device="meta"), None)


@pytest.mark.gpu
def test_kernels_take_what_they_compute_in():
    half = torch.ones(3, device="cuda", dtype=torch.float16)
    assert front.has_kernels(half, None) == (torch.cuda.get_device_capability() >= (8, 0))
    assert not front.has_kernels(half, half.double())
    assert not front.has_kernels(half, torch.ones(3))


def test_symbolic_sizes_are_not_specialised():
    """A size that may lie on either side counts as large, and stays symbolic."""
    seen_sizes = []

    def function(x):
        seen_sizes.append(front.at_most(x.shape[0], 4))
        return x * 2

    torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="symbolic")(torch.ones(3, 5))
    function(torch.ones(3))
    function(torch.ones(5))
    assert seen_sizes == [False, True, False]


def test_backward():
    """Of a gradient's hook, and of what a reentrant checkpoint runs again."""
    seen = []
    x = torch.ones(3, requires_grad=True)

    def run(x):
        seen.append(front.in_backward())
        return x * 2

    y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=True).sum()
    x.register_hook(lambda grad: seen.append(front.in_backward()))
    y.backward()
    assert seen == [False, True, True]
    assert not front.in_backward()


@pytest.mark.gpu
def test_capturing():
    x = torch.ones(3, device="cuda")
    assert not front.capturing()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert front.capturing()
        x * 2
    assert not front.capturing()


def test_modes_over_ops():
    """Those of users, and not the tracers'."""

    def probes(*tensors):
        seen.append((front.unobserved(), front.seen_by_modes_alone()))
        return tensors

    seen, x = [], torch.ones(3)
    probes()
    for mode in (FlopCounterMode(display=False), LoggingTensorMode(), FakeTensorMode(), BaseTorchFunctionMode()):
        with mode:
            probes()
    with FlopCounterMode(display=False), BaseTorchFunctionMode():
        probes()
    for kind in ("real", "fake", "symbolic"):
        make_fx(probes, tracing_mode=kind)(x)
    make_fx(probes, pre_dispatch=True)(x)
    functionalize(probes)(x)
    torch.vmap(probes)(x)
    assert seen == [(True, True), *[(False, True)] * 2, *[(False, False)] * 9]


class _Asked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        SEEN["saves for itself"] = front.saves_for_itself()
        ctx.save_for_backward(x.exp())
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        SEEN["keeps graph"] = front.keeps_graph()
        return dy * 2


def test_a_graph_that_is_kept():
    x = torch.ones(3, requires_grad=True)
    y = _Asked.apply(x).sum()
    y.backward(retain_graph=True)
    assert SEEN["keeps graph"]
    y.backward()
    assert not SEEN["keeps graph"]


def test_who_gets_what_is_saved():
    """A checkpoint's hooks give what was computed again to backward alone; any other may keep it."""
    x = torch.ones(3, requires_grad=True)
    _Asked.apply(x)
    assert SEEN["saves for itself"]
    for reentrant in (False, True):
        y = checkpoint(_Asked.apply, x, use_reentrant=reentrant)
        assert SEEN["saves for itself"]
        y.sum().backward()
        assert SEEN["saves for itself"]
    with torch.autograd.graph.save_on_cpu():
        _Asked.apply(x)
        assert not SEEN["saves for itself"]
        checkpoint(_Asked.apply, x, use_reentrant=False)
        assert SEEN["saves for itself"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        _Asked.apply(x)
    assert not SEEN["saves for itself"]
