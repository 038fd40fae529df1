"""The vLLM plugin: ICaRus adapters, served as LoRA modules, share one KV cache with the base model.

vLLM runs in several processes, and a room is named after the one in which its code mainly
runs: the front end also asks the engine's policy about adapters. A room imports those below it:

    server/    front end     icarus serve, adapter folders, loading over HTTP, metrics
    engine/    engine core   which adapters may share, cache keys, counting
    worker/    workers       decoder rows in the model runner, copies of adapters
    cpu/       workers       on CPUs: the LoRA operator, and attention of decode pairs

All rooms import the modules that stand here:

    ledger.py        every function of vLLM that is wrapped
    attributes.py    every attribute of vLLM's objects that the plugin uses
    patching.py      checks vLLM against both, then applies the ledger
    marks.py         the mark on a request whose adapter shares
    counters.py      what is counted
    step_layout.py   which decoder rows a step needs, and where they stand
    state.py         values attached to vLLM's objects
    abilities.py     what the installed vLLM can do and another tested version cannot
    plugin.py        the entry point, which vLLM calls in each process

The rest of the project imports nothing from here, and nothing else in the package imports vLLM. docs/architecture.md
follows a request through all of it.
"""
