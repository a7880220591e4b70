"""What releases of torch do differently, as tests see it: told apart here alone."""

import torch

# A flag flipped in place on a compiled model's parameter, by requires_grad_(), is noticed.
SEES_FLIPPED_FLAGS = torch.__version__ >= "2.13"
# A number that changed once stays symbolic where code compares it; else there is a graph for each value of it.
COMPARES_SYMBOLIC_FLOATS = torch.__version__ >= "2.13"
