"""The workers: decoder rows in the model runner, and copies of adapters."""
