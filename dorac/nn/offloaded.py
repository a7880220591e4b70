"""The forward of an adapted layer whose base layer has a hook of accelerate's, and the norms that it may use.

The adapted layer reads the base layer's weight and does not call that layer. So it does what the hook does around the
base layer's forward: see :mod:`dorac.offload`. accelerate brings a weight in as a new parameter each time. A kept norm
(:mod:`dorac.nn.norm_cache`) is then that of the tensor on the host of which this is a copy, and is used while that
stays as it is; of what lies on disk none is kept. A weight that was brought in is not kept alive.
"""

import contextlib
import operator
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dorac import offload
from dorac.nn import compiled_norm, norm_cache
from dorac.nn.keeper import Keeper, KeptNorm
from dorac.nn.moments import Moment

_REASON = "accelerate brings the weights of this layer in and takes them away again, which a graph cannot hold"
_Originals = Mapping[nn.Module, Mapping[str, Tensor | None]]


def forward(layer: nn.Module, keepers: Iterable[Keeper], *args: object, **kwargs: object) -> Tensor:
    """The forward of a layer with a ``base_layer`` that accelerate has hooked, its own and that hook's.

    Args:
        keepers: of the layer's norms.

    Raises:
        RuntimeError: the adapter is offloaded, too, and would be trained: the gradients would be those of copies.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(forward, reason=_REASON)(layer, keepers, *args, **kwargs)
    base = layer._modules["base_layer"]
    inner = [m for m in layer.modules() if m is not layer and m is not base and offload.is_hooked(m)]
    idle = layer.merged or getattr(layer, "disable_adapters", False)
    if layer.training and torch.is_grad_enabled() and not idle:
        _refuse_lost_gradients([layer, *inner])
    originals = {module: offload.originals(module) for module in (layer, base, *inner)}
    hook, y = vars(base)["_hf_hook"], None
    with contextlib.ExitStack() as stack:
        for module in inner:
            stack.enter_context(offload.plain(module))
        try:
            args, kwargs = hook.pre_forward(base, *args, **kwargs)
            with offload.bare(base), _norms(keepers, originals, take=True):
                y = type(layer).forward(layer, *args, **kwargs)
        finally:
            y = hook.post_forward(base, y)
    return y


def _refuse_lost_gradients(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if offload.is_offloaded(module) and any(p.requires_grad for p in module.parameters(recurse=False)):
            offload.put_away(module)
            raise RuntimeError(
                f"{offload.name_of(module)}: the adapter is offloaded by accelerate, which trains nothing: dispatch "
                "the model first and adapt it then, or call eval() if it is not to be trained"
            )


@contextlib.contextmanager
def norms_of(keeper: Keeper, layer: nn.Module) -> Iterator[None]:
    """All tensors of a layer there for the block, and its norm as a forward would find it."""
    modules = [module for module in layer.modules() if offload.is_offloaded(module)]
    originals = {module: offload.originals(module) for module in modules}
    with offload.onloaded(*modules), _norms([keeper], originals, take=False):
        yield


@contextlib.contextmanager
def _norms(keepers: Iterable[Keeper], originals: _Originals, *, take: bool) -> Iterator[None]:
    """The kept norms as those of the tensors that are there for the block.

    Args:
        take: whether a norm may be taken that is not there.
    """
    pairs = [(keeper, kept) for keeper in keepers if (kept := keeper.kept) is not None]
    by_id = {id(m.get_parameter(name)): t for m, of in originals.items() for name, t in of.items()} if pairs else {}
    for keeper, kept in pairs:
        _follow(keeper, kept, by_id, take)
    try:
        yield
    finally:
        for keeper, kept in pairs:
            if kept.of is not None:
                kept.of = tuple(None if id(t) in by_id else t for t in kept.of)
                compiled_norm.tell(keeper)


def _follow(keeper: Keeper, kept: KeptNorm, by_id: Mapping[int, Tensor | None], take: bool) -> None:
    inputs = keeper.norm_inputs()
    lasting = [by_id.get(id(t), t) for t in inputs]  # what outlives the block
    if all(map(operator.is_, inputs, lasting)):
        return
    if any(t is None for t in lasting) or keeper.packed_base() is not None:
        norm_cache.suspend([keeper])
    elif _is_of(kept, inputs, lasting):
        kept.of = *inputs, kept.of[-1]
        compiled_norm.tell(keeper)
        if kept.at is not None:
            kept.at = Moment(inputs, kept.at.grad_mode)
    elif take:  # the forward takes it
        norm_cache.doubt([keeper])
        kept.of, kept.source = (*inputs, kept.norm), Moment(lasting)


def _is_of(kept: KeptNorm, inputs: tuple[Tensor, ...], lasting: list[Tensor]) -> bool:
    """Whether the kept norm was taken of these tensors, as they are, or of copies of them."""
    if kept.of is None or kept.source is None or kept.source.passed(lasting):
        return False
    triples = zip(inputs, lasting, kept.of, strict=False)  # the norm comes last
    return all(t is before for t, lasts, before in triples if t is lasts)
