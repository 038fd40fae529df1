"""On GPUs: attention of a decode beside its decoder row."""
