"""What the machine is measured to do: plausible, and read between and beyond the measured points."""

import pytest
import torch

from local_engine import kernels
from local_engine.calibrate import ROWS, Calibration, calibrate
from local_engine.model import LocalModel
from local_engine.runner import Runner, new_kv
from tests.local_engine.runner_harness import BUDGET, tiny_model


def test_a_calibration_knows_the_model_and_leaves_nothing_behind(bundled: LocalModel) -> None:
    model = tiny_model("qwen3", bundled)
    kv = new_kv(model, BUDGET)
    found = calibrate(model, Runner(model, kv), seconds=0.05)
    assert kv.bytes_used == 0
    assert 1e8 < found.bytes_per_s < 1e14
    assert found.flops_per_s > found.bytes_per_s / 4
    assert len(found.step_s) == len(ROWS)
    assert all(0 < seconds < 60 for seconds in found.step_s)
    assert found.token_bytes == kv.token_bytes


def test_weights_are_counted_in_the_bytes_that_a_step_reads(bundled: LocalModel) -> None:
    """The bundled model's were published in bfloat16; the head of the other one embeds, too."""
    for model in (bundled, tiny_model("qwen3", bundled)):
        runner = Runner(model, new_kv(model, BUDGET))
        found = calibrate(model, runner, seconds=0.05)
        narrow = model is bundled and kernels.usable(torch.float32, model.device)
        assert runner.held == ((torch.bfloat16,) * 2 if narrow else (torch.float32,) * 2)
        assert found.weight_bytes == found.weights * (2 if narrow else 4)


def test_seconds_lie_between_the_measured_steps_and_grow_beyond_them() -> None:
    found = Calibration(1.0, 1.0, tuple(float(rows) ** 2 for rows in ROWS), 1, 1, 1, 1)
    assert [found.seconds(rows) for rows in (1, 4, 64)] == [1, 16, 4096]
    assert found.seconds(5) == (16 + 36) / 2
    assert found.seconds(128) == 2 * 4096


def test_a_step_is_bound_by_memory_with_few_rows_and_by_arithmetic_with_many() -> None:
    found = Calibration(
        bytes_per_s=1e9,
        flops_per_s=1e11,
        step_s=(1.0,) * len(ROWS),
        weights=10**6,
        weight_bytes=4 * 10**6,
        token_bytes=1000,
        attention_width=100,
    )
    assert found.bound_s([(1, 1000)]) == pytest.approx((4e6 + 1e6) / 1e9)
    assert found.bound_s([(500, 500)]) == pytest.approx((2 * 1e6 * 500 + 4 * 100 * 500 * 500) / 1e11)
