"""What the forward of an MLP computes, found by running it on meta tensors with stand-ins for its layers.

A fused MLP takes the place of a forward, so it has to be known what that computes, and names of classes and children do
not tell: there are MLPs with a ``gate_proj`` that clamp, scale or sparsify in between. Run with stand-ins for the
children, and a mode that notes every function of torch, the forward says it itself. It is run for each kind of input
that it may ask for (``if h.dtype == torch.float16: h = h.clamp(...)``), and has to say the same each time.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dorac.functional.blocks import ACTIVATIONS

_PRODUCTS = ("mul", "__mul__", "multiply")
# What gives no tensor and changes none, and what gives the tensor itself where there is nothing to do.
_ASKING = ("__get__", "size", "dim", "numel", "stride", "is_floating_point", "is_contiguous")
_NOTHING_TO_DO = ("to", "contiguous", "type_as", "type", "__get__")
_FUNCTIONS = ("silu", "gelu", "relu")  # as they are noted: with "=" before their name in ACTIVATIONS
# What a forward may ask of its input. Float64 comes first, which nobody casts to: a cast to float32 is something in
# between, in float32 too.
_KINDS = (
    *((torch.float64, shape) for shape in ((1, 2), (3,), (2, 4096), ())),
    *((dtype, (1, 2)) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
)
_DEVICES = "cpu", "cuda"
NOT_AN_MLP = "its forward is neither down(act(gate(x)) * up(x)) nor down(act(up(x)))"


@dataclasses.dataclass(frozen=True)
class MLP:
    """Names of children: ``after(down(between(act(gate(x)) * up(x))))``, without a gate ``act(up(x))``.

    Attributes:
        gate, up, down: the linear layers. One layer may be gate and up, each a half of its outputs.
        act: a module, or None where it is a function.
        activation: what it computes, by its name in :data:`dorac.functional.blocks.ACTIVATIONS`.
        between, after: modules of dropout.
        gate_comes_last: of a layer that is gate and up.
    """

    gate: str | None
    up: str
    down: str
    act: str | None
    activation: str
    between: tuple[str, ...]
    after: tuple[str, ...]
    gate_comes_last: bool

    @property
    def is_joined(self) -> bool:
        return self.gate == self.up

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name is not None))

    def __str__(self) -> str:
        return f"an MLP of {', '.join(self.linears)} with {self.activation}"


def mlp(module: nn.Module, cls: type[nn.Module], linears: Mapping[str, tuple[int, int]]) -> MLP | str:
    """What ``cls.forward`` computes of the module if it is an MLP, or why it is none that is known.

    Args:
        linears: by name the children that are linear layers: their sizes ``in, out``.
    """
    if not 2 <= len(linears) <= 3:
        return NOT_AN_MLP
    others = {name: child for name, child in module._modules.items() if child is not None and name not in linears}
    own = [*module._parameters, *module._buffers]
    if own or len(others) > 3 or any(next(child.parameters(), None) is not None for child in others.values()):
        return NOT_AN_MLP
    arguments = inspect.signature(cls.forward).parameters.values()
    if len([a for a in arguments if a.default is a.empty]) != 2:  # self, x
        return NOT_AN_MLP
    found = None
    for training, kind in itertools.product((True, False), _KINDS):
        answer = _found(module, cls, linears, others, training, *kind)
        if answer is None and found is not None:  # raised: so does a call of that kind
            continue
        if not answer or found not in (None, answer):
            return NOT_AN_MLP
        found = answer
    return _with_activation(found, others)


def _found(
    module: nn.Module,
    cls: type[nn.Module],
    linears: Mapping[str, tuple[int, int]],
    others: Mapping[str, nn.Module],
    training: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> dict | None:
    """Which child has which part, empty if it is no MLP; None if the forward raised."""
    steps = _Steps()
    stands = {name: _Stand(name, steps, dtype, *linears.get(name, ())) for name in (*linears, *others)}
    answer = None
    for size, _ in dict.fromkeys(linears.values()):  # a first layer takes x
        before = vars(module) | {"_modules": stands, "training": training}
        probe = object.__new__(cls)
        vars(probe).update({name: _own(value) for name, value in before.items()})
        x = torch.empty(*shape, size, dtype=dtype, device="meta", requires_grad=training)
        steps.noted.clear()
        try:
            with _modes(training), steps:
                steps.modes = _present_modes()
                y = cls.forward(probe, x)
        except Exception:  # whatever the class does that is not what an MLP does
            continue
        answer = {}
        if not _kept(before, vars(probe)):  # somebody may read what it leaves
            continue
        found = _roles(steps, x, y, linears)
        if found is not None:
            return found
    return answer


@contextlib.contextmanager
def _modes(on: bool) -> Iterator[None]:
    """Gradients and autocast, on any device, on or off: a forward may ask for them, and may set them."""
    before = [torch.is_autocast_enabled(device) for device in _DEVICES]
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, on)
        with torch.set_grad_enabled(on):
            yield
    finally:
        for device, enabled in zip(_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


def _present_modes() -> list[bool]:
    return [torch.is_grad_enabled(), *map(torch.is_autocast_enabled, _DEVICES)]


def _own(value: object) -> object:
    """A container of the module's copied, for a forward to write to; anything else as it is."""
    return copy.copy(value) if isinstance(value, (list, dict, set, collections.deque)) else value


