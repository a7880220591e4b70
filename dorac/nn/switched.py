"""What a layer runs of its adapter: nothing while it is switched off, else the adapter at a strength."""

from torch import Tensor, nn

from dorac import checks, functional
from dorac.undo import Undo


class Switched:
    """The part of :class:`dorac.nn.DoraLayer` that says what of the adapter a forward runs.

    Neither is in the state dict. Copies and pickles keep the strength and are never switched off.
    """

    disabled = False  # see dorac.disabled
    runs_base = False  # whether forward is the base layer's: disabled, or the strength is the number 0
    _strength: float | Tensor | None = None  # None: 1, the adapter as it is

    merged: bool
    base_layer: nn.Module

    def switch(self, disabled: bool) -> None:
        """Switches the adapter off, or on again."""
        self.disabled = disabled
        self._strength = self._strength  # an instance's own, which compiled code is guarded by
        self.runs_base = disabled or _is_zero(self._strength)

    @property
    def strength(self) -> float | Tensor:
        """a, a number or a 0-d tensor: the layer's weight is ``W + a (W' - W)``, W' that of the adapter. 1 at first.

        0 is the base layer, bit for bit. Setting it takes no norm anew; a merged layer, to be unmerged, keeps it.
        """
        return 1.0 if self._strength is None else self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        if self.merged:
            raise ValueError("the adapter is merged; unmerge it before setting its strength")
        value = checks.check_scaling(value, "strength")
        if "initial_lora_A" in self._parameters and (isinstance(value, Tensor) or value != 1):
            raise ValueError(
                "the adapter began as a part of its base weight, which a strength is not related to: save it, and load "
                "it over the original weight"
            )
        self._strength = value if isinstance(value, Tensor) or value != 1 else None
        self.switch(self.disabled)

    def keep_strength(self, log: Undo) -> None:
        """Tells the log of what setting the strength, or switching, changes."""
        kept = {name: vars(self).get(name) for name in ("disabled", "runs_base", "_strength")}
        log.add(lambda: vars(self).update(kept))

    def _at_strength(self, lora_B: Tensor, magnitude: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``lora_B``, the magnitude and the norm for a forward at a strength other than 1."""
        if norm is None:
            norm = self._norm()
        return functional.at_strength(lora_B, magnitude, norm, self._strength)


def _is_zero(strength: float | Tensor | None) -> bool:
    return not isinstance(strength, Tensor) and strength == 0
