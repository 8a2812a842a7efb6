"""The readable page of a bundled model, from its figures."""

from typing import Any

Figures = dict[str, Any]


def card_text(card: Figures) -> str:
    """`card.md`; sections whose figures are not there yet are left out."""
    parts = [
        f"# {card['name']}",
        "",
        f"A tiny language model for {card['task']}. Every result here is about synthetic arithmetic and says nothing "
        "about language in general.",
        "",
        f"{card['parameters']:,} parameters, Qwen3 architecture, bfloat16, a window of 1,024 tokens. Trained on "
        f"{card['training_tokens'] / 1e6:.1f}M tokens in {card['training_steps']:,} steps and "
        f"{card['training_core_minutes']} core-minutes (seed {card['seed']}, {card['date']}): "
        f"`python scripts/train_bundled.py {card['name'].removeprefix('bundled/')}`, then "
        "`python scripts/evaluate_bundled.py`.",
    ]
    if "evaluation" in card:
        how = card["evaluation"]
        parts += [
            "",
            f"Greedy answers to {how['n_per_level']} held-out problems per level and effort, {how['precision']}, seed "
            f"{how['seed']}. Brackets: 95% intervals.",
        ]
    sections = {
        "accuracy": _accuracy,
        "exit_at_cue": _exits,
        "agreement_with_base": _agreement,
        "exit_layers": _lens,
        "probes": _probes,
        "verdicts_on_draft_steps": _verdicts,
    }
    for key, section in sections.items():
        if key in card:
            parts += ["", *section(card[key])]
    return "\n".join(parts) + "\n"


def _accuracy(table: Figures) -> list[str]:
    lines = [
        "## Accuracy",
        "",
        "| level | none | low | high | tokens none / low / high |",
        "| --- | --- | --- | --- | --- |",
    ]
    for level in table["low"]:
        cells = [_share(table[effort][level]) for effort in ("none", "low", "high")]
        tokens = " / ".join(f"{table[effort][level]['mean_tokens']:.0f}" for effort in ("none", "low", "high"))
        lines.append(f"| {level.removeprefix('level_')} | {' | '.join(cells)} | {tokens} |")
    return lines


def _share(row: Figures) -> str:
    low, high = row["wilson95"]
    return f"{row['share']:.3f} [{low:.3f}, {high:.3f}]"


def _exits(table: Figures) -> list[str]:
    head = "| level | reach the cue | forced answer right | oracle saves | spoilt by the recheck | repaired by it |"
    lines = [
        "## Leaving high effort at the first cue",
        "",
        'The answer is forced at the first "Wait". The oracle leaves there exactly when that answer is right; what it '
        "saves is in tokens, of all tokens of all answers. Over-thinking: right at the cue, wrong at the end.",
        "",
        head,
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for level, row in table.items():
        lines.append(
            f"| {level.removeprefix('level_')} | {row['reach_cue']} of {row['n']} | {row['forced_right']} | "
            f"{row['oracle_saves']:.1%} | {row['spoilt_by_recheck']} | {row['repaired_by_recheck']} |"
        )
    return lines


def _agreement(figures: Figures) -> list[str]:
    by_level = ", ".join(
        f"{level.removeprefix('level_')}: {share:.3f}" for level, share in figures["share"].items() if level != "all"
    )
    return [
        "## Agreement with base",
        "",
        f"Its first choice is base's greedy token, given the same text before, for {figures['share']['all']:.3f} of "
        f"{figures['tokens']:,} tokens of base's low- and high-effort answers (by level: {by_level}).",
    ]


def _lens(figures: Figures) -> list[str]:
    by_layer = ", ".join(f"{layer}: {share:.3f}" for layer, share in figures["agreement"].items())
    return [
        "## Reading the next token early",
        "",
        f"Share of {figures['tokens']:,} written tokens on which the final norm and head, applied after each layer, "
        f"give the last layer's first choice. {by_layer}.",
    ]


def _probes(probes: Figures) -> list[str]:
    prompt, cue = probes["at_prompt"], probes["at_cue"]
    lines = [
        "## What probes know",
        "",
        "Logistic regressions, scored out of fold (5 folds); AUC.",
        "",
        f'Before the first token, for "{prompt["label"]}" ({prompt["right"]:,} of {prompt["n"]:,}). The second '
        "column compares prompts of equal length only, where length has 0.5.",
        "",
        "| from | AUC | at equal prompt length |",
        "| --- | --- | --- |",
    ]
    for name in prompt["auc"] | prompt["auc_at_equal_length"]:
        inside = prompt["auc_at_equal_length"].get(name, 0.5)
        lines.append(f"| {_name(name)} | {_auc(prompt['auc'].get(name))} | {inside:.3f} |")
    lines += [
        "",
        f'At the first cue, for "{cue["label"]}" ({cue["right"]:,} of {cue["n"]:,}).',
        "",
        "| from | AUC |",
        "| --- | --- |",
    ]
    return [*lines, *(f"| {_name(name)} | {_auc(value)} |" for name, value in cue["auc"].items())]


def _name(key: str) -> str:
    return key.replace("_", " ")


def _auc(value: list[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def _verdicts(figures: Figures) -> list[str]:
    return [
        "## Judging the draft's steps",
        "",
        f"The last step of draft's low-effort answers, or the first wrong one ({figures['right_steps']:,} of "
        f"{figures['n']:,} are right). Base's expected rating from 0 to 9 tells right from wrong with AUC "
        f"{_auc(figures['auc_rating'])}, the lowest log-probability that it gives to one of the step's tokens with "
        f"{_auc(figures['auc_min_logprob'])}.",
    ]
