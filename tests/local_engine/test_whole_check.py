"""Steps in one native call are used only where they give the numbers of the layers and of the network's own head."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from local_engine import kernels
from local_engine.greedy import Greedy
from local_engine.kv import KVShape
from local_engine.model import LocalModel
from local_engine.norms import KernelNorm, Norm
from local_engine.runner import Runner, new_kv
from local_engine.sampler import Choice
from local_engine.whole import WholeForward
from tests.local_engine.runner_harness import BUDGET, Pair, by_torch, close, text, tiny_network

pytestmark = pytest.mark.skipif(
    not kernels.made_for(torch.float32), reason="this CPU is not one that our float32 kernels are for"
)
WIDTH = 192  # six heads of 32


@pytest.fixture
def whole_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor, int], Tensor]], None]:
    """Change what every step in one call gives: takes what is done with its logits, given how many tokens it had."""
    right = WholeForward.run

    def change(spoil: Callable[[Tensor, int], Tensor]) -> None:
        def run(self: WholeForward, packed: Any, *others: Any) -> tuple[Tensor, Tensor]:
            logits, hidden = right(self, packed, *others)
            return spoil(logits, len(packed.tokens)), hidden

        monkeypatch.setattr(WholeForward, "run", run)

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logits, tokens: logits * 1.001 if tokens > 1 else logits,
        lambda logits, tokens: logits if tokens > 1 else logits.roll(1, -1),
        lambda logits, tokens: logits.fill_(torch.nan),
    ],
    ids=["a prompt", "one token", "no numbers"],
)
def test_a_step_in_one_call_that_gives_other_logits_is_not_used_and_the_log_says_so(
    spoil: Callable[[Tensor, int], Tensor],
    whole_runs: Callable[..., None],
    bundled: LocalModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole_runs(spoil)
    runner = a_runner(bundled)
    assert "steps in one native call are not used" in caplog.text
    falls_back(runner)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda choice: replace(choice, token=(choice.token + 1) % 512),
        lambda choice: replace(choice, logprob=choice.logprob - 0.01),
    ],
    ids=["token", "probability"],
)
def test_a_greedy_kernel_that_chooses_otherwise_is_not_used_and_the_log_says_so(
    spoil: Callable[[Choice], Choice],
    bundled: LocalModel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = Greedy.after
    monkeypatch.setattr(Greedy, "after", lambda self, token: spoil(right(self, token)))
    runner = a_runner(bundled)
    assert "steps in one native call are not used" in caplog.text
    falls_back(runner)


def test_a_final_norm_that_gives_other_numbers_is_the_networks_own(
    bundled: LocalModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(module: Any) -> Norm:
        return KernelNorm(module.weight.detach() * 1.01, module.variance_epsilon)

    monkeypatch.setattr("local_engine.runner.best_norm", wrong)
    runner = a_runner(bundled)
    assert "steps in one native call are not used" in caplog.text
    falls_back(runner)


def test_the_check_takes_none_of_the_budget_and_leaves_nothing(bundled: LocalModel) -> None:
    """Not even where the budget is full, as it may be for who drafts over another runner's keys and values."""
    model = a_model(bundled)
    kv = new_kv(model, 256 * KVShape.of(model).token_bytes)
    first = Runner(model, kv)
    allocated = kv.bytes_allocated
    slot = kv.open(256)
    second = Runner(model, kv)
    assert first.writes_alone
    assert second.writes_alone
    kv.close(slot)
    assert kv.bytes_used == 0
    assert kv.bytes_allocated == allocated


def test_rows_that_are_held_for_torch_run_layer_by_layer(bundled: LocalModel) -> None:
    model = a_model(bundled)
    with by_torch():
        kv = new_kv(model, BUDGET)
    runner = Runner(model, kv)
    falls_back(runner)


def tied_network() -> Any:
    """Its head is a product of ours then."""
    network = tiny_network("llama", WIDTH)
    network.lm_head.weight = network.model.embed_tokens.weight
    return network


def a_model(bundled: LocalModel) -> LocalModel:
    return replace(bundled, network=tied_network())


def a_runner(bundled: LocalModel) -> Runner:
    model = a_model(bundled)
    return Runner(model, new_kv(model, BUDGET))


def falls_back(runner: Runner) -> None:
    """It runs layer by layer, and gives what transformers gives."""
    assert runner._whole is None
    assert not runner.writes_alone
    pair = Pair(runner, runner.kv, tied_network())
    slot = pair.read(text(9))
    assert close(pair.next_logits(slot, [*text(9), 1]), pair.expected([*text(9), 1])[0])
