"""On CPUs: the LoRA operator, and attention of a decode beside its decoder row."""
