"""Modules that compute their adapted layers together: what :func:`dorac.fuse` makes of MLPs and of attention.

A fused module has a subclass of its class, with the same name: parameters, children, hooks and identity stay. Unlike a
forward of the instance's own, a class goes with every copy: of deepcopy and pickle, of ``nn.DataParallel``, whose
replicas would run the forward of another device's module. In each call the subclass asks its children, by their names,
whether they can be computed together now; if one says no, and in compiled code, where the compiler fuses across layers
itself, it runs the forward of the class.
"""

import copyreg
import functools
import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dorac import functional
from dorac.nn import linear4bit, recorded, shared
from dorac.nn.linear import is_conv1d
from dorac.ops import front
from dorac.undo import Undo

_BLOCK = "dorac_block"  # where a fused module has what it computes

# Children that project one input, the one that may have another input first.
TRIPLES = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)
JOINED = ("qkv_proj", "query_key_value", "c_attn", "qkv", "Wqkv", "in_proj")
# Arguments of an attention's forward that keys and values are of if they are given.
NOT_KNOWN = "it is neither an MLP nor an attention that is known"
_OTHER_STATES = ("key_value_states", "encoder_hidden_states")


class _Fused(nn.Module):
    """Base of the subclasses; ``stock`` is the class that the module had."""

    stock: type[nn.Module]
    kind: type["_Fused"]

    def __reduce_ex__(self, protocol: int) -> tuple:
        function, arguments, *rest = super().__reduce_ex__(protocol)
        if function is not copyreg.__newobj__ or type(self) is not _class(self.kind, self.stock):
            return function, arguments, *rest
        return _new, (self.kind, self.stock), *rest


@functools.cache
def _class(kind: type[_Fused], stock: type[nn.Module]) -> type[_Fused]:
    names = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(stock.__name__, (kind, stock), names | {"stock": stock, "kind": kind})


def _new(kind: type[_Fused], stock: type[nn.Module]) -> _Fused:
    cls = _class(kind, stock)
    return cls.__new__(cls)


class FusedMLP(_Fused):
    """An MLP as one :func:`dorac.functional.dora_mlp`."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        block = vars(self).get(_BLOCK)
        if block is not None and name != "training" and name[:1] != "_":
            block.forward = None  # the forward may read it

    def forward(self, *args, **kwargs) -> Tensor:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            y = self._fused(*args)
            if y is not None:
                return y
        return super().forward(*args, **kwargs)

    def _fused(self, x: Tensor) -> Tensor | None:
        block = vars(self).get(_BLOCK)
        if block is None or not isinstance(x, Tensor) or shared.is_apart() or not block.holds(self):
            return None
        modules, roles = self._modules, block.roles
        if roles.act is not None:
            act = modules.get(roles.act)
            if act is not block.act or not shared.is_plainly_called(act):
                return None
            if recorded.known_activation(act) != roles.activation:
                return None
        if not all(_is_off(modules.get(name)) for name in roles.between):
            return None
        layers = [modules.get(name) for name in roles.linears]
        if any(getattr(layer, "shards", None) is not None for layer in layers):
            return None if roles.is_joined else self._spread(x, layers)
        operands, dropout_on = _projections(layers, x) or (None, None)
        if operands is None:
            return None
        if roles.is_joined:
            if not isinstance(operands[0].weight, Tensor):
                return None
            operands = *_halves(operands[0], roles.gate_comes_last), operands[1]
        gate = None if roles.gate is None else operands[0]
        up, down = operands[-2:]
        y = functional.dora_mlp(x, gate, up, down, activation=roles.activation, dropout_on=dropout_on)
        if any(p is not None and not isinstance(p.weight, Tensor) for p in (gate, up)):  # else down gets y's dtype
            y = shared.as_called(y, x, down)
        return self._finished(y)

    def _finished(self, y: Tensor) -> Tensor:
        """After the modules that follow the last layer."""
        for name in vars(self)[_BLOCK].roles.after:
            y = self._modules[name](y)
        return y

    def _spread(self, x: Tensor, layers: list[nn.Module]) -> Tensor | None:
        """Of layers that are spread by tensor parallelism."""
        from dorac.nn import sharded_blocks  # which imports torch.distributed

        roles = vars(self)[_BLOCK].roles
        y = sharded_blocks.mlp(x, None if roles.gate is None else layers[0], *layers[-2:], roles.activation)
        return y if y is None else self._finished(y)


class _MLP:
    """What a fused MLP computes, and whose forward that was found in."""

    def __init__(self, roles: recorded.MLP, act: nn.Module | None, forward: Callable | None) -> None:
        self.roles, self.act, self.forward = roles, act, forward

    def __getstate__(self) -> dict:
        return vars(self) | {"forward": None}  # another process may have patched the class

    def holds(self, module: FusedMLP) -> bool:
        """Whether the class still has that forward; it is looked at once more of a copy and after a new attribute."""
        forward = module.stock.forward
        if self.forward is None:
            if not front.unobserved():  # a transform would see the looking: the next call looks
                return False
            self.forward = forward if mlp(module) == self.roles else mlp
        return self.forward is forward


class FusedAttention(_Fused):
    """An attention whose projections of one input are one :func:`dorac.functional.dora_linears`: see :mod:`.shared`."""

    def forward(self, *args, **kwargs) -> object:
        layers = () if torch.compiler.is_compiling() else self._layers(args, kwargs)
        if len(layers) < 2:
            return super().forward(*args, **kwargs)
        with shared.together(layers):
            return super().forward(*args, **kwargs)

    def _layers(self, args: tuple, kwargs: dict) -> list[nn.Module]:
        names, others = vars(self).get(_BLOCK) or ((), ())
        if not names or shared.is_apart():
            return []
        for name, position in others:
            given = kwargs.get(name) if len(args) <= position else args[position]
            if given is not None:
                names = names[1:]
                break
        modules = self._modules
        return [modules[name] for name in names if type(modules.get(name)) in shared.classes]


def _projections(layers: list[nn.Module | None], x: Tensor) -> tuple[list[functional.Projection], str] | None:
    """As :func:`shared.projections`, plain layers among them, of MLPs, of which at least one layer is adapted."""
    adapted = [layer for layer in layers if type(layer) in shared.classes]
    found = shared.projections(adapted, x) if adapted else None
    if found is None:
        return None
    answers = iter(found[0])
    operands = [next(answers) if type(layer) in shared.classes else _plain(layer, x) for layer in layers]
    if None in operands or len({p.weight.dtype for p in operands}) > 1:
        return None
    return operands, found[1]


def _halves(
    joined: functional.Projection, gate_comes_last: bool
) -> tuple[functional.Projection, functional.Projection]:
    """Gate and up of a layer that is both: each row of a weight has its own norm, magnitude and bias."""
    names = ("weight", "lora_B", "magnitude", "bias", "weight_norm")
    parts = {name: (None, None) if (t := getattr(joined, name)) is None else t.chunk(2) for name in names}
    first, last = (joined._replace(**{name: part[i] for name, part in parts.items()}) for i in (0, 1))
    return (last, first) if gate_comes_last else (first, last)


def _plain(layer: nn.Module | None, x: Tensor) -> functional.Projection | None:
    """A linear layer without an adapter."""
    if linear4bit.takes(layer, x):
        packed_weight = linear4bit.weight_for(layer, x)
        return None if packed_weight is None else functional.Projection(packed_weight, bias=layer._parameters["bias"])
    if layer is None or not (type(layer) is nn.Linear or is_conv1d(layer)) or not shared.is_plainly_called(layer):
        return None
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if not shared.fits(x, weight) or (bias is not None and not shared.is_plain(bias)):
        return None
    return functional.Projection(weight if type(layer) is nn.Linear else weight.t(), bias=bias)


def _is_off(dropout: nn.Module | None) -> bool:
    """Whether a module of dropout gives what it is given."""
    if type(dropout) not in (nn.Dropout, nn.Identity) or not shared.is_plainly_called(dropout):
        return False
    return type(dropout) is nn.Identity or not (dropout.training and dropout.p)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has, or had before it was fused."""
    return getattr(type(module), "stock", type(module)) if isinstance(module, _Fused) else type(module)


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is an adapted linear layer that can be computed together with others, or a plain one."""
    if shared.is_fusable(module) or type(module) is nn.Linear or linear4bit.is_stock(module):
        return True
    return module is not None and is_conv1d(module)


def mlp(module: nn.Module) -> recorded.MLP | str:
    """The parts of the module's children if it is an MLP, or why it is none that is known."""
    linears = {name: child for name, child in module._modules.items() if is_linear(child)}
    return recorded.mlp(module, stock_class(module), {name: _sizes(child) for name, child in linears.items()})


