"""The decoder layers in one call: what the same layers give one by one, whatever a step asks for."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from local_engine import kernels, shared_product, team
from local_engine import whole as whole_module
from local_engine.kv import KVCache
from local_engine.model import LocalModel, load_model
from local_engine.runner import Runner, Segment, StepOutput, new_kv
from local_engine.tapped import Tapped
from tests.local_engine.runner_harness import BUDGET, FAMILIES, LAYERS, close, text, tiny_model, tiny_network

pytestmark = pytest.mark.skipif(
    not kernels.made_for(torch.float32), reason="this CPU is not one that our float32 kernels are for"
)
WIDTH = 192  # six heads of 32
HELD = (40, 33, 12, 30)
LONG = 3  # this one has a row of its own size


@pytest.fixture(params=FAMILIES)
def runner(request: pytest.FixtureRequest, bundled: LocalModel) -> Runner:
    torch.set_num_threads(1)
    model = tiny_model(request.param, bundled, WIDTH)
    model.network.config.max_position_embeddings = 1024
    runner = Runner(model, new_kv(model, BUDGET))
    assert runner._whole is not None
    return runner


def slots(kv: KVCache, runner: Runner) -> list[int]:
    found = [kv.open(600 if at == LONG else 64) for at in range(len(HELD))]
    runner.run([Segment(slot, 0, text(held, seed=held)) for slot, held in zip(found, HELD, strict=True)])
    return found


def kept(output: StepOutput) -> StepOutput:
    """Its hidden states copied: the runner's next step writes over them."""
    return replace(output, hidden=Tapped(output.hidden.layers, output.hidden.states.clone()))


def near(left: StepOutput, right: StepOutput) -> None:
    torch.testing.assert_close(left.logits, right.logits, rtol=0, atol=1e-5)
    assert left.hidden.keys() == right.hidden.keys()
    for layer, states in left.hidden.items():
        torch.testing.assert_close(states, right.hidden[layer], rtol=0, atol=1e-5)


def test_a_step_gives_what_its_layers_give_one_by_one(runner: Runner) -> None:
    """Windows of several tokens, rows of two sizes, taps of every layer, more tokens than are multiplied together."""
    kv, whole = runner.kv, runner._whole
    own = slots(kv, runner)
    for counts in ((1, 1, 1, 1), (1, 5, 2, 16), (9, 9, 9, 9), (100, 1, 70, 128)):
        segments = [
            Segment(slot, held, text(count, seed=count + held), logits=1 + held % count, taps=(0, count - 1))
            for slot, held, count in zip(own, HELD, counts, strict=True)
        ]
        outputs = []
        for way in (whole, None):
            runner._whole = way
            outputs.append(kept(runner.run(segments, tap_layers=range(LAYERS + 1))))
            for slot, held in zip(own, HELD, strict=True):
                kv.truncate(slot, held)
        near(*outputs)
        runner._whole = whole


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not kernels.made_for(torch.bfloat16), reason="this CPU is not one for our bfloat16 kernels"
            ),
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_gives_the_logits_of_transformers(family: str, dtype: torch.dtype, bundled: LocalModel) -> None:
    """In bfloat16: logits as near to the exact ones as transformers' are."""
    model = tiny_model(family, bundled, WIDTH)
    exact, theirs = (tiny_network(family, WIDTH) for _ in range(2))
    model.network.to(dtype)
    theirs.to(dtype)
    kv = new_kv(model, BUDGET)
    runner = Runner(model, kv)
    assert runner._whole is not None
    texts, news = [text(length, seed=length) for length in (40, 33, 12)], (1, 4, 1)
    triples = list(zip([kv.open(64) for _ in texts], texts, news, strict=True))
    runner.run([Segment(slot, 0, tokens[:-new]) for slot, tokens, new in triples])
    steps = [Segment(slot, len(tokens) - new, tokens[-new:], logits=new) for slot, tokens, new in triples]
    ours = runner.run(steps).logits
    with torch.no_grad():
        expected, rounded = (
            torch.cat([network(torch.tensor([tokens])).logits[0, -new:] for _, tokens, new in triples]).float()
            for network in (exact, theirs)
        )
    if dtype == torch.float32:
        assert close(ours, expected)
    else:
        assert float((ours - expected).abs().max()) <= 2 * float((rounded - expected).abs().max())


