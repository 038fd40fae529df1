"""vLLM's engines side by side: stock, the plugin with either kind of adapter, and the base model alone.

    base           vLLM without LoRA and without the plugin: the base model as fast as vLLM serves it here
    stock          vLLM's multi-LoRA without the plugin, conventional adapters
    conventional   the plugin with its CPU operators, the same conventional adapters
    icarus         the plugin with its CPU operators, ICaRus adapters

Each is one process with one engine (``vllm.LLM``, engine core in the same process) that waits without using a core
while another is measured. All are the same but for the plugin, LoRA and the adapters. All may compile the model, as is
vLLM's default, which stock vLLM turns off on CPUs where LoRA is on. Prompts are token ids, and nothing is detokenized,
so what is measured is the engine: scheduling, the model, sampling.

    plan            what is asked, in which order, and the work in it
    bounds          the least time that such work takes on this machine
    engines         how each engine is started; ``engine_process`` holds it, ``engine`` is what runs in it
    run             all rounds, and profiles
    ratios, report  what they come to
"""
