"""The vLLM plugin: ICaRus adapters served as LoRA modules share one KV cache with the base model.

vLLM runs in several processes, and each room holds what runs in one of them:

    server/    the front end: the command `icarus serve`, adapter folders, loading over HTTP, metrics
    engine/    the engine core: who may share, what cannot be served, cache keys, counting
    worker/    the workers: decoder rows in the model runner, copies of adapters
    cpu/       the workers on CPUs: the LoRA operator, attention of pairs

What all of them share is here:

    ledger.py        everything that is changed in vLLM, and the checks before it is
    marks.py         the mark on a request whose adapter shares
    counters.py      what is counted
    step_layout.py   which decoder rows a step needs and where they stand: arithmetic over plain arrays
    plugin.py        the entry point that vLLM calls in each of its processes

Nothing here is imported by the rest of the project, and nothing else in it imports vLLM.
"""
