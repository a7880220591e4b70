"""Snapshots of what the compiler sees and of what it keeps for backward. Accept a change with EXPECTTEST_ACCEPT=1."""

import expecttest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

import dorac
from dorac import functional


def layer(bias: bool = True, **options) -> dorac.nn.DoraLinear:
    base = torch.nn.Linear(24, 32, bias=bias, dtype=torch.bfloat16)
    return dorac.nn.DoraLinear(base, r=4, init_lora_weights=False, **{"adapter_dtype": torch.bfloat16} | options)


def describe(node: torch.fx.Node) -> str:
    """``target: dtype[shape]``, without the names that differ between torch versions."""
    value = node.meta.get("val", node.meta.get("example_value"))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if not isinstance(value, torch.Tensor):
        return str(name)
    return f"{name}: {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def captured(module, *args) -> AotEagerAndRecordGraphs:
    backend = AotEagerAndRecordGraphs()
    torch.compile(module, fullgraph=True, backend=backend)(*args).sum().backward()
    assert len(backend.graphs) == len(backend.fw_graphs) == len(backend.bw_graphs) == 1
    return backend


def calls(graph: torch.fx.GraphModule) -> str:
    return "\n".join(describe(n) for n in graph.graph.nodes if n.op in ("call_function", "call_method"))


def saved_for_backward(backend: AotEagerAndRecordGraphs, outputs: int = 1) -> str:
    (output,) = (n for n in backend.fw_graphs[0].graph.nodes if n.op == "output")
    saved = [n for n in output.args[0][outputs:] if isinstance(n, torch.fx.Node)]
    kinds = ("input" if n.op == "placeholder" else n.target.__name__.partition(".")[0] for n in saved)
    return "\n".join(
        f"{kind}: {str(n.meta['val'].dtype).removeprefix('torch.')}{list(n.meta['val'].shape)}"
        for kind, n in zip(kinds, saved, strict=True)
    )


class TestGraph(expecttest.TestCase):
    def setUp(self):
        super().setUp()
        torch._dynamo.reset()
        self.x = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True)

    def test_dynamo_graph(self):
        """One op for the norm and one for the layer."""
        self.assertExpectedInline(
            calls(captured(layer(), self.x).graphs[0]),
            """\
ones: float32[]
mul: float32[]
to: float32[]
norm_factored: float32[32]
dora_linear: bfloat16[6, 32]""",
        )

    def test_saved_for_backward(self):
        """One activation (inner), x, h = x lora_A^T, and vectors; weights are inputs and cost nothing."""
        self.assertExpectedInline(
            saved_for_backward(captured(layer(), self.x)),
            """\
input: bfloat16[32, 24]
input: bfloat16[4, 24]
input: bfloat16[32, 4]
input: float32[32]
row_norm: float32[32]
view: bfloat16[6, 24]
detach: bfloat16[6, 4]
detach: bfloat16[6, 32]""",
        )

    def test_saved_with_dropout(self):
        """The mask and the dropped x more; the delta form still keeps one activation."""
        self.assertExpectedInline(
            saved_for_backward(captured(layer(lora_dropout=0.5), self.x)),
            """\
input: bfloat16[32, 24]
input: bfloat16[4, 24]
input: bfloat16[32, 4]
input: float32[32]
row_norm: float32[32]
getitem: bfloat16[6, 24]
getitem: bool[6, 24]
mm: bfloat16[6, 4]
mul: float32[32]
detach: bfloat16[6, 32]""",
        )

    def test_saved_with_float32_factors(self):
        """PEFT's default: x and h are kept in float32 for the low-rank branch."""
        self.assertExpectedInline(
            saved_for_backward(captured(layer(adapter_dtype=torch.float32), self.x)),
            """\
input: bfloat16[32, 24]
input: float32[4, 24]
input: float32[32, 4]
input: float32[32]
row_norm: float32[32]
_to_copy: float32[6, 24]
detach: float32[6, 4]
detach: bfloat16[6, 32]""",
        )

    def test_frozen_magnitude_saves_no_activation(self):
        module = layer()
        module.lora_magnitude_vector.requires_grad_(False)
        saved = saved_for_backward(captured(module, self.x)).splitlines()
        assert not [line for line in saved if line.endswith("[6, 32]")], saved

    def test_given_norm_leaves_no_norm_in_the_graph(self):
        module = layer()
        norm = functional.norm_factored(module.weight, module.lora_A, module.lora_B, module.scaling)

        def forward(x):
            return functional.dora_linear(
                x,
                module.weight,
                module.lora_A,
                module.lora_B,
                module.lora_magnitude_vector,
                module.bias,
                scaling=module.scaling,
                weight_norm=norm,
            )

        backend = captured(forward, self.x)
        assert "row_norm" not in calls(backend.fw_graphs[0])
        assert "dora_linear" in calls(backend.graphs[0])

    def test_norm_is_one_opaque_op(self):
        """Nothing of size out x in is allocated: the only such tensors in either graph are the weight and its views."""
        backend = captured(layer(), self.x)
        assert calls(backend.fw_graphs[0]).count("row_norm") == 1
        for graph in (backend.fw_graphs[0], backend.bw_graphs[0]):
            computed = [n for n in graph.graph.nodes if n.op == "call_function" and "val" in n.meta]
            large = {n.target for n in computed if getattr(n.meta["val"], "shape", None) in ((32, 24), (24, 32))}
            assert large <= {torch.ops.aten.detach.default, torch.ops.aten.t.default}, large
