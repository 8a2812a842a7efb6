"""What makes the bundled models lives in scripts/, which is a folder of scripts and no package."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import train_bundled
from bundled_data import make_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Made anew, with the seed that the shipped models were trained with."""
    return make_tokenizer(train_bundled.SEED)