def test_it_stops_at_a_layer_and_goes_on_there(runner: Runner) -> None:
    own = slots(runner.kv, runner)
    segments = [Segment(slot, held, [held, 7], logits=1, taps=(1,)) for slot, held in zip(own, HELD, strict=True)]
    straight = kept(runner.run(segments, tap_layers=[2]))
    for slot, held in zip(own, HELD, strict=True):
        runner.kv.truncate(slot, held)
    begun = runner.run(segments, layers=(0, 1))
    near(straight, runner.run(segments, layers=(1, LAYERS), state=begun.state, tap_layers=[2]))


def test_a_step_of_more_tokens_takes_no_more_room_for_their_scores(runner: Runner) -> None:
    assert runner._whole is not None
    segments = [Segment(runner.kv.open(64), 0, text(64, seed=row)) for row in range(4)]
    runner.run(segments[:1])
    room = runner._whole._scores.numel()
    runner.run(segments[1:])
    assert runner._whole._scores.numel() == room


def test_a_token_that_the_model_does_not_have_is_refused_and_no_memory_read_for_it(runner: Runner) -> None:
    slot = runner.kv.open(64)
    with pytest.raises(IndexError, match="the model has tokens 0 to"):
        runner.run([Segment(slot, 0, [5, runner._body.embed_tokens.num_embeddings])])
    assert runner.kv.length(slot) == 0


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, LocalModel], Runner]]:
    """A runner whose steps so many threads share, however small its model."""
    if not team.supported():
        pytest.skip("threads share work on Linux alone")
    monkeypatch.setattr(whole_module, "_WEIGHTS_EACH", 1)
    monkeypatch.setattr(shared_product, "_WORK_EACH", 1)

    def make(threads: int, model: LocalModel) -> Runner:
        torch.set_num_threads(threads)
        model.network.config.max_position_embeddings = 1024
        runner = Runner(model, new_kv(model, BUDGET))
        assert runner._whole is not None
        assert runner._whole._threads == threads
        return runner

    yield make
    torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_threads_give_the_bits_that_one_gives(
    family: str, threads: int, bundled: LocalModel, shared: Callable[[int, LocalModel], Runner]
) -> None:
    """One row and many, of one token and of more than are attended to together, tapped, stopped and resumed. The head
    of these is torch's: logits are as near as its threads leave them."""
    (logits, states), (their_logits, their_states) = (
        everything(shared(count, tiny_model(family, bundled, WIDTH))) for count in (1, threads)
    )
    assert all(torch.equal(one, many) for one, many in zip(states, their_states, strict=True))
    for one, many in zip(logits, their_logits, strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=1e-5)


