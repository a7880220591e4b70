"""The card that kernels are launched on, as a value, read once per device or given by hand."""

from typing import NamedTuple

import torch
from torch import Tensor

KIB = 1024


class Target(NamedTuple):
    """What choosing a launch needs to know of a card."""

    backend: str  # "cuda" or "hip"
    capability: int | str  # 86 for 8.6; of AMD's cards the architecture, "gfx942"
    processors: int
    shared_memory: int  # bytes that one program can have
    warp_size: int = 32

    @property
    def name(self) -> str:
        return f"sm_{self.capability}" if self.backend == "cuda" else str(self.capability)

    @property
    def generation(self) -> int:
        """The whole number of an NVIDIA card's compute capability, 0 for others."""
        return self.capability // 10 if self.backend == "cuda" else 0

    @property
    def products_from_shared(self) -> bool:
        """Whether products take tiles from shared memory while the program goes on, and there are descriptors.

        Data-centre chips from Hopper on; elsewhere warps load their operands into registers first.
        """
        return self.generation in (9, 10)

    @property
    def copies_to_shared(self) -> bool:
        """Whether an AMD card copies from memory to shared memory directly."""
        return self.capability == "gfx950"


# Cards by what Triton calls them: processors of a common one, shared memory as CUDA's programming guide and AMD's
# architecture manuals have it.
CARDS = {
    "sm_75": Target("cuda", 75, 40, 64 * KIB),  # T4
    "sm_80": Target("cuda", 80, 108, 163 * KIB),  # A100
    "sm_86": Target("cuda", 86, 82, 99 * KIB),  # RTX 3090, A10G
    "sm_89": Target("cuda", 89, 128, 99 * KIB),  # RTX 4090, L4, L40S
    "sm_90": Target("cuda", 90, 132, 227 * KIB),  # H100, H200
    "sm_100": Target("cuda", 100, 148, 227 * KIB),  # B200
    "sm_120": Target("cuda", 120, 170, 99 * KIB),  # RTX 5090, RTX 6000 PRO
    "gfx942": Target("hip", "gfx942", 304, 64 * KIB, 64),  # MI300X
    "gfx950": Target("hip", "gfx950", 256, 160 * KIB, 64),  # MI355X
}

_cards: dict[int, Target] = {}  # by the device's index: hashing devices takes as long as choosing a launch
_given: list[Target | None] = []  # given in place of the device's: see dorac/ops/cards.py


def of(tensor: Tensor) -> Target | None:
    """The card of the tensor's device; None where none is wanted."""
    if _given:
        return _given[-1]
    index = tensor.get_device()  # -1 on the CPU
    return _cards[index] if index in _cards else _cards.setdefault(index, _read(tensor.device))


def of_device(device: torch.device) -> Target | None:
    """The same of a device."""
    return _given[-1] if _given else _read(device)


def is_given() -> bool:
    """Whether the card is one that was given by hand."""
    return bool(_given)


def _read(device: torch.device) -> Target:
    """Of no GPU, for Triton's interpreter, an H100."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return CARDS["sm_90"]
    card = torch.cuda.get_device_properties(device)
    processors = card.multi_processor_count
    if torch.version.hip is not None:
        architecture = card.gcnArchName.partition(":")[0]
        return Target("hip", architecture, processors, card.shared_memory_per_block, card.warp_size)
    # Of a processor's, CUDA keeps one KiB for itself.
    whole = getattr(card, "shared_memory_per_block_optin", None) or card.shared_memory_per_multiprocessor - KIB
    return Target("cuda", 10 * card.major + card.minor, processors, whole, card.warp_size)
