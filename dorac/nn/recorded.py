"""What the forward of an MLP computes, found by running it once on meta tensors with stand-ins for its layers.

A fused MLP takes the place of a forward, so it has to be known what that computes, and names of classes and children do
not tell: there are MLPs with a ``gate_proj`` that clamp, scale or sparsify in between. Run with stand-ins for the
children, and a mode that notes every function of torch, the forward says it itself.
"""

import dataclasses
import inspect

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dorac.functional.blocks import ACTIVATIONS

_PRODUCTS = ("mul", "__mul__", "multiply")
_KNOWN = ", ".join(ACTIVATIONS)
NOT_AN_MLP = "its forward is neither down(act(gate(x)) * up(x)) nor down(act(up(x)))"


@dataclasses.dataclass(frozen=True)
class MLP:
    """Names of children: ``after(down(between(act(gate(x)) * up(x))))``, without a gate ``act(up(x))``.

    ``activation``: what ``act`` computes, by its name in :data:`dorac.functional.blocks.ACTIVATIONS`. ``between`` and
    ``after`` are modules of dropout.
    """

    gate: str | None
    up: str
    down: str
    act: str
    activation: str
    between: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)

    def __str__(self) -> str:
        return f"an MLP of {', '.join(self.linears)} with {self.activation}"


def mlp(module: nn.Module, cls: type[nn.Module], linears: dict[str, tuple[int, int, Tensor]]) -> MLP | str:
    """What ``cls.forward`` computes of the module if it is an MLP, or why it is none that is known.

    Args:
        linears: by name the children that are linear layers: their sizes ``in, out`` and their weight.
    """
    answers = [_mlp(module, cls, linears, training) for training in (True, False)]
    return answers[0] if answers[0] == answers[1] else NOT_AN_MLP


def _mlp(
    module: nn.Module, cls: type[nn.Module], linears: dict[str, tuple[int, int, Tensor]], training: bool
) -> MLP | str:
    others = {name: child for name, child in module._modules.items() if child is not None and name not in linears}
    if not 2 <= len(linears) <= 3 or not 1 <= len(others) <= 3:
        return NOT_AN_MLP
    own = [*module._parameters, *module._buffers]
    if own or any(next(child.parameters(), None) is not None for child in others.values()):
        return NOT_AN_MLP
    arguments = inspect.signature(cls.forward).parameters.values()
    if len([a for a in arguments if a.default is a.empty]) != 2:  # self, x
        return NOT_AN_MLP
    steps = _Steps()
    stands = {name: _Stand(name, steps, size, weight) for name, (_, size, weight) in linears.items()}
    stands |= {name: _Stand(name, steps) for name in others}
    copy = object.__new__(cls)
    vars(copy).update(vars(module), _modules=stands, training=training)
    # A first layer takes x: the widths of the others may be another.
    for size, _, weight in linears.values():
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        x = torch.empty(1, 2, size, dtype=dtype, device="meta")
        steps.clear()
        try:
            with torch.no_grad(), steps:
                y = cls.forward(copy, x)
        except Exception:  # whatever the class does that is not what an MLP does
            continue
        found = _roles(steps, x, y, linears)
        if found is not None:
            return _with_activation(found, others)
    return NOT_AN_MLP


