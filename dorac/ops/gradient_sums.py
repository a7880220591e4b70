"""Sums over the ranks of what compiled backwards leave: gradients of parameters that every rank holds.

In a traced graph those of a layer are one op. Where Inductor compiles it, the sums of all layers of the graph that
nothing else in it reads become one collective: each costs the host more than its bytes cost the GPUs. So the compiler
is given a rule, as it has its own; backends without it make a collective a layer.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, fx

from dorac.ops import collectives, horizontal
from dorac.ops.library import lib
from dorac.ops.on_import import on_import

# Of what one collective sums: as DDP's. More would let the first layers of a large graph wait for the last.
BUCKET_BYTES = 25 * 2**20

lib.define("gradient_sums(Tensor[] gradients, str group_name) -> Tensor[]")


@torch.library.register_fake("dorac::gradient_sums", lib=lib)
def _fake(gradients, group_name):
    return [gradient.new_empty(gradient.shape) for gradient in gradients]


def _sums(gradients, group_name):
    own = [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]
    return collectives.sums(own, dist.distributed_c10d._resolve_process_group(group_name))


lib.impl("gradient_sums", _sums, "CompositeExplicitAutograd")
_op = torch.ops.dorac.gradient_sums


def gradient_sums(gradients: Sequence[Tensor], group: collectives.Group) -> Sequence[Tensor]:
    """:func:`dorac.ops.collectives.sums` of last gradients, for code that is traced."""
    return _op([*gradients], group.group_name)


def register() -> None:
    """Gives Inductor the rule once it is imported."""
    on_import("torch._inductor.fx_passes.post_grad", _register)


def _register(post_grad: ModuleType) -> None:
    from torch._inductor.pattern_matcher import CallFunction, Ignored, register_graph_pattern

    pattern = CallFunction(_op.default, Ignored(), Ignored())
    register_graph_pattern(pattern, pass_dict=post_grad.pass_patterns[0])(_join)


def _join(match) -> None:
    """Puts collectives in the place of all nodes of the op in a graph, not of the one that was found alone."""
    for bucket in _buckets(match.output_node().graph):
        _lower(bucket)


def _buckets(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes that become one collective, in the order of the graph, which is that of all ranks.

    They are of one group and one dtype, and nothing but the graph's caller reads their results.
    """
    filled: dict[tuple, tuple[list[fx.Node], int]] = {}
    for node in graph.find_nodes(op="call_function", target=_op.default):
        gradients = [n.meta["val"] for n in node.args[0]]
        dtype = collectives.widest(gradients)
        size = sum(t.numel() for t in gradients) * dtype.itemsize
        if not isinstance(size, int) or any(user.op != "output" for item in node.users for user in item.users):
            yield [node]
            continue
        key = node.args[1], dtype, gradients[0].device
        nodes, so_far = filled.pop(key, ([], 0))
        if nodes and so_far + size > BUCKET_BYTES:
            yield nodes
            nodes, so_far = [], 0
        filled[key] = [*nodes, node], so_far + size
    yield from (nodes for nodes, _ in filled.values())


def _lower(nodes: Sequence[fx.Node]) -> None:
    """Puts one collective in the place of the nodes, where the last of them is."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    graph, group_name = nodes[-1].graph, nodes[0].args[1]
    given = [gradient for node in nodes for gradient in node.args[0]]
    dtypes = [gradient.meta["val"].dtype for gradient in given]
    dtype = collectives.widest([gradient.meta["val"] for gradient in given])
    casts = [g for g in given if _widens(g)] if len(given) > 1 else []
    gradients = [g.args[0] if g in casts else g for g in given]  # cast on their way into the buffer of all

    def total(tensor):
        summed = torch.ops._c10d_functional.all_reduce(tensor.contiguous(), "sum", group_name)
        return torch.ops._c10d_functional.wait_tensor(summed)

    def on_tensors(*tensors):
        if len(tensors) == 1:
            return [total(tensors[0])]
        parts = total(horizontal.flat(tensors, dtype)).split_with_sizes([t.numel() for t in tensors])
        # Copies: a gradient must not keep the others' memory, and a DTensor of a part cannot be copied (deepcopy).
        return [horizontal.copied(part.view(t.shape), own) for part, t, own in zip(parts, tensors, dtypes, strict=True)]

    with V.fake_mode:
        fakes = [gradient.meta["val"] for gradient in gradients]
        traced = make_fx(on_tensors, decomposition_table=select_decomp_table())(*fakes).graph
    places = dict(zip(traced.find_nodes(op="placeholder"), gradients, strict=True))
    with graph.inserting_before(nodes[-1]):
        summed = iter(graph.graph_copy(traced, places))
    for node in nodes:
        items = [next(summed) for _ in node.args[0]]
        for item in [*node.users]:
            item.replace_all_uses_with(items[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(node)
    for cast in dict.fromkeys(casts):
        if not cast.users:
            graph.erase_node(cast)


def _widens(node: fx.Node) -> bool:
    """Whether the node is a cast that loses nothing."""
    if node.target is not torch.ops.dorac.cast.default:
        return False
    return collectives.widest([n.meta["val"] for n in (node, node.args[0])]) is node.meta["val"].dtype