def _sizes(layer: nn.Module) -> tuple[int, int]:
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return tuple(layer.weight.shape)


def projections_of_one(module: nn.Module) -> tuple[tuple[str, ...], tuple[tuple[str, int], ...]] | str:
    """The names of an attention's adapted layers of one input, and the arguments that tell otherwise; or why not.

    Those are names in its forward's signature, and where they stand in a call.
    """
    children = module._modules
    names = next((names for names in TRIPLES if all(children.get(name) is not None for name in names)), None)
    if names is None:
        joined = [name for name in JOINED if children.get(name) is not None]
        return f"q, k and v are one layer already ({joined[0]})" if joined else NOT_KNOWN
    adapted = [name for name in names if shared.is_fusable(children[name])]
    if len(adapted) < 2:
        return f"less than two of {', '.join(names)} are adapted"
    if len({children[name].in_features for name in adapted}) > 1:
        return f"{', '.join(adapted)} take inputs of several widths"
    parameters = [*inspect.signature(stock_class(module).forward).parameters][1:]
    if parameters[:1] != ["hidden_states"]:
        return "its forward takes several inputs, and which of them is projected is not known"
    others = tuple((name, parameters.index(name)) for name in _OTHER_STATES if name in parameters)
    if names[0] not in adapted:
        others = ()
    return tuple(adapted), others


def fuse_mlp(module: nn.Module, roles: recorded.MLP, log: Undo) -> None:
    """Makes the module a :class:`FusedMLP`."""
    block = _MLP(roles, module._modules.get(roles.act), stock_class(module).forward)
    _fuse(module, FusedMLP, block, log)


def fuse_attention(module: nn.Module, block: tuple, log: Undo) -> None:
    """Makes the module a :class:`FusedAttention`; ``block``: of :func:`projections_of_one`."""
    _fuse(module, FusedAttention, block, log)


def _fuse(module: nn.Module, kind: type[_Fused], block: object, log: Undo) -> None:
    log.keep_module(module)
    log.keep_attribute(module, "__class__")
    module.__class__ = _class(kind, stock_class(module))
    vars(module)[_BLOCK] = block


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, _Fused) and _BLOCK in vars(module)


def restore(modules: Iterable[nn.Module], log: Undo) -> None:
    """Gives fused modules among these their class back."""
    for module in modules:
        if isinstance(module, _Fused):
            log.keep_module(module)
            vars(module).pop(_BLOCK, None)
            if type(module) is _class(module.kind, module.stock):  # else FSDP has made one of it
                log.keep_attribute(module, "__class__")
                module.__class__ = module.stock
