"""What a compiled backward makes again instead of keeping: pointwise functions of outputs that it keeps anyway.

The magnitude's gradient reads what the layer made. An activation of it, a product of two (a gated MLP's), its rotation
(of queries and keys) takes one pass to make again; kept as well, each is as large as what it was made of. The compiler
keeps all that a product or an attention reads in backward: it does not count on its inputs' being there. So it is given
a rule, as it has its own: what costs nothing but that pass is marked as a checkpoint's policy would mark it.
"""

import operator
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from dorac.ops.on_import import on_import

# What is smaller saves less than its launch is worth.
LEAST_BYTES = 2**20
# Another input is read beside a layer's output if it is so much smaller: g, a rotation's angles.
SMALL = 4


def register() -> None:
    """Gives Inductor the rule once it is imported."""
    on_import("torch._inductor.fx_passes.joint_graph", _register)


def _register(joint_graph: ModuleType) -> None:
    from torch._inductor.pattern_matcher import CallFunction, Ignored, register_graph_pattern

    ops = torch.ops.dorac
    for op in (ops.lora_b_backward.default, ops.scale_backward.default, ops.compose_backward.default):
        pattern = CallFunction(op, *(Ignored() for _ in op._schema.arguments))
        register_graph_pattern(pattern, pass_dict=joint_graph.pass_patterns[0])(_of_match)


def _of_match(match) -> None:
    """Marks the whole graph at its first match."""
    node = match.output_node()
    if "dorac_marked" not in node.graph.owning_module.meta:
        node.graph.owning_module.meta["dorac_marked"] = True
        for found in again(node.graph):
            found.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def again(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a joint graph that its backward is to make again."""
    backward = _backward(graph)
    kept = {
        argument
        for node in backward
        if _is_ours(node)
        for argument in node.all_input_nodes
        if argument not in backward and _is_ours(argument) and _bytes(argument)
    }
    made = dict.fromkeys(kept)  # out of what is kept by nothing but one pass
    for node in graph.nodes:
        if node in backward or node in made or not _is_one_pass(node):
            continue
        inputs, size = node.all_input_nodes, _bytes(node)
        if any(i in made for i in inputs) and all(i in made or 0 < SMALL * _bytes(i) <= size for i in inputs):
            made[node] = None
    given = {node for user in graph.find_nodes(op="output") for node in user.all_input_nodes}
    wanted: set[fx.Node] = set()
    for node in reversed(made):
        if node in kept or node in given or "recompute" in node.meta:
            continue
        is_read = any(user in backward and not _is_one_pass(user) for user in _readers(node))
        if any(user in wanted for user in node.users) or (is_read and _bytes(node) >= LEAST_BYTES):
            wanted.add(node)
            if not _is_view(node):
                yield node


def _backward(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes that depend on a gradient of an output, in their order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if node.op != "output" and (is_tangent or any(i in found for i in node.all_input_nodes)):
            found[node] = None
    return found


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads the node, or a view of it."""
    for user in node.users:
        if _is_view(user):
            yield from _readers(user)
        else:
            yield user


def _is_ours(node: fx.Node) -> bool:
    """Whether the node is a result of an op of dorac's."""
    op = _op(node)
    return op is not None and op.namespace == "dorac"


def _is_view(node: fx.Node) -> bool:
    op = _op(node)
    return op is not None and op.is_view


def _is_one_pass(node: fx.Node) -> bool:
    """Whether Inductor makes the node in one pass over its inputs, or in that of who reads it."""
    op = _op(node)
    return op is not None and (op.is_view or torch.Tag.pointwise in op.tags or op is torch.ops.aten.cat.default)


def _op(node: fx.Node) -> torch._ops.OpOverload | None:
    """Whose result, or one of whose results, the node is."""
    target = node.args[0].target if node.target is operator.getitem else node.target
    return target if isinstance(target, torch._ops.OpOverload) else None


def _bytes(node: fx.Node) -> int:
    """Of a dense tensor of known sizes; of anything else 0."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    size = value.numel() * value.element_size()
    return size if isinstance(size, int) else 0
