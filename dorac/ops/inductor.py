"""What Inductor generates for the leaf ops on CUDA: their buffers and the launches of their kernels, no op in Python.

Until Inductor lowers it, a graph holds the leaf op itself. So the partitioner, selective checkpointing, FLOP counters
and the other backends see one op, whatever it launches, and every decision of theirs is the same as for an opaque op.
(Decomposed earlier, by ``triton_op``, each kernel is a higher-order op of its own: a checkpoint policy cannot name it,
symbolic sizes are guarded on, and ``low_rank_linear`` becomes an ``addmm`` that copies what it adds to.)

The lowering traces the function that launches the kernels in eager, with ``wrap_triton`` in the place of the launch
(``kernels/launch.py``), and inlines that graph, as torch does for the ops of its ``custom_op`` autotuning. The PTX is
the same for both ways of launching.

Symbolic sizes keep the op: its function chooses tiles, and whether they reach over an edge, from the sizes of the call.
So does what has no kernels: other devices and dtypes, no elements.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dorac.ops import front, horizontal
from dorac.ops.compose import magnitude_scale
from dorac.ops.horizontal import copy
from dorac.ops.library import inlined
from dorac.ops.on_import import on_import

# Of one launch at most: the layers of a Llama's block, under autocast. All of a deep model in the first would let the
# GPU wait for the allocation of its results, and hold them until the last block.
PARTS = 24

_HORIZONTAL = {torch.ops.dorac.mag_scale: magnitude_scale, torch.ops.dorac.cast: copy}


def register() -> None:
    """Registers the lowerings once Inductor is imported, which takes seconds."""
    on_import("torch._inductor.lowering", _register)
    on_import("torch._inductor.fx_passes.post_grad", _register_order)


def _register(lowering) -> None:
    from torch._library.utils import get_layout_constraint_tag

    for op, function in inlined.items():
        # Its arguments have the strides that any custom op's have.
        constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
        lowering.add_layout_constraint(op, constraint)
        lowering.register_lowering(op, type_promotion_kind=None)(_launches(lowering, op, function))
    for op, function in _HORIZONTAL.items():
        lower = _horizontal(lowering, op.default, function)
        lowering.register_lowering(op.default, type_promotion_kind=None)(lower)
    flat = torch.ops.dorac.flat.default
    lowering.register_lowering(flat, type_promotion_kind=None)(functools.partial(_flat, lowering))
    for op, lower in (
        (torch.ops.dorac.low_rank_linear, _low_rank_linear),
        (torch.ops.dorac.delta_linear, _delta_linear),
    ):
        lowering.register_lowering(op.default, type_promotion_kind=None)(lower(lowering, op.default))


def _register_order(post_grad) -> None:
    from torch._inductor.pattern_matcher import CallFunction, Ignored, register_graph_pattern

    for op in _HORIZONTAL:
        pattern = CallFunction(op.default, Ignored(), Ignored())
        register_graph_pattern(pattern, pass_dict=post_grad.pass_patterns[2])(_of_match)


def _of_match(match) -> None:
    """Puts all of a graph's in order at its first match."""
    graph = match.output_node().graph
    if "dorac_ordered" not in graph.owning_module.meta:
        graph.owning_module.meta["dorac_ordered"] = True
        horizontal.late(graph)


def _launches(lowering, op: torch._ops.OpOverload, function: Callable) -> Callable:
    """The lowering of ``op`` to what ``function`` does."""
    call_op = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(*args, **named):
        from torch._inductor.ir import ExternKernel, IRNode, ir_node_to_tensor
        from torch._inductor.virtualized import V

        args = (*args, *(named.get(a.name, a.default_value) for a in op._schema.arguments[len(args) :]))
        places = [i for i, a in enumerate(args) if isinstance(a, IRNode)]
        with V.fake_mode:
            fakes = [ir_node_to_tensor(ExternKernel.realize_input(args[i])) for i in places]
            sizes = [n for t in fakes for n in (*t.shape, *t.stride())]
            static = all(isinstance(n, int) for n in sizes) and all(t.numel() for t in fakes)
            if not (static and fakes[0].is_cuda and front.has_kernels(*fakes)):
                return call_op(*args)
        return _inlined(op, function, args, dict(zip(places, fakes, strict=True)))

    return lower


def _inlined(op: torch._ops.OpOverload, function: Callable, args: Sequence[object], fakes: dict[int, Tensor]) -> object:
    """What ``function`` does with ``args``, as nodes; ``fakes`` stand for those of them that are tensors."""
    from torch._inductor.codegen.subgraph import inline_subgraph_to_ir_nodes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    def on_tensors(*tensors):
        given = dict(zip(fakes, tensors, strict=True))
        return function(*(given.get(i, a) for i, a in enumerate(args)))

    with V.fake_mode:
        graph = make_fx(on_tensors, decomposition_table=select_decomp_table())(*fakes.values())
    return inline_subgraph_to_ir_nodes(graph, [args[i] for i in fakes], op.name())


