"""What a prompt means to the shipped probe does not hang on how it is typed: case, typos, courtesy, chat around it.

Bounds on how far P moves and on decisions that flip at the certificate's threshold, on fixed prompts. The probe reads
the whole conversation, so framing moves it a little; docs/experiments.md has the numbers on many prompts.
"""

import random
from collections.abc import Callable

import numpy as np
import pytest

from probes.manifest import Certificate, default_artifact_path, read_manifest
from probes.runtime import EncoderProbe

Messages = list[dict[str, str]]
HEADS = ("weak", "strong")
QUESTIONS = [
    "What is the capital of France?\nA. Paris\nB. Lyon\nC. Marseille\nD. Nice",
    "Which organ pumps blood through the human body?\nA. The liver\nB. The heart\nC. The lungs\nD. The kidneys",
    "A company's current ratio rises while its quick ratio falls. Which explains it?\nA. Inventory was bought on "
    "credit\nB. Debtors paid\nC. Shares were issued\nD. A dividend was declared",
    "Find the degree of the extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6",
    "Let A be a real symmetric 5x5 matrix with characteristic polynomial (x - 2)^3 (x + 1)^2. What is the dimension of "
    "the kernel of A - 2I?\nA. 1\nB. 2\nC. 3\nD. 5",
    "Which of the following best describes the holding in Marbury v. Madison?\nA. Judicial review\nB. Separate but "
    "equal\nC. One person, one vote\nD. The right to counsel",
    "For two independent events P(A) = 0.3 and P(B) = 0.4. What is P(A or B)?\nA. 0.12\nB. 0.58\nC. 0.70\nD. 0.82",
    "A patient presents with fatigue, weight gain and cold intolerance. Which hormone is most likely deficient?\n"
    "A. Insulin\nB. Cortisol\nC. Thyroxine\nD. Glucagon",
]


def said(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def typos(text: str) -> str:
    """Two letters swapped at one place in thirty."""
    rng, letters = random.Random(7), list(text)
    spots = [i for i in range(len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    for i in rng.sample(spots, max(1, len(text) // 30)):
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


FRAMES: dict[str, Callable[[str], Messages]] = {
    "typos": lambda text: said(typos(text)),
    "template": lambda text: said(f"Question: {text}\nAnswer:"),
    "courtesy": lambda text: said(f"Hi! Could you please help me with this?\n\n{text}\n\nThanks a lot!"),
    "system": lambda text: [{"role": "system", "content": "You are a helpful assistant."}, *said(text)],
    "greeting": lambda text: [*said("Hello"), {"role": "assistant", "content": "How can I help?"}, *said(text)],
}


@pytest.fixture(scope="module")
def plain(default_probe: EncoderProbe) -> np.ndarray:
    return probabilities(default_probe, [said(text) for text in QUESTIONS])


def probabilities(probe: EncoderProbe, conversations: list[Messages]) -> np.ndarray:
    """[n, heads]"""
    return np.array([[p[head] for head in HEADS] for p in probe.probe(conversations)])


def certificate() -> Certificate:
    found = read_manifest(default_artifact_path()).certificate_for(0.05, heads=HEADS)
    assert found is not None, "the shipped artifact has its certificate"
    return found


@pytest.mark.parametrize(
    "written", [str.lower, str.upper, lambda text: f"  {text}\n\n", lambda text: text.replace(" ", "  ")]
)
def test_case_and_white_space_mean_nothing(
    default_probe: EncoderProbe, plain: np.ndarray, written: Callable[[str], str]
) -> None:
    np.testing.assert_allclose(
        probabilities(default_probe, [said(written(text)) for text in QUESTIONS]), plain, atol=1e-4
    )


@pytest.mark.parametrize("frame", FRAMES)
def test_how_a_question_is_put_moves_p_little(default_probe: EncoderProbe, plain: np.ndarray, frame: str) -> None:
    moved = np.abs(probabilities(default_probe, [FRAMES[frame](text) for text in QUESTIONS]) - plain)
    assert moved.mean() < 0.1
    assert moved.max() < 0.4


def test_decisions_flip_only_near_the_threshold(default_probe: EncoderProbe, plain: np.ndarray) -> None:
    threshold = certificate().threshold
    margin = plain[:, 0] - plain[:, 1]
    flips = []
    for frame in FRAMES.values():
        p = probabilities(default_probe, [frame(text) for text in QUESTIONS])
        flips.append((p[:, 0] - p[:, 1] > threshold) != (margin > threshold))
    assert np.mean(flips) < 0.3
    far = np.abs(margin - threshold) > 0.2
    assert not np.array(flips)[:, far].any()
    # Neither all nor none of the questions is kept: else no decision could flip.
    assert 0 < (margin > threshold).mean() < 1


def test_the_whole_conversation_counts(default_probe: EncoderProbe, plain: np.ndarray) -> None:
    """A follow-up is as hard as what it follows, not as its own words."""
    go_on = said("ok, go ahead")
    talks = [[*said(text), {"role": "assistant", "content": "Let me think."}, *go_on] for text in QUESTIONS]
    followed = probabilities(default_probe, talks)
    alone = probabilities(default_probe, [go_on])
    assert np.abs(followed - plain).mean() < 0.1
    assert np.abs(followed - plain).mean() < 0.6 * np.abs(alone - plain).mean()
    # The order of difficulty is kept.
    for head in range(2):
        assert np.corrcoef(followed[:, head], plain[:, head])[0, 1] > 0.8
