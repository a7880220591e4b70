"""Snapshots of what the compiler sees and of what it keeps for backward. Accept a change with EXPECTTEST_ACCEPT=1."""

from types import SimpleNamespace
from unittest import mock

import expecttest
import torch
from contract import peft_layer
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition

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


def partitioned(function, *args) -> SimpleNamespace:
    """The joint graph of forward and backward, and what Inductor's partitioner makes of it."""
    found = SimpleNamespace()

    def partition(graph, inputs, **kwargs):
        found.joint = torch.fx.GraphModule(graph, fx_graph_cse(graph.graph))  # as the partitioner begins
        forward, backward = min_cut_rematerialization_partition(graph, inputs, **kwargs)
        found.fw_graphs = [forward]
        return forward, backward

    def run(graph, _):
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition)
    torch.compile(function, fullgraph=True, backend=backend)(*args).sum().backward()
    return found


def embedding() -> dorac.nn.DoraEmbedding:
    base = torch.nn.Embedding(40, 32, dtype=torch.bfloat16)
    return dorac.nn.DoraEmbedding(base, r=4, init_lora_weights=False, adapter_dtype=torch.bfloat16)


def conv2d() -> dorac.nn.DoraConv2d:
    base = torch.nn.Conv2d(3, 8, 3, dtype=torch.bfloat16)
    return dorac.nn.DoraConv2d(base, r=4, init_lora_weights=False, adapter_dtype=torch.bfloat16)


def peft_linear() -> torch.nn.Module:
    """With PEFT's default dtypes: float32 factors beside a half-precision base."""
    return peft_layer(lambda: torch.nn.Linear(24, 32, dtype=torch.bfloat16))(0.5, 4)


