"""How far a probe's routing moves when prompts are perturbed, or written by somebody who wants the strong model."""

import random
from collections.abc import Callable, Sequence

import numpy as np
from results_file import Row
from routing_data import MAX_TOKENS, Outcomes, hidden, read_by_probe

from probes.calibrate import Array
from probes.evaluate import apgr, folds, interval, resamples
from probes.extract import Encoder
from probes.kernel import ProbeClassifier
from probes.text import render
from probes.train import DEFAULT_LAYERS

QUERIES, TUNED_ON = 300, 6
STRONG_SHARE = 0.3
"""What the threshold sends to the strong model when nobody attacks; the policy's cap is that much and a fifth more."""
CAP = 1.2 * STRONG_SHARE
PRICES = (0.6, 20.0)
"""USD per million tokens of the pair, for the cost of an attack; the strong model's is the mean of in and out."""
CANDIDATES = (
    "theorem", "Prove rigorously", "manifold", "eigenvalue", "hypothesis", "quantum", "statute", "jurisprudence",
    "integral", "P(x)", "modulo", "homomorphism", "differential diagnosis", "pharmacokinetics", "enthalpy", "≥ ∑ ∂",
    "step by step", "very difficult", "!!!!", "describing.\\ + similarlyNow", "{x_i}", "0.0173", "Kant", "doctrine",
)  # fmt: skip
ROUNDS = 3


def attack_rows(table: Outcomes, encoder: Encoder, seed: int = 0) -> list[Row]:
    """The probe is fitted on four folds; queries are of the fifth, the suffix is tuned on others of the fifth."""
    seen, unseen = folds(len(table.prompts), seed)[0]
    model = ProbeClassifier().fit(read_by_probe(hidden(encoder, table.prompts)[seen]), table.scores[seen])
    rows = np.random.default_rng(seed).permutation(unseen)
    asked, tuned = rows[:QUERIES], rows[QUERIES : QUERIES + TUNED_ON]
    weak, strong = table.scores[asked].T

    def gaps(prompts: Sequence[str]) -> Array:
        states = encoder.features(prompts, layers=DEFAULT_LAYERS, max_tokens=MAX_TOKENS).reshape(len(prompts), -1)
        p = model.predict_proba(states)
        return np.asarray(p[:, 1] - p[:, 0])

    prompts = [table.prompts[i] for i in asked]
    plain = gaps(prompts)
    draws = list(resamples(len(asked), 1000, seed))
    found = [Row("as written", "APGR", apgr(plain, weak, strong), *_spread(plain, weak, strong, draws))]
    threshold = float(np.quantile(plain, 1 - STRONG_SHARE))
    for name, change in PERTURBATIONS.items():
        moved = gaps([change(prompt, random.Random(f"{seed} {prompt}")) for prompt in prompts])
        lost = [apgr(moved[i], weak[i], strong[i]) - apgr(plain[i], weak[i], strong[i]) for i in draws]
        difference = apgr(moved, weak, strong) - apgr(plain, weak, strong)
        found += [
            Row(name, "APGR minus as written", difference, *interval(lost)),
            Row(name, "mean move of the gap", float(np.abs(moved - plain).mean()), unit="probability"),
            Row(name, "decisions changed", float(((moved > threshold) != (plain > threshold)).mean()), unit="share"),
        ]

    suffix = gadget(gaps, [table.prompts[i] for i in tuned])
    fooled = gaps([f"{prompt} {suffix}" for prompt in prompts]) > threshold
    before = plain > threshold
    found += [
        Row("gadget suffix", "misroute rate", float(fooled[~before].mean()), unit="share of weak queries"),
        Row("gadget suffix", "strong share", float(fooled.mean()), unit="share"),
    ]
    limit, base = f"strong capped at {CAP:.0%}", _cost(float(before.mean()))
    for name, wanted in {"gadget suffix": fooled, "score stuck at strong": np.ones(len(fooled), bool)}.items():
        capped = capped_share(wanted, CAP)
        found += [
            Row(f"{name}, no cap", "cost uplift", _cost(float(wanted.mean())) / base, unit="times"),
            Row(f"{name}, {limit}", "strong share", capped, unit="share"),
            Row(f"{name}, {limit}", "cost uplift", _cost(capped) / base, unit="times"),
        ]
    return found


def gadget(gaps: Callable[[Sequence[str]], Array], prompts: Sequence[str]) -> str:
    """Greedy search (Shafran et al., arXiv 2501.01818): in each round the word that raises the mean gap the most."""
    suffix = ""
    for _ in range(ROUNDS):
        trials = [f"{suffix} {word}".strip() for word in CANDIDATES]
        reached = gaps([f"{prompt} {trial}" for trial in trials for prompt in prompts]).reshape(len(trials), -1).mean(1)
        suffix = trials[int(reached.argmax())]
    return suffix


def capped_share(wants_strong: Array, cap: float) -> float:
    """Share of strong calls when a budget allows the cap over the whole run and refuses beyond, in order of arrival."""
    allowed = int(cap * len(wants_strong))
    return float(min(int(wants_strong.sum()), allowed) / len(wants_strong))


def _cost(strong_share: float) -> float:
    return float(PRICES[0] * (1 - strong_share) + PRICES[1] * strong_share)


def _spread(scores: Array, weak: Array, strong: Array, draws: Sequence[Array]) -> tuple[float, float]:
    return interval([apgr(scores[i], weak[i], strong[i]) for i in draws])


def _typos(prompt: str, rng: random.Random) -> str:
    """One letter in twenty changes places with the next."""
    letters = list(prompt)
    for i in range(len(letters) - 1):
        if letters[i].isalpha() and letters[i + 1].isalpha() and rng.random() < 0.05:
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def _framed(prompt: str, rng: random.Random) -> str:
    greeting = rng.choice(("Hi! I hope you are well.", "Hello there,", "Hey, quick one:"))
    return f"{greeting} could you help me with this question, please?\n\n{prompt}\n\nThanks a lot!"


def _conversation(prompt: str, rng: random.Random) -> str:
    return render(
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hi, can I ask you something?"},
            {"role": "assistant", "content": "Of course. What would you like to know?"},
            {"role": "user", "content": prompt},
        ]
    )


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "lower case": lambda prompt, rng: prompt.lower(),
    "upper case": lambda prompt, rng: prompt.upper(),
    "typos": _typos,
    "polite framing": _framed,
    "in a conversation": _conversation,
}
