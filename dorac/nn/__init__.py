"""Modules: parameters and one functional call each."""

from dorac.nn.linear import DoraLinear

__all__ = ["DoraLinear"]
