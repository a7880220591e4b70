"""A linear layer that serves many adapters, each row of a batch one of them, from memory that is allocated once."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dorac import functional, magnitudes
from dorac.dense import not_dense
from dorac.functional import Adapter
from dorac.functional.mixed import scaled_linear_mixed
from dorac.numerics import FLOAT_DTYPES


class AdapterPool(nn.Module):
    """``g_k * (x[i] W^T + s_k (x[i] A_k^T) B_k^T) + b`` with ``k = adapter_index[i]``, the base layer where k is -1.

    Adapters of different ranks live in the slots of one stack. Adding, replacing and evicting one writes to its slot
    where that lies: nothing is compiled anew, and a captured CUDA graph runs on with what is there when it is replayed.
    The norm of an adapter is taken when it comes in, and g, all that a forward takes of magnitude and norm, is kept. An
    empty slot is the base layer. For inference: gradients reach x alone, and nothing of the pool is in the state dict.

    Args:
        base_layer: an ``nn.Linear`` with a dense weight, which has its values, and keeps them.
        capacity: how many adapters there may be at once, K.
        r: the largest rank that one may have.
        dtype: of the factors; None for the weight's.

    Raises:
        TypeError: a base layer of another kind, a dtype that is not float16, bfloat16, float32 or float64.
        ValueError: a capacity or rank that is not at least 1, no values.
    """

    def __init__(self, base_layer: nn.Linear, capacity: int, r: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"base_layer must be an nn.Linear, got {type(base_layer).__name__}")
        weight = base_layer.weight
        if (why := not_dense(weight)) is not None:
            raise TypeError(f"base_layer.weight {why}")
        for name, number in (("capacity", capacity), ("r", r)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype!r}")
        if weight.is_meta:
            raise ValueError("base_layer is on meta: load it first")
        self.base_layer, self.capacity, self.r = base_layer, capacity, r
        self.slots: dict[str, int] = {}
        out_features, in_features = weight.shape
        factors = {"dtype": dtype or weight.dtype, "device": weight.device}
        wide = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        with torch.inference_mode(False):  # what is made in inference mode could be written to there alone
            tensors = {
                "lora_A": torch.zeros(capacity, r, in_features, **factors),
                "lora_B": torch.zeros(capacity, out_features, r, **factors),
                "mag_scale": torch.ones(capacity, out_features, **wide),
                "weight_norm": torch.ones(capacity, out_features, **wide),
                "scaling": torch.zeros(capacity, **wide),
                "ranks": torch.zeros(capacity, dtype=torch.int32, device=weight.device),
            }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def add(self, name: str, adapter: Adapter) -> int:
        """Puts ``(lora_A, lora_B, magnitude, scaling)`` into an empty slot, and returns its number.

        Raises:
            ValueError: a name that is there, a full pool, a rank above the pool's, tensors that do not fit the layer.
            TypeError: a name that is not a string; what :func:`dorac.functional.norm_factored` refuses. Nothing has
                changed then.
        """
        if not isinstance(name, str):  # None is the base layer
            raise TypeError(f"name must be a string, got {name!r}")
        if name in self.slots:
            raise ValueError(f"adapter {name!r} is in the pool: replace it, or evict it first")
        if len(self.slots) == self.capacity:
            held = ", ".join(map(repr, self.slots))
            raise ValueError(f"the pool is full: {held} take its {self.capacity} slots; evict one first")
        slot = next(slot for slot in range(self.capacity) if slot not in self.slots.values())
        self._write(slot, name, adapter)
        self.slots[name] = slot
        return slot

    def replace(self, name: str, adapter: Adapter) -> int:
        """Puts another adapter into the slot of ``name``, whose number it returns. Raises: as :meth:`add`."""
        slot = self._slot(name)
        self._write(slot, name, adapter)
        return slot

    @torch.no_grad()
    def evict(self, name: str) -> None:
        """Empties the slot of ``name``. Raises: ValueError for a name that is not in the pool."""
        slot = self._slot(name)
        for tensor in (self.lora_A, self.lora_B, self.scaling, self.ranks):
            tensor[slot].zero_()
        for tensor in (self.mag_scale, self.weight_norm):
            tensor[slot].fill_(1)
        del self.slots[name]

    def index(self, names: Iterable[str | None]) -> Tensor:
        """The ``adapter_index`` for rows of these adapters, None for the base layer.

        A captured graph reads the tensor that it was captured with: copy this into that one.

        Raises:
            ValueError: a name that is not in the pool.
        """
        slots = [-1 if name is None else self._slot(name) for name in names]
        return torch.tensor(slots, dtype=torch.int64).to(self.lora_A.device, non_blocking=True)

    def forward(self, x: Tensor, adapter_index: Tensor) -> Tensor:
        """``[N, *, in] -> [N, *, out]``; ``adapter_index``: ``[N]``, of :meth:`index`."""
        return scaled_linear_mixed(
            x,
            self.base_layer.weight,
            self.lora_A,
            self.lora_B,
            self.mag_scale,
            self.base_layer.bias,
            adapter_index=adapter_index,
            scaling=self.scaling,
            ranks=self.ranks,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterPool":
        """Moves and casts; what a forward multiplies outputs with stays float32 beside factors in half precision."""
        return super()._apply(magnitudes.never_narrower(fn, self.mag_scale, self.weight_norm, self.scaling), recurse)

    def _slot(self, name: str) -> int:
        if name not in self.slots:
            held = ", ".join(map(repr, self.slots)) or "none"
            raise ValueError(f"adapter {name!r} is not in the pool, which holds {held}")
        return self.slots[name]

    @torch.no_grad()
    def _write(self, slot: int, name: str, adapter: Adapter) -> None:
        lora_A, lora_B, magnitude, scaling = adapter
        if not isinstance(magnitude, Tensor):
            raise TypeError(f"magnitude must be a tensor, got {type(magnitude).__name__}")
        # Of the factors as the pool has them.
        lora_A, lora_B = (
            t.to(self.lora_A) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (lora_A, lora_B)
        )
        norm = functional.norm_factored(self.base_layer.weight, lora_A, lora_B, scaling)
        mag_scale = functional.magnitude_scale(magnitude.to(norm.device), norm)
        rank = lora_A.shape[0]
        if rank > self.r:
            raise ValueError(f"adapter {name!r} has rank {rank}, the pool was made for ranks up to {self.r}")
        self.lora_A[slot, :rank].copy_(lora_A)
        self.lora_A[slot, rank:].zero_()
        self.lora_B[slot, :, :rank].copy_(lora_B)
        self.lora_B[slot, :, rank:].zero_()
        self.mag_scale[slot].copy_(mag_scale)
        self.weight_norm[slot].copy_(norm)
        self.scaling[slot].fill_(scaling)
        self.ranks[slot].fill_(rank)

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, r={self.r}, adapters=[{', '.join(self.slots)}]"