class TestGraph(expecttest.TestCase):
    def setUp(self):
        super().setUp()
        torch._dynamo.reset()
        self.x = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True)
        self.indices = torch.randint(40, (6,))
        self.images = torch.randn(2, 3, 6, 6, dtype=torch.bfloat16, requires_grad=True)

    def test_dynamo_graph(self):
        """One op for the norm and one for the layer."""
        self.assertExpectedInline(
            calls(captured(layer(), self.x).graphs[0]),
            """\
ones: float32[]
mul: float32[]
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
        """The mask more, and the dropped x in place of x; the delta form still keeps one activation."""
        self.assertExpectedInline(
            saved_for_backward(captured(layer(lora_dropout=0.5), self.x)),
            """\
input: bfloat16[32, 24]
input: bfloat16[4, 24]
input: bfloat16[32, 4]
input: float32[32]
row_norm: float32[32]
getitem: bool[6, 24]
view: bfloat16[6, 24]
detach: bfloat16[6, 4]
detach: bfloat16[6, 32]""",
        )

    def test_saved_with_dropout_on_the_low_rank(self):
        """As the other meaning of dropout."""
        self.assertExpectedInline(
            saved_for_backward(captured(layer(lora_dropout=0.5, dropout_on="low_rank"), self.x)),
            """\
input: bfloat16[32, 24]
input: bfloat16[4, 24]
input: bfloat16[32, 4]
input: float32[32]
row_norm: float32[32]
getitem: bool[6, 24]
view: bfloat16[6, 24]
detach: bfloat16[6, 4]
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

    def test_cached_norm_leaves_no_norm_in_the_graph(self):
        module = layer()
        with dorac.cache_norms(module):
            self.assertExpectedInline(
                calls(captured(module, self.x).graphs[0]),
                """\
ones: float32[]
mul: float32[]
dora_linear: bfloat16[6, 32]""",
            )

    def test_joint_graph(self):
        """Four products forward, with the norm beside them, and six backward: no product is made twice."""
        self.assertExpectedInline(
            calls(partitioned(layer(), self.x).joint),
            """\
ones.default: float32[]
mul.Tensor: float32[]
detach.default: bfloat16[32, 24]
detach.default: bfloat16[4, 24]
detach.default: bfloat16[32, 4]
detach.default: float32[]
row_norm.default: float32[32]
t.default: bfloat16[24, 32]
mm.default: bfloat16[6, 32]
le.Scalar: bool[32]
scalar_tensor.default: float32[]
where.self: float32[32]
div.Tensor: float32[32]
where.self: float32[32]
view.default: bfloat16[6, 24]
t.default: bfloat16[24, 4]
mm.default: bfloat16[6, 4]
view.default: bfloat16[6, 32]
t.default: bfloat16[4, 32]
mm.default: bfloat16[6, 32]
_to_copy.default: float32[6, 32]
_to_copy.default: float32[6, 32]
mul.Tensor: float32[6, 32]
add.Tensor: float32[6, 32]
mul.Tensor: float32[6, 32]
_to_copy.default: float32[32]
add.Tensor: float32[6, 32]
_to_copy.default: bfloat16[6, 32]
_to_copy.default: bfloat16[6, 32]
detach.default: bfloat16[6, 4]
detach.default: bfloat16[6, 32]
view.default: bfloat16[6, 32]
view.default: bfloat16[6, 32]
detach.default: bfloat16[6, 4]
detach.default: bfloat16[6, 32]
_to_copy.default: float32[6, 32]
_to_copy.default: float32[6, 32]
mul.Tensor: float32[6, 32]
sum.dim_IntList: float32[32]
div.Tensor: float32[32]
where.self: float32[32]
scalar_tensor.default: float32[]
where.self: float32[32]
mul.Tensor: float32[6, 32]
_to_copy.default: bfloat16[6, 32]
t.default: bfloat16[32, 6]
mm.default: bfloat16[32, 4]
_to_copy.default: float32[32, 4]
mul.Tensor: float32[32, 4]
_to_copy.default: bfloat16[32, 4]
mm.default: bfloat16[6, 4]
_to_copy.default: float32[6, 4]
mul.Tensor: float32[6, 4]
_to_copy.default: bfloat16[6, 4]
t.default: bfloat16[4, 6]
mm.default: bfloat16[4, 24]
mm.default: bfloat16[6, 24]
mm.default: bfloat16[6, 24]
add.Tensor: bfloat16[6, 24]
view.default: bfloat16[6, 24]""",
        )

    def test_saved_beside_a_consumer_that_saves_its_input(self):
        """Where y is computed from inner as it is saved, gelu recomputes y: one activation, not two."""
        module = layer()
        with mock.patch.object(dorac.ops.linear, "route", return_value="accumulate"):  # the route on CUDA
            saved = saved_for_backward(partitioned(lambda x: torch.nn.functional.gelu(module(x)), self.x))
        assert saved.count("[6, 32]") == 1, saved
        wide = layer(adapter_dtype=torch.float32).float()
        torch._dynamo.reset()
        saved = saved_for_backward(partitioned(lambda x: torch.nn.functional.gelu(wide(x)), self.x.float()))
        assert saved.count("[6, 32]") == 1, saved

    def test_saved_where_the_result_is_rounded_once(self):
        """Without the kernels y comes from inner before its rounding to half precision: gelu has to keep y too."""
        module = layer()
        saved = saved_for_backward(partitioned(lambda x: torch.nn.functional.gelu(module(x)), self.x))
        assert saved.count("[6, 32]") == 2, saved

    def test_embedding_dynamo_graph(self):
        """Lookups, one op for the norm and one for compose; the rest makes g."""
        self.assertExpectedInline(
            calls(captured(embedding(), self.indices).graphs[0]),
            """\
t: bfloat16[32, 40]
embedding: bfloat16[6, 32]
ones: float32[]
mul: float32[]
t: bfloat16[32, 40]
to: float32[]
norm_factored: float32[32]
t: bfloat16[40, 4]
embedding: bfloat16[6, 4]
linear: bfloat16[6, 32]
to: float32[32]
le: bool[32]
to: float32[32]
where: float32[32]
truediv: float32[32]
where: float32[32]
to: float32[]
compose: bfloat16[6, 32]""",
        )

    def test_embedding_saved(self):
        """The looked-up rows of lora_A for d_lora_B, inner for the magnitude; nothing of the size of the table."""
        self.assertExpectedInline(
            saved_for_backward(partitioned(embedding(), self.indices)),
            """\
input: bfloat16[32, 4]
input: float32[32]
input: int64[6]
row_norm: float32[32]
embedding: bfloat16[6, 4]
detach: bfloat16[6, 32]""",
        )

    def test_embedding_joint_graph(self):
        self.assertExpectedInline(
            calls(partitioned(embedding(), self.indices).joint),
            """\
embedding.default: bfloat16[6, 32]
ones.default: float32[]
mul.Tensor: float32[]
t.default: bfloat16[32, 40]
detach.default: bfloat16[32, 40]
detach.default: bfloat16[4, 40]
detach.default: bfloat16[32, 4]
detach.default: float32[]
row_norm.default: float32[32]
t.default: bfloat16[40, 4]
embedding.default: bfloat16[6, 4]
t.default: bfloat16[4, 32]
mm.default: bfloat16[6, 32]
le.Scalar: bool[32]
scalar_tensor.default: float32[]
where.self: float32[32]
div.Tensor: float32[32]
where.self: float32[32]
view.default: bfloat16[6, 32]
view.default: bfloat16[6, 32]
_to_copy.default: float32[6, 32]
_to_copy.default: float32[6, 32]
mul.Tensor: float32[6, 32]
add.Tensor: float32[6, 32]
mul.Tensor: float32[6, 32]
_to_copy.default: bfloat16[6, 32]
_to_copy.default: bfloat16[6, 32]
detach.default: bfloat16[6, 32]
view.default: bfloat16[6, 32]
view.default: bfloat16[6, 32]
detach.default: bfloat16[6, 32]
_to_copy.default: float32[6, 32]
mul.Tensor: float32[32]
mul.Tensor: float32[6, 32]
_to_copy.default: bfloat16[6, 32]
_to_copy.default: float32[6, 32]
mul.Tensor: float32[6, 32]
sum.dim_IntList: float32[32]
view.default: bfloat16[6, 32]
scalar_tensor.default: float32[]
where.self: float32[32]
div.Tensor: float32[32]
t.default: bfloat16[32, 6]
mm.default: bfloat16[32, 4]
t.default: bfloat16[4, 32]
t.default: bfloat16[32, 4]
mm.default: bfloat16[6, 4]
t.default: bfloat16[32, 4]
embedding_dense_backward.default: bfloat16[40, 4]
t.default: bfloat16[4, 40]""",
        )

    def test_conv2d_dynamo_graph(self):
        """Three convolutions, one op for the norm and one for compose."""
        self.assertExpectedInline(
            calls(captured(conv2d(), self.images).graphs[0]),
            """\
flatten: float32[8]
ones: float32[]
mul: float32[]
flatten: bfloat16[8, 27]
flatten: bfloat16[4, 27]
flatten: bfloat16[8, 4]
to: float32[]
norm_factored: float32[8]
flatten: float32[8]
to: float32[8]
le: bool[8]
to: float32[8]
where: float32[8]
truediv: float32[8]
where: float32[8]
conv2d: bfloat16[2, 8, 4, 4]
to: bfloat16[2, 3, 6, 6]
conv2d: bfloat16[2, 4, 4, 4]
conv2d: bfloat16[2, 8, 4, 4]
to: float32[]
compose: bfloat16[2, 8, 4, 4]""",
        )

    def test_conv2d_saved(self):
        """As the linear layer: x, h (the first low-rank convolution) and inner."""
        self.assertExpectedInline(
            saved_for_backward(partitioned(conv2d(), self.images)),
            """\
input: bfloat16[8, 3, 3, 3]
input: bfloat16[4, 3, 3, 3]
input: bfloat16[8, 4, 1, 1]
input: float32[1, 8, 1, 1]
input: bfloat16[2, 3, 6, 6]
row_norm: float32[8]
convolution: bfloat16[2, 4, 4, 4]
detach: bfloat16[2, 8, 4, 4]""",
        )

    def test_conv2d_joint_graph(self):
        self.assertExpectedInline(
            calls(partitioned(conv2d(), self.images).joint),
            """\
view.default: float32[8]
ones.default: float32[]
mul.Tensor: float32[]
view.default: bfloat16[8, 27]
view.default: bfloat16[4, 27]
view.default: bfloat16[8, 4]
detach.default: bfloat16[8, 27]
detach.default: bfloat16[4, 27]
detach.default: bfloat16[8, 4]
detach.default: float32[]
row_norm.default: float32[8]
le.Scalar: bool[8]
scalar_tensor.default: float32[]
where.self: float32[8]
div.Tensor: float32[8]
where.self: float32[8]
convolution.default: bfloat16[2, 8, 4, 4]
convolution.default: bfloat16[2, 4, 4, 4]
convolution.default: bfloat16[2, 8, 4, 4]
view.default: float32[8, 1, 1]
view.default: bfloat16[8, 1, 1]
_to_copy.default: float32[2, 8, 4, 4]
_to_copy.default: float32[2, 8, 4, 4]
mul.Tensor: float32[2, 8, 4, 4]
add.Tensor: float32[2, 8, 4, 4]
mul.Tensor: float32[2, 8, 4, 4]
_to_copy.default: float32[8, 1, 1]
add.Tensor: float32[2, 8, 4, 4]
_to_copy.default: bfloat16[2, 8, 4, 4]
_to_copy.default: bfloat16[2, 8, 4, 4]
detach.default: bfloat16[2, 8, 4, 4]
view.default: bfloat16[2, 8, 4, 4]
view.default: bfloat16[2, 8, 4, 4]
detach.default: bfloat16[2, 8, 4, 4]
_to_copy.default: float32[2, 8, 4, 4]
mul.Tensor: float32[2, 8, 4, 4]
mul.Tensor: float32[8, 1, 1]
mul.Tensor: float32[2, 8, 4, 4]
_to_copy.default: bfloat16[2, 8, 4, 4]
_to_copy.default: bfloat16[2, 8, 4, 4]
_to_copy.default: float32[2, 8, 4, 4]
mul.Tensor: float32[2, 8, 4, 4]
sum.dim_IntList: float32[8]
convolution_backward.default
getitem: bfloat16[2, 4, 4, 4]
getitem: bfloat16[8, 4, 1, 1]
convolution_backward.default
getitem: bfloat16[2, 3, 6, 6]
getitem: bfloat16[4, 3, 3, 3]
convolution_backward.default
getitem: bfloat16[2, 3, 6, 6]
add.Tensor: bfloat16[2, 3, 6, 6]
scalar_tensor.default: float32[]
where.self: float32[8]
div.Tensor: float32[8]
view.default: float32[1, 8, 1, 1]""",
        )

    def test_peft_dynamo_graph(self):
        """The layer in one call, on the drop-in: the base layer is not run beside it. FSDP's import changes nothing."""
        import torch.distributed.fsdp  # noqa: F401

        self.assertExpectedInline(
            calls(captured(peft_linear(), self.x).graphs[0]),
            """\
ones: float32[]
mul: float32[]
norm_factored: float32[32]
dora_linear: bfloat16[6, 32]""",
        )

    def test_peft_saved(self):
        """What a layer of ``dorac.nn`` with float32 factors keeps."""
        self.assertExpectedInline(
            saved_for_backward(captured(peft_linear(), self.x)),
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

    def test_peft_joint_graph(self):
        self.assertExpectedInline(
            calls(partitioned(peft_linear(), self.x).joint),
            """\
ones.default: float32[]
mul.Tensor: float32[]
detach.default: bfloat16[32, 24]
detach.default: float32[4, 24]
detach.default: float32[32, 4]
detach.default: float32[]
row_norm.default: float32[32]
t.default: bfloat16[24, 32]
mm.default: bfloat16[6, 32]
le.Scalar: bool[32]
scalar_tensor.default: float32[]
where.self: float32[32]
div.Tensor: float32[32]
where.self: float32[32]
view.default: bfloat16[6, 24]
_to_copy.default: float32[6, 24]
t.default: float32[24, 4]
mm.default: float32[6, 4]
view.default: bfloat16[6, 32]
t.default: float32[4, 32]
mm.default: float32[6, 32]
_to_copy.default: float32[6, 32]
mul.Tensor: float32[6, 32]
add.Tensor: float32[6, 32]
mul.Tensor: float32[6, 32]
sub.Tensor: float32[32]
mul.Tensor: float32[6, 32]
mul.Tensor: float32[6, 32]
mul.Tensor: float32[6, 32]
add.Tensor: float32[6, 32]
ge.Scalar: bool[32]
le.Scalar: bool[32]
bitwise_and.Tensor: bool[32]
abs.default: float32[6, 32]
lt.Scalar: bool[6, 32]
bitwise_and.Tensor: bool[6, 32]
add.Tensor: float32[6, 32]
where.self: float32[6, 32]
_to_copy.default: float32[32]
add.Tensor: float32[6, 32]
_to_copy.default: bfloat16[6, 32]
_to_copy.default: bfloat16[6, 32]
detach.default: float32[6, 4]
detach.default: bfloat16[6, 32]
view.default: bfloat16[6, 32]
view.default: bfloat16[6, 32]
detach.default: float32[6, 4]
detach.default: bfloat16[6, 32]
_to_copy.default: float32[6, 32]
_to_copy.default: float32[6, 32]
mul.Tensor: float32[6, 32]
sum.dim_IntList: float32[32]
div.Tensor: float32[32]
where.self: float32[32]
scalar_tensor.default: float32[]
where.self: float32[32]
mul.Tensor: float32[6, 32]
_to_copy.default: bfloat16[6, 32]
t.default: float32[32, 6]
mm.default: float32[32, 4]
mul.Tensor: float32[32, 4]
mm.default: float32[6, 4]
mul.Tensor: float32[6, 4]
t.default: float32[4, 6]
mm.default: float32[4, 24]
mm.default: float32[6, 24]
_to_copy.default: bfloat16[6, 24]
mm.default: bfloat16[6, 24]
add.Tensor: bfloat16[6, 24]
view.default: bfloat16[6, 24]""",
        )
