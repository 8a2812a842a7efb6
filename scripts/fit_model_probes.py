"""Fit the probes about many models: `python scripts/fit_model_probes.py ../shared/data`.

`zeroeval`: a head for each model of ZeroEval that answered every development question of GSM8K and CRUXEval, and the
heads `weak` and `strong` for RouteLLM's pair on the same GSM8K questions. `gsm8k`: that pair on those questions alone,
which ranks word problems better than a probe that knows other tasks too. `llmrouter`: the expected score of nine open
models on fourteen tasks.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from probes.artifact import write
from probes.extract import Encoder
from probes.manifest import ARTIFACTS
from probes.table import Table, read_table
from probes.train import Recipe, fit_probe

ROUTELLM = {"weak": "mixtral_8x7b_correct", "strong": "gpt4_1106_correct"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the tables of shared/data")
    parser.add_argument("--out", type=Path, default=ARTIFACTS, help="folder of artifacts")
    parser.add_argument("--only", nargs="*", help="names of those to fit")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    encoder = Encoder.load()
    gsm8k = read_table(args.data / "routellm_gsm8k.parquet", "prompt", ROUTELLM, drop_if="contaminated")
    tables = {"zeroeval": zeroeval(args.data), "gsm8k": gsm8k, "llmrouter": llmrouter(args.data)}
    for name in args.only or tables:
        table = tables[name]
        recipe = Recipe(recognise=name == "llmrouter", seed=args.seed)
        fitted = fit_probe(table, encoder, recipe, name=name, progress=True)
        write(fitted.artifact, args.out / name)
        print(
            f"wrote {args.out / name}: {fitted.artifact.version}, {len(table.names)} heads, {len(table.prompts)} rows"
        )


def zeroeval(data: Path) -> Table:
    """Wide, a row per question; NaN where RouteLLM did not ask it, or it is contaminated."""
    queries = pd.read_parquet(data / "zeroeval_queries.parquet").astype({"task": str, "qid": str})
    results = pd.read_parquet(data / "zeroeval_results.parquet").astype({"task": str, "qid": str})
    wide = results.pivot_table(index=["task", "qid"], columns="model", values="correct", aggfunc="first")
    wide = wide.reindex(pd.MultiIndex.from_frame(queries[["task", "qid"]])).astype(float)
    wide = wide[wide.columns[wide.notna().all()]]
    pair = pd.read_parquet(data / "routellm_gsm8k.parquet")
    pair = pair[~pair["contaminated"]].set_index("prompt")[list(ROUTELLM.values())].astype(float)
    both = np.column_stack([pair.reindex(queries["question"]).to_numpy(), wide.to_numpy()])
    sources = (*ROUTELLM.values(), *(f"{model} right" for model in wide.columns))
    return Table(list(queries["question"]), both, (*ROUTELLM, *wide.columns), sources)


def llmrouter(data: Path) -> Table:
    """Scores in [0, 1] of the train split."""
    table = pd.read_parquet(data / "llmrouter_9models.parquet")
    table = table[table["split"] == "train"]
    models = tuple(table.columns[4:])
    scores, groups = table[list(models)].to_numpy(dtype=np.float64), table["task"].to_numpy(dtype=object)
    return Table(list(table["question"]), scores, models, tuple(f"{model}: score" for model in models), groups)


if __name__ == "__main__":
    main()
