"""Fitting the `static` tier: features of texts, heads of every kind over them, and tables of bytes out of both."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from tqdm import tqdm

from probes.artifact import calibration_tensor
from probes.calibrate import Array
from probes.evaluate import Row, folds
from probes.kinds import fit_others, kind_rows, values_of
from probes.manifest import TENSORS, HeadInfo, Manifest, sketch, version_of, write_manifest
from probes.sparse import SparseProbeClassifier
from probes.static import BUCKETS, CLIP, FEATURES, FEATURES_SHA256, MAX_CHARS, STATS, words_of
from probes.table import Table
from probes.train import certificates_of, head_info, library_versions, table_rows, undecided

STATS_WEIGHT = 0.1
"""Of one standard deviation of a statistic, beside words of length one in all: keeps a few numbers from ruling."""
UNFAMILIAR = 0.005
"""The share of training texts that may be as strange as one on which the probe abstains."""


class TextFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """Texts to sparse rows [n, len(STATS) + len(buckets_)]: scaled statistics, then hashed words of unit length.

    Learnt: `buckets_`, those that any text of the table uses (others can have no weight); `rarity_` [BUCKETS], squared
    inverse document frequencies as bytes of `rarity_scale_`; `mean_` and `std_` of the statistics; `limits_`.
    """

    def fit(self, texts: Sequence[str], y: object = None) -> Self:
        """Learn how rare words are, and how texts look."""
        present, stats = _counted(texts)
        frequency = np.asarray(present.sum(0)).ravel()
        rarity = (np.log((1 + len(texts)) / (1 + frequency)) + 1) ** 2
        scale = float(rarity.max()) / 255
        self.rarity_scale_ = scale
        self.buckets_ = np.flatnonzero(frequency)
        self.rarity_ = np.maximum(1, np.round(rarity / scale)).astype(np.uint8)
        self.mean_, self.std_ = stats.mean(0), np.maximum(stats.std(0), 1e-3)
        # How strange each text would be to the others: without its own counts. Else all that is new looks strange.
        others = (np.log((1 + len(texts)) / np.maximum(1, frequency)) + 1) ** 2
        strangeness = (present @ others) / np.maximum(1, np.asarray(present.sum(1)).ravel())
        self.limits_ = {
            "chars": float(4 * np.quantile([len(text) for text in texts], 1 - UNFAMILIAR)),
            "rarity": float(np.quantile(strangeness, 1 - UNFAMILIAR)),
        }
        return self

    def transform(self, texts: Sequence[str]) -> Any:
        """CSR rows."""
        check_is_fitted(self)
        present, stats = _counted(texts)
        rarity = self.rarity_.astype(np.float64) * self.rarity_scale_
        norm = np.sqrt(present @ rarity)
        norm[norm == 0] = 1
        words = sparse.csr_matrix(sparse.diags(1 / norm) @ present @ sparse.diags(np.sqrt(rarity)))
        z = np.clip((stats - self.mean_) / self.std_, -CLIP, CLIP) * STATS_WEIGHT
        return sparse.csr_matrix(sparse.hstack([sparse.csr_matrix(z), words[:, self.buckets_]]))


def _counted(texts: Sequence[str]) -> tuple[Any, Array]:
    """(which buckets each text has [n, BUCKETS], its statistics [n, len(STATS)])."""
    stats = np.empty((len(texts), len(STATS)))
    columns: list[int] = []
    ends = [0]
    for row, text in enumerate(texts):
        words = words_of(text)
        columns.extend(sorted(words.places))
        ends.append(len(columns))
        stats[row] = words.stats
    present = sparse.csr_matrix(
        (np.ones(len(columns)), np.array(columns, np.int32), np.array(ends, np.int32)), shape=(len(texts), BUCKETS)
    )
    return present, stats


@dataclass(frozen=True, slots=True)
class StaticFit:
    """A fitted static probe as arrays, and its out-of-fold values [n, heads]."""

    tensors: dict[str, npt.NDArray[Any]]
    heads: tuple[HeadInfo, ...]
    limits: dict[str, float]
    out_of_fold: Array


def fit_static(table: Table, *, seed: int = 0, answers: float = 0.5, progress: bool = False) -> StaticFit:
    """Fit every head on all rows, and measure out of fold (5 folds; text features, too, never see their test rows).

    `answers`: the share of queries on which a correctness head is decided; where its probability lies nearer to the
    base rate than that, it leaves the word to a dearer tier.
    """
    binary = [at for at, kind in enumerate(table.kinds) if kind in ("correct", "needs_reasoning")]
    out = np.full(table.labels.shape, np.nan)
    for train, test in tqdm(folds(len(table.prompts), seed), desc="folds", disable=not progress):
        features = TextFeatures().fit([table.prompts[i] for i in train])
        X = features.transform([table.prompts[i] for i in train])
        T = features.transform([table.prompts[i] for i in test])
        if binary:
            model = SparseProbeClassifier(seed=seed).fit(X, table.labels[np.ix_(train, binary)])
            out[np.ix_(test, binary)] = model.predict_proba(T)
        for at, values in values_of(T, fit_others(X, table.labels[train], table.kinds, seed), table.kinds).items():
            out[test, at] = values
    features = TextFeatures().fit(table.prompts)
    X = features.transform(table.prompts)
    coefs = np.zeros((len(table.names), X.shape[1]))
    intercepts = np.zeros(len(table.names))
    tensors: dict[str, npt.NDArray[Any]] = {}
    spreads: dict[int, tuple[float, float] | None] = {}
    if binary:
        model = SparseProbeClassifier(seed=seed).fit(X, table.labels[:, binary])
        coefs[binary], intercepts[binary] = model.coef_, model.intercept_
        for at, calibrator in zip(binary, model.calibrators_, strict=True):
            tensors[f"calibration.{table.names[at]}"] = calibration_tensor(calibrator)
    for at, head in fit_others(X, table.labels, table.kinds, seed).items():
        coefs[at], intercepts[at], spreads[at] = head.coef, head.intercept, head.spread
    infos = tuple(
        head_info(table, at, undecided=undecided(out[:, at], answers), spread=spreads.get(at), out_of_fold=out[:, at])
        for at in range(len(table.names))
    )
    words = np.zeros((len(table.names), BUCKETS))
    words[:, features.buckets_] = coefs[:, len(STATS) :]
    words *= np.sqrt(features.rarity_.astype(np.float64) * features.rarity_scale_)
    scale = np.maximum(np.abs(words).max(1), 1e-12) / 127
    tensors |= {
        "table": np.round(words / scale[:, None]).astype(np.int8),
        "table_scale": scale,
        "rarity": features.rarity_,
        "rarity_scale": np.array([features.rarity_scale_]),
        "stats_mean": features.mean_,
        "stats_std": features.std_,
        "stats_weight": coefs[:, : len(STATS)] * STATS_WEIGHT,
        "bias": intercepts,
    }
    return StaticFit(tensors, infos, features.limits_, out)


def static_rows(fit: StaticFit, table: Table, seed: int = 0) -> list[Row]:
    """What the out-of-fold values are worth, beside the baselines."""
    out = fit.out_of_fold
    return [
        *table_rows(table, {"probe": out}, seed),
        *kind_rows(table.names, table.kinds, table.labels, dict(enumerate(out.T))),
    ]


def write_static(fit: StaticFit, table: Table, folder: Path, name: str, rows: Sequence[Row] = ()) -> str:
    """Write the artifact, certified out of fold, the manifest last; its version. The same fit gives the same bytes."""
    data: bytes = save({name: np.ascontiguousarray(tensor) for name, tensor in sorted(fit.tensors.items())})
    manifest = Manifest(
        tier="static",
        name=name,
        encoder=FEATURES,
        encoder_sha256=FEATURES_SHA256,
        layers=(0,),
        dims=len(STATS) + BUCKETS,
        max_tokens=MAX_CHARS,
        heads=fit.heads,
        data_sha256=table.sha256(),
        n=len(table.prompts),
        created=date.today().isoformat(),
        versions=library_versions("numpy", "safetensors", "scikit-learn", "scipy"),
        metrics={"out_of_fold": [row.to_json() for row in rows]},
        limits=fit.limits,
        prompts_sketch=sketch(table.prompts),
        tensors_sha256=hashlib.sha256(data).hexdigest(),
    )
    manifest = manifest.certified(certificates_of(table, fit.out_of_fold, manifest))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(data)
    write_manifest(manifest, folder)
    return version_of(manifest, data)
