"""What staying with a model is worth to agents: tau-bench conversations replayed turn by turn, with their prefixes.

Every turn of an assistant is decided anew by the shipped probe's word on the whole conversation so far, then billed as
a provider with a prompt cache bills it: what the model that answers read and wrote of this conversation before is
cached input. Nobody is called; how good the other model's answer would have been is not known, so only cost is told,
beside the share of turns that the strong model answers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
from results_file import Row

from gateway.sessions import Conversation, after
from probes.calibrate import Array
from probes.evaluate import interval, resamples
from probes.runtime import EncoderProbe
from probes.types import Estimate
from routers.cost import costs_nanousd
from routers.decide import decide
from routers.load import parse
from routers.policy import Policy
from routers.types import Query, Signals, State

POLICY = """
version: 1
providers: {p: {base_url: "http://127.0.0.1:9/v1"}}
models:
  weak: {provider: p, model: w, price: {input: $0.25/Mtok, cached_input: $0.025/Mtok, output: $2/Mtok}}
  strong: {provider: p, model: s, price: {input: $1.25/Mtok, cached_input: $0.125/Mtok, output: $10/Mtok}}
signals: {difficulty: {probe: default, heads: {weak: weak, strong: strong}}}
routes:
  - name: auto
    when: {model: auto}
    candidates: [weak, strong]
    objective: cheapest
    subject_to: {p_success_gap: "<= GAP"}
"""
AFFINITY = "    affinity: {ttl: 1h}\n"
BYTES_PER_TOKEN = 4
TURN_MS = 10_000


@dataclass(frozen=True, slots=True)
class Turn:
    """What is asked at one turn, how long it and its answer are, and what the probe says of it."""

    tokens: int
    answer: int
    p: dict[str, float]


@dataclass(frozen=True, slots=True)
class Replayed:
    """Of each conversation [n]: dollars, changes of model, tokens of input cached and in all, turns at strong."""

    usd: Array
    switches: Array
    cached: Array
    tokens: Array
    strong: Array
    turns: Array


def affinity_rows(data: Path, seed: int = 0) -> list[Row]:
    """Rows for `make bench-routing`: each way of routing, and what affinity saves, with paired intervals."""
    conversations = turns_of(data / "taubench_airline_gpt4o.parquet")
    gap = float(np.median([turn.p["strong"] - turn.p["weak"] for turns in conversations for turn in turns]))
    alone = parse(POLICY.replace("GAP", f"{max(gap, 0.0):.4f}"))
    stays = parse(POLICY.replace("GAP", f"{max(gap, 0.0):.4f}") + AFFINITY)
    ways = {
        "always weak": [replay(turns, alone, "weak") for turns in conversations],
        "always strong": [replay(turns, alone, "strong") for turns in conversations],
        "each turn anew": [replay(turns, alone, "auto") for turns in conversations],
        "affinity": [replay(turns, stays, "auto") for turns in conversations],
    }
    found = {name: Replayed(*np.array(played, np.float64).T) for name, played in ways.items()}
    draws = list(resamples(len(conversations), 1000, seed))
    rows: list[Row] = []
    for name, one in found.items():
        spread = interval([float(one.usd[i].mean()) for i in draws])
        rows.append(Row(name, "cost", float(one.usd.mean()), *spread, unit="USD a conversation"))
        rows.append(Row(name, "cached input", float(one.cached.sum() / one.tokens.sum()), unit="share"))
        rows.append(Row(name, "switches", float(one.switches.mean()), unit="a conversation"))
        rows.append(Row(name, "strong", float(one.strong.sum() / one.turns.sum()), unit="share of turns"))
    anew, held = found["each turn anew"].usd, found["affinity"].usd
    saved = interval([1 - float(held[i].sum() / anew[i].sum()) for i in draws])
    rows.append(
        Row("affinity", "cost saved", 1 - float(held.sum() / anew.sum()), *saved, unit="share of each turn anew")
    )
    return rows


def turns_of(table: Path) -> list[list[Turn]]:
    """Every conversation as its assistant's turns, each asked with all before it."""
    probe = EncoderProbe.load()
    found = []
    for text in pd.read_parquet(table, columns=["traj_json"])["traj_json"]:
        messages = json.loads(text)
        at = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
        said = probe.probe([messages[:i] for i in at])
        found.append(
            [Turn(_tokens(messages[:i]), _tokens(messages[i : i + 1]), p) for i, p in zip(at, said, strict=True)]
        )
    return found


def replay(turns: Sequence[Turn], policy: Policy, asked: str) -> tuple[float, int, int, int, int, int]:
    """One conversation: (USD, switches, cached tokens, input tokens, turns at strong, turns)."""
    known: Conversation | None = None
    nanousd, switches, cached_tokens, tokens, strong = 0, 0, 0, 0, 0
    for number, turn in enumerate(turns):
        now_ms = number * TURN_MS
        held = {} if known is None else known.cached_tokens(now_ms, 3_600_000)
        query = Query(asked, "default", turn.tokens, None, session="s", id=f"turn-{number}", at_ms=now_ms)
        signals = Signals({name: Estimate(turn.p[name], f"default/{name}") for name in ("weak", "strong")}, probe="ok")
        state = State(now_ms=now_ms)
        route = policy.route_for(query)
        if known is not None and route is not None and route.affinity is not None:
            signals = msgspec.structs.replace(signals, cached_tokens=held)
            state = msgspec.structs.replace(state, session_model=known.model, session_p=known.p_success)
        decision = decide(query, signals, policy, state, seed=number)
        model = policy.models[decision.plan.model]
        cached = min(held.get(model.name, 0), turn.tokens)
        cost, _ = costs_nanousd(model, query, turn.tokens, turn.answer, cached)
        nanousd += cost or 0
        switches += known is not None and known.model != model.name
        cached_tokens, tokens = cached_tokens + cached, tokens + turn.tokens
        strong += model.name == "strong"
        known = after(known, decision, model.name, "p", turn.tokens + turn.answer, now_ms)
    return nanousd / 1e9, switches, cached_tokens, tokens, strong, len(turns)


def _tokens(messages: Sequence[object]) -> int:
    return -(-len(json.dumps(messages, ensure_ascii=False).encode()) // BYTES_PER_TOKEN)
