"""``python -m dorac.bench``: dorac beside plain LoRA, stock PEFT and compiled dense DoRA, measured in one run."""
