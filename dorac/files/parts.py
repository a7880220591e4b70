"""What the formats' readers share: keys taken apart, and layers put together of what a file has and what was given."""

import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from dorac.files.layers import AXES, Layer
from dorac.names import plain_name

_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Given(NamedTuple):
    """What the user says of a file that does not say it.

    Args:
        lora_alpha: alpha, for a scaling ``alpha / r``. scaling: s itself, in its place.
        norm_axis: "out" or "in".
        eps: what the trainer added to the norm.
    """

    lora_alpha: float | None = None
    scaling: float | None = None
    norm_axis: str | None = None
    eps: float | None = None

    def check(self) -> None:
        """Raises a ``ValueError`` or ``TypeError`` for what cannot be."""
        for name in ("lora_alpha", "scaling", "eps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if value is not None and not (abs(value) <= sys.float_info.max and (name == "scaling" or value >= 0)):
                raise ValueError(
                    f"{name} must be a finite number{'' if name == 'scaling' else ' of at least 0'}, got {value}"
                )
        if self.lora_alpha is not None and self.scaling is not None:
            raise ValueError("lora_alpha and scaling say the same: give one of them")
        if self.norm_axis not in (None, *AXES):
            raise ValueError(f"norm_axis must be 'out' or 'in', got {self.norm_axis!r}")


def grouped(
    tensors: Mapping[str, Tensor], roles: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module and role, where keys are ``<module>.<ending>``; and the other tensors by their keys.

    Args:
        roles: the role of each ending.

    Raises:
        ValueError: two keys for one role.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        ending = next((e for e in sorted(roles, key=len, reverse=True) if key.endswith(f".{e}")), None)
        if ending is None:
            others[key] = tensor
            continue
        name = key[: -len(ending) - 1]
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        parts = modules.setdefault(plain_name(name), {})
        if roles[ending] in parts:
            raise ValueError(f"{key}: there are two tensors for {roles[ending]} of {name}")
        parts[roles[ending]] = tensor
    return modules, others


def scaling(format: str, given: Given, rank: int, lora_alpha: object = None, rslora: bool = False) -> float:
    """s: what is given, or ``alpha / r`` of the given alpha or of the file's own, a number or a tensor of one.

    Raises:
        ValueError: neither the file nor the caller says it; the file's own is no finite number.
    """
    if given.scaling is not None:
        return float(given.scaling)
    alpha = given.lora_alpha if given.lora_alpha is not None else lora_alpha
    if alpha is None:
        raise ValueError(f"a {format} file does not say its alpha: pass lora_alpha= (--alpha) or scaling= (--scaling)")
    return number(format, "alpha", alpha) / (math.sqrt(rank) if rslora else rank)


def number(format: str, what: str, value: object) -> float:
    """A file's number, or a tensor's of one element.

    Raises:
        ValueError: it is none, or not finite.
    """
    found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) <= sys.float_info.max:
        got = f"a tensor {list(value.shape)}" if isinstance(found, Tensor) else repr(found)
        raise ValueError(f"{format}: its {what} must be a finite number, got {got}")
    return found


def need(format: str, name: str, parts: Mapping[str, Tensor], *roles: str) -> list[Tensor]:
    """The tensors of these roles.

    Raises:
        ValueError: some are missing.
    """
    if missing := [role for role in roles if role not in parts]:
        raise ValueError(f"{format}: {name} has no {', '.join(missing)}")
    return [parts[role] for role in roles]


def factors(format: str, name: str, parts: Mapping[str, Tensor], *roles: str) -> list[Tensor]:
    """The two factors, of which each has a rank.

    Raises:
        ValueError: one is missing, or is no matrix or kernel of at least one element.
    """
    tensors = need(format, name, parts, *roles)
    for role, tensor in zip(roles, tensors, strict=True):
        if tensor.ndim < 2 or not tensor.numel():
            raise ValueError(f"{format}: {role} of {name} is {list(tensor.shape)}, which is no factor")
    return tensors


def build(
    format: str,
    name: str,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor | None,
    scaling: float,
    *,
    kind: str | None = None,
    norm_axis: str = "out",
    eps: float = 0.0,
) -> Layer:
    """A layer from tensors in PEFT's layouts, a convolution where the factors have more than two dimensions.

    Raises:
        ValueError: shapes that do not go together, values that are not floating point or not finite.
    """
    present = {"lora_A": lora_A, "lora_B": lora_B, "magnitude": magnitude}
    for role, tensor in present.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{format}: {role} of {name} is {tensor.dtype}, not floating point of 16 bits or more")
        if not tensor.isfinite().all():
            raise ValueError(f"{format}: {role} of {name} is not finite")
    magnitude = None if magnitude is None else magnitude.flatten()
    if lora_A is not None:
        shapes = f"lora_A {list(lora_A.shape)}, lora_B {list(lora_B.shape)}"
        flat = lora_B.ndim == lora_A.ndim and math.prod(lora_B.shape[2:]) == 1
        if not 2 <= lora_A.ndim <= 5 or not flat or lora_A.shape[0] != lora_B.shape[1] or not lora_A.shape[0]:
            raise ValueError(f"{format}: the factors of {name} do not go together: {shapes}")
        size = lora_B.shape[0] if norm_axis == "out" else lora_A.shape[1]
        if magnitude is not None and magnitude.numel() != size:
            raise ValueError(
                f"{format}: the magnitude of {name} has {magnitude.numel()} elements, not {size}, with {shapes}"
            )
        kind = kind or ("linear" if lora_A.ndim == 2 else "conv")
    return Layer(name, kind or "linear", lora_A, lora_B, magnitude, scaling, norm_axis, eps)