def _horizontal(lowering, op: torch._ops.OpOverload, function: Callable) -> Callable:
    """The lowering of ``op``, a pass of ``function`` over a parameter or its gradient, to a part of one launch.

    Inductor makes one of what is in a list of its graph's. Nothing may lie between two parts of it: those of one kind
    of list read inputs of the graph, those of another give outputs that nothing in the graph reads.
    """
    from torch._inductor.codegen.common import BackendFeature

    def lower(*args):
        from torch._inductor.ir import IRNode, ir_node_to_tensor
        from torch._inductor.virtualized import V

        with V.fake_mode:
            fakes = {i: ir_node_to_tensor(a) for i, a in enumerate(args) if isinstance(a, IRNode)}
        result = _inlined(op, function, args, fakes)
        result.realize()
        static = all(all(isinstance(n, int) for n in t.shape) and t.numel() for t in fakes.values())
        if static and V.graph.has_feature(result.get_device(), BackendFeature.FOREACH):
            read = V.graph.get_buffer(result.get_name()).get_read_names()
            if read <= V.graph.graph_inputs.keys() - V.graph.mutated_buffers:
                _join(V.graph.lists, "dorac_in", result.get_operation_name())
            elif all(user.op == "output" for user in V.graph.current_node.users):
                _join(V.graph.lists, "dorac_out", result.get_operation_name())
        return result

    return lower


def _join(lists: dict[str, list[str]], kind: str, operation: str) -> None:
    """Adds the operation to the last list of its kind, or to a new one where that is full."""
    own = [members for name, members in lists.items() if name.startswith(kind)]
    if not own or len(own[-1]) == PARTS:
        own.append(lists.setdefault(f"{kind}_{len(own)}", []))
    own[-1].append(operation)


def _flat(lowering, tensors, dtype):
    """The tensors as parts of one buffer, all written in one launch."""
    from torch._inductor import ir
    from torch._inductor.codegen.common import BackendFeature
    from torch._inductor.virtualized import V

    parts = [lowering.view(lowering.to_dtype(t, dtype), [math.prod(t.get_size())]) for t in tensors]
    result = ir.TensorBox(ir.ConcatKernel.create(parts, 0))
    writes = [
        b for b in result.data.data.inputs if isinstance(b, ir.ComputedBuffer) and isinstance(b.data, ir.Pointwise)
    ]
    if len(writes) > 1 and V.graph.has_feature(result.get_device(), BackendFeature.FOREACH):
        V.graph.register_operation_list([b.get_operation_name() for b in writes])
    return result


def _low_rank_linear(lowering, op: torch._ops.OpOverload) -> Callable:
    """``h lora_B^T``, and ``x W^T`` added to it in place: the products of the op, and no pass between them.

    The compiler's own ``addmm`` writes to a buffer of its own, into which cuBLAS first copies what is added.
    """
    aten = torch.ops.aten
    call_op = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(x, weight, h, lora_B):
        from torch._inductor.virtualized import V

        if V.graph.cpp_wrapper:
            return call_op(x, weight, h, lora_B)
        mm, transpose = lowering.lowerings[aten.mm.default], lowering.lowerings[aten.permute.default]
        inner = mm(h, transpose(lora_B, [1, 0]))
        inner.realize()
        _add_product()(inner, x, transpose(weight, [1, 0]))
        return inner

    return lower


def _delta_linear(lowering, op: torch._ops.OpOverload) -> Callable:
    """``x_adapter W^T``, the kernel that makes the change to the layer of it, and ``x W^T`` added to that in place."""
    aten = torch.ops.aten
    call_op = lowering.fallback_handler(op, add_to_fallback_set=False)

    def lower(x, x_adapter, weight, *others):
        from torch._inductor.virtualized import V

        if V.graph.cpp_wrapper:
            return call_op(x, x_adapter, weight, *others)
        mm, transpose = lowering.lowerings[aten.mm.default], lowering.lowerings[aten.permute.default]
        columns = transpose(weight, [1, 0])
        compose = lowering.lowerings[torch.ops.dorac.up_compose_forward.default]
        y, inner = compose(mm(x_adapter, columns), *others, True)
        y.realize()
        _add_product()(y, x, columns)
        return y, inner

    return lower


@functools.cache
def _add_product() -> type:
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    class AddProduct(ir.ExternKernel):
        """``target += left @ right``, a node of generated code."""

        def __init__(self, target, left, right):
            inputs = [self.realize_input(t) for t in (target, left, right)]
            super().__init__(None, ir.NoneLayout(device=target.get_device()), self.unwrap_storage(inputs))
            V.graph.mark_buffer_mutated(target.get_name())
            self.name = V.graph.register_buffer(self)
            V.graph.register_operation(self)

        def codegen(self, wrapper):
            target, left, right = (t.codegen_reference() for t in self.inputs)
            wrapper.writeline(f"extern_kernels.addmm({target}, {left}, {right}, out={target})")

        def should_allocate(self):
            return False

        def get_mutation_names(self):
            return [self.input_name(0)]

    return AddProduct
