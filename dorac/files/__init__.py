"""DoRA adapters of every family: files recognised by what is in them, read into :class:`Layer`, and written.

``read`` needs no model. :func:`dorac.load_adapter` reads the same files into one, ``python -m dorac`` converts, merges,
inspects and checks them.
"""

from dorac.files.in_place import merge_into
from dorac.files.layers import Contents, Layer, merged
from dorac.files.registry import FORMATS, read, recognise, write

__all__ = ["FORMATS", "Contents", "Layer", "merge_into", "merged", "read", "recognise", "write"]
