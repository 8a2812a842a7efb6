"""From what a configuration says of speculation to who drafts."""

import time
from collections.abc import Callable, Mapping

from local_engine.config import Speculation, read_speculation
from local_engine.kv import KVCache, KVShape
from local_engine.model import LocalModel
from local_engine.runner import Runner, new_kv
from local_engine.spec.chain import ExitProposer, ModelProposer, check_vocabulary
from local_engine.spec.draft import Proposer
from local_engine.spec.ngram import NGramProposer
from local_engine.spec.recycle import RecycleProposer
from local_engine.spec.speculator import Speculator

MakeSpeculator = Callable[[str, LocalModel, KVCache], Speculator | None]
"""Takes the name of a model, the model and the KV of its sequences; gives who drafts for it."""


def without_speculation(name: str, model: LocalModel, kv: KVCache) -> None:
    """Nobody drafts."""


def speculators(speculation: Mapping[str, str], drafters: Mapping[str, LocalModel]) -> MakeSpeculator:
    """Who drafts, by `EngineConfig.speculation`; `drafters` holds the models that it names, by their sources."""

    def make(name: str, model: LocalModel, kv: KVCache) -> Speculator | None:
        return new_speculator(speculation.get(name, "auto"), model, kv, drafters)

    return make


def new_speculator(how: str, model: LocalModel, kv: KVCache, drafters: Mapping[str, LocalModel]) -> Speculator | None:
    """Who drafts for `model`, over whose KV an exit layer drafts; None for "off".

    Raises ModelLoadError for a drafting model of another vocabulary and for a layer that is not there.
    """
    wanted = read_speculation(how)
    if wanted == Speculation():
        return None
    free: list[Proposer] = []
    if wanted.ngram:
        free.append(NGramProposer())
    if wanted.recycle:
        free.append(RecycleProposer())
    drafter: Proposer | None = None
    if wanted.exit_layer is not None:
        drafter = ExitProposer(wanted.exit_layer, Runner(model, kv))
    elif wanted.draft is not None:
        drafter = _by_model(wanted.draft, drafters[wanted.draft], model, kv)
    clock = time.thread_time if model.device.type == "cpu" else time.perf_counter
    return Speculator(free, drafter, clock=clock)


def _by_model(source: str, drafter: LocalModel, model: LocalModel, kv: KVCache) -> ModelProposer:
    check_vocabulary(drafter, model)
    tokens = kv.bytes_limit // kv.token_bytes
    own = new_kv(drafter, tokens * KVShape.of(drafter).token_bytes)  # as many tokens as the model itself may hold
    return ModelProposer(source, Runner(drafter, own), model.network.config.vocab_size)
