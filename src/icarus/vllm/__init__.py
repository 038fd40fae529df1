"""The vLLM plugin: ICaRus adapters served as LoRA modules share one KV cache with the base model.

    rows.py      which decoder rows a step needs and where they stand: arithmetic over plain arrays
    policy.py    which adapter may share, decided once from its verified directory
    limits.py    what cannot work yet, and how much room decoder rows need
    shared.py    the mark on a request whose adapter shares
    engine.py    cache keys, marking and refusals, in the engine core and in the front end
    runner.py    decoder rows in vLLM's model runner, in the workers
    figures.py   counters in the engine core and the workers; metrics.py shows them in the front end
    folders.py   what an adapter folder holds, and which ones a client may name
    loading.py   checks of /v1/load_lora_adapter, in the front end
    watch.py     a folder whose adapters come and go; middleware.py runs it in vLLM's HTTP server
    serve.py     the command `icarus serve`
    patches.py   the ledger of everything that is changed in vLLM, and the checks before it is
    plugin.py    the entry point that vLLM calls in each of its processes

Nothing here is imported by the rest of the project, and nothing outside this package imports vLLM.
"""