def everything(runner: Runner) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The logits of some steps, whole and layer by layer; and their hidden states, and what they keep."""
    kv, whole, logits, states = runner.kv, runner._whole, [], []
    own = slots(kv, runner)
    for counts in ((1, 1, 1, 1), (1, 5, 2, 16), (100, 1, 70, 128), (1, 1, 1, 300)):
        segments = [
            Segment(slot, held, text(count, seed=count + held), logits=1 + held % count, taps=(0, count - 1))
            for slot, held, count in zip(own, HELD, counts, strict=True)
        ]
        for way in (whole, None):
            runner._whole = way
            output = kept(runner.run(segments, tap_layers=range(LAYERS + 1)))
            logits.append(output.logits)
            states.append(output.hidden.states)
            states += [kv.export(slot, 0, held + 1) for slot, held in zip(own, HELD, strict=True)]
            for slot, held in zip(own, HELD, strict=True):
                kv.truncate(slot, held)
        runner._whole = whole
    alone = [Segment(own[0], HELD[0], [7], logits=1, taps=(0,))]
    begun = runner.run(alone, layers=(0, 1))
    ended = kept(runner.run(alone, layers=(1, LAYERS), state=begun.state, tap_layers=[LAYERS]))
    return [*logits, ended.logits], [*states, ended.hidden.states]


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_logits_that_one_gives(threads: int, shared: Callable[[int, LocalModel], Runner]) -> None:
    """Of a head of our own; and what is written greedily."""
    found = []
    for count in (1, threads):
        runner = shared(count, load_model("base", "bundled/base", "float32", "cpu"))
        own = [runner.kv.open(64) for _ in range(9)]
        segments = [Segment(slot, 0, text(20 + slot, seed=slot), logits=slot + 1) for slot in own]
        logits = runner.run(segments).logits
        greedy = runner.greedy(own[0], 64)
        assert greedy is not None
        found.append((logits, greedy.ahead([3, 5], 12, 0.0)))
    (one, written), (many, theirs) = found
    assert torch.equal(one, many)
    assert written == theirs


def held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in the type they were loaded in, though they would lose nothing by less."""
    monkeypatch.setattr(kernels, "held_as", lambda weights: weights[0].dtype)


@pytest.mark.parametrize("narrow", [True, False], ids=["in half their bytes", "as they are"])
@pytest.mark.parametrize(("rows", "apart", "some"), [(40, 8, 3), (80, 2, 1)])
def test_many_rows_give_the_bits_that_few_give(
    rows: int, apart: int, some: int, narrow: bool, habits: kernels.Habits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two pools, some of several tokens, or more of one pool than are attended to together: enough that
    products fetch keys and values beside their weights, where they do."""
    if not narrow:
        held_whole(monkeypatch)
    model = load_model("base", "bundled/base", "float32", "cpu")
    kv = new_kv(model, 4 * BUDGET)
    runner = Runner(model, kv)
    assert runner._whole is not None
    assert runner.held == ((torch.bfloat16,) * 2 if narrow else (torch.float32,) * 2)
    segments = []
    for row in range(rows):
        tokens, new = text(20 + apart * row, seed=row), 1 if row % 5 else some
        slot = kv.open(len(tokens))
        runner.run([Segment(slot, 0, tokens[:-new])])
        segments.append(Segment(slot, len(tokens) - new, tokens[-new:], logits=new))
    few = torch.cat([runner.run(segments[row : row + 5]).logits for row in range(0, rows, 5)])
    runner._whole._fetch[kernels.Beside.ADDRESS] = 0
    for segment in segments:
        kv.truncate(segment.slot, segment.start)
    assert torch.equal(runner.run(segments).logits, few)
    assert (runner._whole._fetch[kernels.Beside.ADDRESS] > 0) == habits.beside


def test_weights_held_in_half_their_bytes_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint in bfloat16: logits and hidden states of few and many tokens, and what is written greedily."""
    found = []
    for narrow in (True, False):
        with monkeypatch.context() as patch:
            if not narrow:
                held_whole(patch)
            model = load_model("base", "bundled/base", "float32", "cpu")
            runner = Runner(model, new_kv(model, BUDGET))
        slot, other = (runner.kv.open(400) for _ in range(2))
        given = []
        for begin, end in ((0, 300), (300, 309), (309, 310)):
            segments = [Segment(at, begin, text(end, seed=at)[begin:], logits=1, taps=(0,)) for at in (slot, other)]
            output = kept(runner.run(segments, tap_layers=range(runner.layers + 1)))
            given += [output.logits, output.hidden.states]
        greedy = runner.greedy(slot, 400)
        assert greedy is not None
        assert runner.held[0] == (torch.bfloat16 if narrow else torch.float32)
        found.append((given, greedy.ahead([3, 5], 12, 0.0)))
    (half, written), (whole, theirs) = found
    assert all(torch.equal(one, other) for one, other in zip(half, whole, strict=True))
    assert written == theirs
