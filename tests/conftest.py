"""What holds for all tests: no network, two threads at most, and the plugins that have shared fixtures."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of Transformers
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # TRL sets ERROR, and servers started here would inherit it

import hypothesis
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny_tokenizer

pytest_plugins = ["engines", "home", "pytester", "strict_skips"]

# Its look at how fast inputs come is about the machine: a neighbour, or a first import within a test.
hypothesis.settings.register_profile("any machine", suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()
