"""``python -m dorac.demo``: fine-tunes a small language model with DoRA, and compares with stock PEFT on request."""