def _kept(before: Mapping[str, object], after: Mapping[str, object]) -> bool:
    """Whether attributes are the same objects, containers with the same ones in them."""
    if before.keys() != after.keys():
        return False
    return all(_inside(value) == _inside(after[name]) for name, value in before.items())


def _inside(value: object) -> list[int]:
    if isinstance(value, dict):
        return [id(part) for item in value.items() for part in item]
    return [*map(id, value)] if isinstance(value, (list, set, collections.deque)) else [id(value)]


class _Steps(TorchFunctionMode):
    """Notes what is computed or changed: the function's or the child's name, its inputs and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, tuple, object]] = []
        self.modes: list[bool] = []  # that the forward is called in

    def note(self, name: str, args: tuple, result: object) -> None:
        if _present_modes() != self.modes:
            self.noted.append(("in another mode", (), None))
        self.noted.append((name, args, result))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), getattr(func, "__name__", "")
        same = any(result is arg for arg in args)
        if isinstance(result, Tensor):
            if not (same and name in _NOTHING_TO_DO):
                self.note(_function(name, args, kwargs), args, result)
        elif name == "chunk" and (args[1:], kwargs) in (((2, -1), {}), ((2,), {"dim": -1})):
            self.noted += [(f"half {i}", args, half) for i, half in enumerate(result)]
        elif name not in _ASKING:
            self.note(name, args, result)
        return result


def _function(name: str, args: tuple, kwargs: dict) -> str:
    """An activation's name in ACTIVATIONS, or the function's own."""
    if name not in _FUNCTIONS or len(args) != 1 or kwargs.pop("inplace", False):
        return name
    form = {"none": "", "tanh": "_tanh"}.get(kwargs.pop("approximate", "none"))
    return name if kwargs or form is None else f"={name}{form}"


class _Stand(nn.Module):
    """In the place of a child: gives a tensor of its output's size, and of one that is no linear layer its input's."""

    def __init__(
        self,
        name: str,
        steps: _Steps,
        dtype: torch.dtype,
        in_features: int | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.steps, self.size = name, steps, size
        if size is not None:
            self.weight = torch.empty(size, in_features, dtype=dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            y = x.new_empty((*x.shape[:-1], self.size or x.shape[-1])).requires_grad_(x.requires_grad)
        self.steps.note(f".{self.name}", (x,), y)
        return y


def _roles(steps: _Steps, x: Tensor, y: object, linears: Mapping[str, tuple[int, int]]) -> dict | None:
    """Which child has which part, if y is an MLP's output for x and nothing else was computed."""
    made = {id(result): (name, args) for name, args, result in steps.noted}
    unused = [id(result) for _, _, result in steps.noted]

    def origin(tensor: object) -> tuple[str, tuple]:
        """What made a tensor, a child's name with a dot before it or a function's; it counts as used."""
        if id(tensor) not in unused:
            return "", (None,)
        unused.remove(id(tensor))
        return made[id(tensor)]

    def is_linear(name: str) -> bool:
        return name[:1] == "." and name[1:] in linears

    def behind(tensor: object) -> tuple[list[str], str, tuple]:
        """The activation and dropout that a tensor has passed, the last first, and what made it before them."""
        passed, (name, args) = [], origin(tensor)
        while name[:1] in (".", "=") and not is_linear(name):
            passed.append(name)
            name, args = origin(args[0])
        return passed, name, args

    after, down, args = behind(y)
    if not is_linear(down):
        return None
    between, up, args = behind(args[0])
    gate, gate_comes_last = None, False
    if up in _PRODUCTS and len(args) == 2:
        gated, plain = args if made.get(id(args[0]), " ")[0][:1] in (".", "=") else args[::-1]
        if is_linear(made.get(id(gated), (" ",))[0]):
            gated, plain = plain, gated
        acts, gate, of_gate = behind(gated)
        up, args = origin(plain)
        if {gate, up} == {"half 0", "half 1"} and of_gate[0] is args[0]:
            gate_comes_last = gate == "half 1"
            up, args = origin(args[0])
            gate, of_gate = up, args
            if not is_linear(up) or linears[up[1:]][1] % 2:
                return None
        if len(acts) != 1 or not is_linear(gate) or of_gate[0] is not x:
            return None
        act = acts[0]
    elif between:
        act = between.pop()  # the first that it has passed
    else:
        return None
    if unused or not is_linear(up) or args[0] is not x or {gate or up, up, down} != {f".{name}" for name in linears}:
        return None
    parts = {"gate": gate and gate[1:], "up": up[1:], "down": down[1:], "gate_comes_last": gate_comes_last}
    return parts | {"act": act, "between": between[::-1], "after": after[::-1]}


