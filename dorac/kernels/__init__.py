"""Triton kernels. Imported only when a CUDA tensor needs one: ``import dorac`` works where Triton is not installed."""
