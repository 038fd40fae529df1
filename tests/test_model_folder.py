"""What the files of a base model tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from icarus import model_folder
from tiny_models import tiny


def test_parameters_by_the_size_of_files(tmp_path: Path) -> None:
    model = tiny()
    count = sum(parameter.numel() for parameter in model.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        assert model_folder.parameters(tmp_path / str(dtype)) == pytest.approx(count, rel=0.1)
    assert model_folder.parameters(tmp_path) is None
