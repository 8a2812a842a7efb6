"""Where tests run. A test that is marked ON_DEVICES runs on the CPU and on CUDA; the others run on the CPU alone.

On CUDA in float32 pages are gathered, which is exact enough for the same tokens; FlashAttention's kernel, which takes
bfloat16, is held against transformers' logits in that type, and a test marked ON_TYPES runs by it as well.
"""

from typing import Final

import pytest
import torch

NEEDS_CUDA: Final = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
CUDA: Final = pytest.param("cuda", marks=NEEDS_CUDA)
ON_DEVICES: Final = pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
ON_TYPES: Final = pytest.mark.parametrize(
    ("device", "weights_dtype"),
    [
        ("cpu", "float32"),
        pytest.param("cuda", "float32", marks=NEEDS_CUDA),
        pytest.param("cuda", "bfloat16", marks=NEEDS_CUDA),
    ],
    indirect=True,
)