class _Steps(TorchFunctionMode):
    """Notes what is computed: the function's or the child's name, its inputs and its output."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, tuple, object]] = []
        self.quiet = False

    def clear(self) -> None:
        self.noted.clear()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = isinstance(result, (Tensor, tuple, list)) and not isinstance(result, torch.Size)
        if made and not self.quiet and not any(result is arg for arg in args):
            self.noted.append((getattr(func, "__name__", ""), (*args, *(kwargs or {}).values()), result))
        return result


class _Stand(nn.Module):
    """In the place of a child: gives a tensor of its output's size, and of one that is no linear layer its input's."""

    def __init__(self, name: str, steps: _Steps, size: int | None = None, weight: Tensor | None = None) -> None:
        super().__init__()
        self.name, self.steps, self.size = name, [steps], size
        if weight is not None:
            self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        (steps,) = self.steps
        steps.quiet = True
        y = x.new_empty((*x.shape[:-1], x.shape[-1] if self.size is None else self.size))
        steps.quiet = False
        steps.noted.append((f".{self.name}", (x,), y))
        return y


def _roles(steps: _Steps, x: Tensor, y: object, linears: dict) -> dict | None:
    """Which child has which part, if y is an MLP's output for x and nothing else was computed."""
    made = {id(result): (name, args) for name, args, result in steps.noted}
    unused = [id(result) for _, _, result in steps.noted]

    def origin(tensor: object) -> tuple[str | None, tuple]:
        """What made a tensor: a child's name with a dot before it, or a function's."""
        if id(tensor) in unused:
            unused.remove(id(tensor))
            return made[id(tensor)]
        return None, ()

    def skip_dropout(tensor: object) -> tuple[list[str], str | None, tuple]:
        passed = []
        name, args = origin(tensor)
        while name is not None and name.startswith(".") and name[1:] not in linears and len(args) == 1:
            passed.append(name[1:])
            name, args = origin(args[0])
        return passed, name, args

    after, down, args = skip_dropout(y)
    if down is None or down[1:] not in linears:
        return None
    # Of what stands before the last layer, the activation of an MLP without a gate is the innermost.
    between, name, args = skip_dropout(args[0])
    if name in _PRODUCTS and len(args) == 2:
        gate_first = None
        for gated, plain in (args, args[::-1]):
            if gate_first is None and id(plain) in made and made[id(plain)][0][1:] in linears:
                gate_first = gated, plain
        if gate_first is None:
            return None
        acts, gate, gate_args = skip_dropout(gate_first[0])
        up, up_args = origin(gate_first[1])
        if len(acts) != 1 or gate is None or gate[1:] not in linears or gate_args[0] is not x or up_args[0] is not x:
            return None
        act = acts[0]
    else:
        if not between or name is None or name[1:] not in linears or args[0] is not x:
            return None
        act, gate, up = between.pop(), None, name
    names = [name and name[1:] for name in (gate, up, down)]
    if unused or sorted(filter(None, names)) != sorted(linears):
        return None
    gate, up, down = names
    return {"gate": gate, "up": up, "down": down, "act": act, "between": between[::-1], "after": after[::-1]}


def _with_activation(found: dict, others: dict[str, nn.Module]) -> MLP | str:
    for name in (*found["between"], *found["after"]):
        if type(others[name]) not in (nn.Dropout, nn.Identity):
            return NOT_AN_MLP
    if len({found["act"], *found["between"], *found["after"]}) != len(others):
        return NOT_AN_MLP
    act = others[found["act"]]
    activation = activation_of(act)
    if activation is None:
        return f"its activation, {type(act).__name__}, is none of {_KNOWN}"
    return MLP(**found | {"activation": activation, **{k: tuple(found[k]) for k in ("between", "after")}})


@torch.no_grad()
def activation_of(act: nn.Module) -> str | None:
    """The name of what a module computes, told by its values; None if it is none of those that are known.

    Twice as many formulas as functions are in use (the tanh form of gelu has three), and more names.
    """
    if any(True for _ in act.buffers()):
        return None
    x = torch.linspace(-9, 9, 1441, dtype=torch.float64)
    try:
        y = act(x.clone())
    except Exception:  # it takes no float64, or another argument
        return None
    if not isinstance(y, Tensor) or y.dtype != x.dtype or y.shape != x.shape:
        return None
    # A constant with ten digits, as FastGELU's, is the same in float32.
    matches = (name for name, function in ACTIVATIONS.items() if torch.allclose(y, function(x), rtol=0, atol=1e-9))
    return next(matches, None)