def _with_activation(found: dict, others: Mapping[str, nn.Module]) -> MLP | str:
    act, dropouts = found["act"], [*found["between"], *found["after"]]
    if sorted(name[1:] for name in (act, *dropouts) if name[0] == ".") != sorted(others):
        return NOT_AN_MLP
    if not all(name[0] == "." and type(others[name[1:]]) in (nn.Dropout, nn.Identity) for name in dropouts):
        return NOT_AN_MLP
    activation = act[1:] if act[0] == "=" else known_activation(others[act[1:]])
    if activation is None:
        kind, known = type(others[act[1:]]).__name__, ", ".join(ACTIVATIONS)
        return f"its activation, {kind}, is none of {known}"
    found = {name: tuple(one[1:] for one in part) if isinstance(part, list) else part for name, part in found.items()}
    return MLP(**found | {"act": act[1:] if act[0] == "." else None, "activation": activation})


@torch.no_grad()
def activation_of(act: nn.Module) -> str | None:
    """The name of what a module computes in training and in evaluation, told by its values; None if there is none.

    Twice as many formulas as functions are in use (the tanh form of gelu has three), and more names.
    """
    if any(True for _ in act.buffers()):
        return None
    x = torch.linspace(-9, 9, 1441, dtype=torch.float64, device="cpu")
    far = torch.logspace(1, 6, 41, dtype=torch.float64, device="cpu")  # where some are clipped
    x = torch.cat([-far, x, far])
    ys = []
    try:
        own = copy.deepcopy(act)  # which may note what it does
        for training in (True, False):
            own.train(training)
            before = [{name: _own(value) for name, value in vars(m).items()} for m in own.modules()]
            with torch.random.fork_rng(devices=[]):
                ys.append(own(x.clone()))
            if not all(map(_kept, before, map(vars, own.modules()))):
                return None
    except Exception:  # it takes no float64, or another argument
        return None
    if any(not isinstance(y, Tensor) or y.dtype != x.dtype or y.shape != x.shape for y in ys):
        return None
    # A constant with ten digits, as FastGELU's, is the same in float32.
    return next((name for name, f in ACTIVATIONS.items() if all(_is_near(y, f(x)) for y in ys)), None)


def _is_near(y: Tensor, expected: Tensor) -> bool:
    return torch.allclose(y, expected, rtol=0, atol=1e-9)


# Attributes that nobody can write to, and those that every module has.
_FIXED = (type(None), bool, int, float, str, types.FunctionType, types.BuiltinFunctionType)
_OF_MODULES = frozenset(vars(nn.Module()))
KNOWN = 256  # kept; beyond, all are dropped
_known: dict[tuple, str | None] = {}  # by all that an activation is made of


def known_activation(act: nn.Module) -> str | None:
    """:func:`activation_of` for every call: it is looked at again once its class's forward or an attribute is another.

    Of what may change unseen nothing is known: modules with children, parameters or buffers, or attributes that can be
    written to.
    """
    if act._modules or act._parameters or act._buffers:
        return None
    try:
        own = [(name, _fixed(value, act)) for name, value in vars(act).items() if name not in _OF_MODULES]
    except TypeError:
        return None
    key = type(act), type(act).forward, *own
    known = _known.get(key, False)
    if known is False:
        if len(_known) >= KNOWN:
            _known.clear()
        with torch._C._DisableTorchDispatch():  # a mode has no part in it
            known = _known[key] = activation_of(act)
    return known


def _fixed(value: object, act: nn.Module) -> tuple:
    """The value, to be compared with others; TypeError if it may be written to."""
    if type(value) is functools.partial:
        of_call = [("", v) for v in value.args] + [*value.keywords.items()]
        return value.func, *((name, _fixed(v, act)) for name, v in of_call)
    if type(value) is types.MethodType and value.__self__ is act:
        return types.MethodType, value.__func__
    if type(value) not in _FIXED:
        raise TypeError
    return type(value), value
