"""What a run of ``icarus bench agents`` depends on, machine and versions aside, for flags, YAML and protocol alike."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from icarus.bench.agents.fields import POSITIVE, TEXT, WORDS, check, choice, integer, setting
from icarus.bench.agents.workloads import MAKERS, Sizes

SYSTEMS = ("stock", "conventional", "icarus", "base")  # what they are: systems.py
TIGHT, ROOMY = "tight", "roomy"
BUDGETS = (TIGHT, ROOMY)
DTYPES = ("bfloat16", "float16", "float32")

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b-shapes": {  # as in the model's config.json; weights are made up (--load-format dummy)
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "dtype": "bfloat16",
    },
}
"""Base models of which only the shapes are needed, by the name that ``--base`` takes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that a run depends on. Raises InputError for a value that its field does not take."""

    base: str = setting("smollm2-135m-instruct", "hub id, folder or packaged model", TEXT)
    dtype: str = setting("bfloat16", "of weights and KV", choice(*DTYPES))
    rank: int = setting(16, "rank of all adapters")
    systems: tuple[str, ...] = setting(SYSTEMS, "what is compared", choice(*SYSTEMS))
    models: tuple[int, ...] = setting((1, 2, 4, 8), "numbers of models")
    workloads: tuple[str, ...] = setting(
        tuple(MAKERS), "the first is swept over the rates, the others run with the most models", choice(*MAKERS)
    )
    budgets: tuple[str, ...] = setting(BUDGETS, "KV budgets; rates are swept with the first", choice(*BUDGETS))
    rates: tuple[float, ...] = setting(
        (0.05, 0.2), "arriving workflows a second; all at once is always run as well", POSITIVE
    )
    workflows: int = setting(6, "workflows of a run all at once, for which the KV budgets are made")
    window: float = setting(120.0, "seconds for which they arrive in a run at an arrival rate", POSITIVE)
    repeats: int = setting(2, "runs of each kind; the order of systems alternates")
    sizes: Sizes = field(default_factory=Sizes)
    trajectories: str | None = setting(None, "file of recorded runs for plan-act-reflect (JSON lines)", TEXT)
    tight_tokens: int | None = setting(None, "KV budget in tokens (default: from the working set of one shared cache)")
    roomy_tokens: int | None = setting(None, "KV budget in tokens (default: from that of a cache for each model)")
    seed: int = setting(0, "of texts, arrivals and adapters", integer(None, "an integer"))
    block_size: int = setting(32, "tokens in a block of KV")
    max_model_len: int = setting(4096, "of the server")
    max_num_seqs: int = setting(16, "of the server")
    max_num_batched_tokens: int = setting(2048, "of the server")
    serve_flags: tuple[str, ...] = setting((), "more flags for vLLM in one word, in place of the profile's", WORDS)
    start_seconds: float = setting(300.0, "how long a server may take to start", POSITIVE)

    def __post_init__(self) -> None:
        check(self)

    @property
    def most_models(self) -> int:
        """The largest number of models."""
        return max(self.models)

    def arriving(self, rate: float) -> int:
        """Workflows of a run at an arrival rate."""
        return max(1, round(rate * self.window))

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it. Of the file of trajectories the name: a report is for others to read."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return plain | {"trajectories": self.trajectories and Path(self.trajectories).name}


CPU = Settings()
QUICK = replace(
    CPU,
    systems=("conventional", "icarus", "base"),
    models=(8,),
    workloads=("react",),
    budgets=(TIGHT,),
    rates=(0.2,),
    workflows=5,
    window=30.0,
    repeats=1,
)
GPU = replace(
    CPU,
    base="llama-3.1-8b-shapes",
    sizes=Sizes(system=256, task=1792, turns=16, output=32, observation=96, writing=512),
    rates=(0.25, 0.5, 1.0, 2.0),
    workflows=12,
    window=60.0,
    repeats=3,
    max_model_len=8192,
    max_num_seqs=64,
    max_num_batched_tokens=8192,
    # No tokenizer is needed, as prompts are token ids; weights are made up by vLLM.
    serve_flags=("--load-format", "dummy", "--skip-tokenizer-init", "--gpu-memory-utilization", "0.92"),
    start_seconds=900.0,
)
PROFILES = {"cpu": CPU, "gpu": GPU}
