"""Rows that are sorted by segment, each segment with a layer of its own: experts, or the adapters of a mixed batch.

The host knows how many rows and segments there are, the offsets lie on the device and are never read from there. So a
grid has as many tiles of rows as any offsets may need, and a program finds out which segment its tile belongs to;
programs past the last tile end at once. Every sum has one order, wherever the segments end.

``offsets [E]`` are the rows' ends, not decreasing. Rows past the last belong to no segment: they are the tail, which
gets zeros, or with ``plain_tail`` is the layer without an adapter. With ``order [S]`` the sorted row i is row
``order[i]`` of every activation: a batch in any order, and nothing is moved. Offsets that are wrong make no program
read or write out of bounds, but leave rows unwritten.

Three kernels, each with two uses in a layer:

- :func:`segment_compose`: ``y = g_e * (base + s_e h B_e^T) + b_e``; without g it adds ``s_e h B_e^T`` to a product, as
  the gradient of x has it, ``d_base W_e + s_e d_h A_e``;
- :func:`segment_product`: ``h = x A_e^T``, and ``d_h = dy (g_e B_e)``: long rows, few columns;
- :func:`segment_backward`: ``g_e * dy`` with the gradients of magnitude, lora_B and bias in one pass over dy and inner,
  and without these lora_A's, ``s_e d_h^T x``.

The first and the last of a projection that is gate and up in one have their joining inside in ``segment_gate.py`` and
``segment_gate_backward.py``.

Legend: S rows, E segments, O out_features, I in_features, R rank, T rows of a tile.
"""

from dorac.kernels.segment_backward import segment_backward, segment_backward_launches
from dorac.kernels.segment_compose import segment_compose, segment_compose_launch
from dorac.kernels.segment_gate import segment_gate, segment_gate_launch
from dorac.kernels.segment_gate_backward import segment_gate_backward, segment_gate_backward_launches
from dorac.kernels.segment_product import segment_product, segment_product_launches
from dorac.kernels.segment_tiles import row_tiles, zero_tail

__all__ = [
    "row_tiles",
    "segment_backward",
    "segment_backward_launches",
    "segment_compose",
    "segment_compose_launch",
    "segment_gate",
    "segment_gate_backward",
    "segment_gate_backward_launches",
    "segment_gate_launch",
    "segment_product",
    "segment_product_launches",
    "zero_tail",
]
