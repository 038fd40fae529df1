"""What we run to steer the project; none of it is in the wheel.

soak              random load against contexts, and malformed adapters
serve_micro       vLLM's engines side by side, step by step
figures           writes the tables of README, docs and results from results/*.json
plot              draws results/figures.png
"""
