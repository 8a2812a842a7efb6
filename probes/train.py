"""From a table of labelled prompts to a probe artifact with its measured worth."""

import contextlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from probes.artifact import Artifact, calibration_kind, sealed
from probes.calibrate import Array, bands
from probes.certify import ALPHAS, METHODS, issue, to_last
from probes.cluster_table import ClusterTable
from probes.errors import CertificateError, TableError
from probes.evaluate import IntArray, Row, baselines, folds, head_rows, routing_rows
from probes.extract import DEFAULT_SHA256, Encoder, FloatArray
from probes.heads import Heads
from probes.kernel import ProbeClassifier
from probes.kinds import Fits, LinearHeads, fit_dense, kind_rows
from probes.manifest import Certificate, ClustersInfo, ExpertInfo, HeadInfo, Manifest, SimilarityInfo, sketch
from probes.table import Table
from probes.types import Kind, Tier

LIBRARIES = ("numpy", "safetensors", "scikit-learn", "torch", "transformers")
DEFAULT_LAYERS = (0, 1, 2)
"""What a probe reads of the default encoder: the four layers above are two thirds of its time and add less than can be
told from noise (docs/experiments.md)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How features become heads. `layers` index hidden states (0: embeddings); None: DEFAULT_LAYERS of the default
    encoder, all of any other."""

    layers: tuple[int, ...] | None = None
    max_tokens: int = 256
    components: int = 96
    landmarks: int = 1000
    linear: bool = False
    """Heads linear in the features, without landmarks: few numbers, for features that are few or already linear."""
    clusters: int = 0
    """At most so many clusters, whose rates are the heads: for many models and few labels. 0: none, a regression."""
    recognise: bool = False
    """Start from the means of the table's groups, which are recognised from the prompt (`groups.py`): pays where groups
    are tasks of their own, costs where prompts of other groups will come."""
    seed: int = 0

    def layers_of(self, encoder: "Reader") -> tuple[int, ...]:
        if self.layers:
            return self.layers
        return DEFAULT_LAYERS if encoder.sha256 == DEFAULT_SHA256 else tuple(range(encoder.layers))

    def groups_of(self, table: "Table", rows: IntArray) -> npt.NDArray[np.object_] | None:
        """Those that are recognised, of these rows. Raises TableError where there are none."""
        if not self.recognise:
            return None
        if self.clusters or self.linear:
            raise TableError("--recognise: only a probe of landmarks recognises groups; leave it out")
        if table.groups is None:
            raise TableError("--recognise: no groups; name their column with --group-column")
        return table.groups[rows]

    def estimator(self) -> Fits:
        if self.linear:
            return LinearHeads(seed=self.seed)
        return ProbeClassifier(components=self.components, landmarks=self.landmarks, seed=self.seed)


def head_info(
    table: Table,
    at: int,
    *,
    calibration: Literal["platt", "isotonic", "rate"] = "platt",
    undecided: tuple[float, float] | None = None,
    spread: tuple[float, float] | None = None,
    out_of_fold: Array,
) -> HeadInfo:
    """What the manifest says of the head in column `at`, whose probabilities [n] are `out_of_fold`."""
    kind, labels = table.kinds[at], table.labels[:, at]
    known = labels[~np.isnan(labels)]
    others: Mapping[Kind, Literal["exp", "softmax"]] = {"out_tokens": "exp", "domain": "softmax"}
    return HeadInfo(
        name=table.names[at],
        label=table.sources[at],
        n=len(known),
        base_rate=float(known.mean()),
        calibration=calibration if calibration == "rate" else others.get(kind, calibration),
        kind=kind,
        undecided=undecided if kind == "correct" else None,
        spread=spread,
        bands=bands(out_of_fold, labels) if kind == "correct" else (),
    )


def undecided(probabilities: Array, answers: float) -> tuple[float, float] | None:
    """The band around the base rate outside of which this share of the probabilities lies; None for a share of 1."""
    if answers >= 1:
        return None
    known = probabilities[~np.isnan(probabilities)]
    middle = float(known.mean())
    reach = float(np.quantile(np.abs(known - middle), 1 - answers))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def similarity_info(heads: Heads | ClusterTable) -> SimilarityInfo | None:
    if isinstance(heads, ClusterTable) or (kernel := heads.similarity) is None:
        return None
    landmarks, components = kernel.landmarks.shape
    return SimilarityInfo(components=components, landmarks=landmarks, gamma=kernel.gamma)


def experts_info(heads: Heads | ClusterTable) -> tuple[ExpertInfo, ...]:
    if isinstance(heads, ClusterTable) or heads.experts is None:
        return ()
    return tuple(
        ExpertInfo(kind=kind)
        if own is None
        else ExpertInfo(kind=kind, heads=own.names, similarity=similarity_info(own))
        for kind, own in zip(heads.experts.kinds, heads.experts.own, strict=True)
    )


def clusters_info(heads: Heads | ClusterTable) -> ClustersInfo | None:
    if isinstance(heads, Heads):
        return None
    return ClustersInfo(count=len(heads.centres), nearest=heads.nearest, beta=heads.beta)


def library_versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


class Reader(Protocol):
    """What the features are read with, as the artifact names it."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def dims(self) -> int: ...

    @property
    def layers(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Fitted:
    """A probe and its out-of-fold worth."""

    artifact: Artifact
    rows: list[Row]
    probabilities: Array
    """[n, heads], out of fold"""


def fit_probe(
    table: Table,
    encoder: Reader,
    recipe: Recipe | None = None,
    *,
    name: str = "probe",
    features: FloatArray | None = None,
    tier: Tier = "encoder",
    question: str = "",
    over: Literal["last", "prompt"] = "last",
    answers: float = 0.5,
    progress: bool = False,
) -> Fitted:
    """Fit on all rows; measure out of fold (5 folds), and with whole groups held out where the table has groups.

    `features` may be given by a caller that kept them; they must be `layer_features` of this table and recipe. In the
    tiers `prefill` and `self` they are what `encoder` was heard to read. `answers`: see `undecided`.
    """
    recipe = recipe or Recipe()
    layers = recipe.layers_of(encoder)
    if features is None:
        assert isinstance(encoder, Encoder), "features of other tiers are given"
        features = layer_features(encoder, table.prompts, layers, recipe.max_tokens, progress)
    probabilities = _out_of_fold(table, features, recipe, folds(len(table.prompts), recipe.seed), progress)
    rows = measure(table, features, recipe, probabilities, progress)
    heads, spreads = _fit_heads(table, features, recipe, np.arange(len(table.prompts)))
    infos = [
        head_info(
            table,
            at,
            calibration="rate" if isinstance(heads, ClusterTable) else calibration_kind(heads.calibrators[at]),
            undecided=undecided(probabilities[:, at], answers),
            spread=spreads.get(at),
            out_of_fold=probabilities[:, at],
        )
        for at in range(len(table.names))
    ]
    manifest = Manifest(
        tier=tier,
        question=question,
        over=over,
        name=name,
        encoder=encoder.name,
        encoder_sha256=encoder.sha256,
        layers=layers,
        dims=encoder.dims,
        max_tokens=recipe.max_tokens,
        similarity=similarity_info(heads),
        clusters=clusters_info(heads),
        heads=tuple(infos),
        groups=heads.groups.names if isinstance(heads, Heads) and heads.groups is not None else (),
        experts=experts_info(heads),
        data_sha256=table.sha256(),
        prompts_sketch=sketch(table.prompts),
        n=len(table.prompts),
        created=date.today().isoformat(),
        versions=library_versions(*LIBRARIES),
        metrics={"out_of_fold": [row.to_json() for row in rows]},
    )
    artifact = sealed(Artifact(manifest, heads))
    certified = artifact.manifest.certified(certificates_of(table, probabilities, artifact.manifest))
    return Fitted(replace(artifact, manifest=certified), rows, probabilities)


def _fit_heads(
    table: Table, features: FloatArray, recipe: Recipe, rows: IntArray
) -> tuple[Heads | ClusterTable, dict[int, tuple[float, float] | None]]:
    """The heads by these rows of the table, and the spreads of those for tokens."""
    labels, groups = table.labels[rows], recipe.groups_of(table, rows)
    experts = None if table.experts is None else table.experts[rows]
    if recipe.clusters:
        from probes.clusters import fit_cluster_table

        return fit_cluster_table(features[rows], labels, table.kinds, table.names, recipe.clusters, recipe.seed)
    return fit_dense(features[rows], labels, table.kinds, table.names, recipe.estimator(), recipe.seed, groups, experts)


def certificates_of(table: Table, probabilities: Array, manifest: Manifest) -> list[Certificate]:
    """Certificates by out-of-fold probabilities for routing between `weak` and `strong` at the usual alphas, as far as
    the rows prove them."""
    if not {"weak", "strong"} <= set(table.names):
        return []
    columns = [table.names.index("weak"), table.names.index("strong")]
    known = np.flatnonzero(~np.isnan(table.labels[:, columns]).any(1))
    found: list[Certificate] = []
    for alpha, method in ((alpha, method) for alpha in ALPHAS for method in METHODS):
        with contextlib.suppress(CertificateError):
            found.append(
                issue(
                    probabilities[known][:, columns], table.labels[known][:, columns], ("weak", "strong"),
                    alpha=alpha, method=method, rows="out_of_fold", data_sha256=manifest.data_sha256, manifest=manifest,
                )
            )  # fmt: skip
    return found


def layer_features(
    encoder: Encoder, prompts: Sequence[str], layers: Sequence[int], max_tokens: int, progress: bool = False
) -> FloatArray:
    """[n, len(layers) * dims], the chosen layers side by side, as the artifact's weights expect them."""
    hidden = encoder.features(prompts, layers=layers, max_tokens=max_tokens, progress=progress)
    return hidden.reshape(len(prompts), -1)


def measure(
    table: Table, features: FloatArray, recipe: Recipe, probabilities: Array, progress: bool = False
) -> list[Row]:
    """Rows of out-of-fold `probabilities`: every head, routing between `weak` and `strong` if the table has both; and
    with whole groups held out."""
    rows = table_rows(table, {"probe": probabilities}, recipe.seed)
    rows += kind_rows(table.names, table.kinds, table.labels, dict(enumerate(probabilities.T)))
    if table.groups is not None:
        apart = folds(len(table.prompts), recipe.seed, table.groups)
        held_out = {"probe": _out_of_fold(table, features, recipe, apart, progress)}
        rows += [
            Row(f"{row.name}, groups held out", row.metric, row.value, row.low, row.high, row.unit)
            for row in table_rows(table, held_out, recipe.seed, baseline=False)
            if row.metric in ("APGR", "CPT50", "CPT80", "ECE", "Brier", "AUC")
        ]
    return rows


def _out_of_fold(
    table: Table, features: FloatArray, recipe: Recipe, splits: Sequence[tuple[Any, Any]], progress: bool
) -> Array:
    """Calibrated probabilities [n, heads]; no row's scaling, fit or calibration has seen it."""
    from tqdm import tqdm

    out = np.full(table.labels.shape, np.nan)
    for train, test in tqdm(splits, desc="folds", disable=not progress):
        heads, _ = _fit_heads(table, features, recipe, train)
        out[test] = heads.predict_proba(features[test])
    return out


def table_rows(table: Table, probes: Mapping[str, Array], seed: int = 0, *, baseline: bool = True) -> list[Row]:
    """Rows for probabilities [n, heads] of each named probe on this table, beside the baselines."""
    rows: list[Row] = []
    for name, probabilities in probes.items():
        for i, head in enumerate(table.names):
            if table.kinds[i] in ("correct", "needs_reasoning"):
                rows += head_rows(f"{name}: {head}", probabilities[:, i], table.labels[:, i], seed=seed)
    found = routing_scores(table, probes, seed, baseline=baseline)
    if found is None:
        return rows
    routers, both = found
    weak, strong = table.column("weak")[both], table.column("strong")[both]
    reference = next(iter(routers)) if baseline else None
    return rows + routing_rows(routers, weak, strong, reference=reference, seed=seed)


def routing_scores(
    table: Table, probes: Mapping[str, Array], seed: int = 0, *, baseline: bool = True
) -> tuple[dict[str, Array], IntArray] | None:
    """Scores for the strong model of each probe, then of the baselines, on the rows that have both labels, and these
    rows; None where there are none. What a probe abstains from goes to the strong model first."""
    if not {"weak", "strong"} <= set(table.names):
        return None
    weak, strong = table.column("weak"), table.column("strong")
    both = np.flatnonzero(~np.isnan(weak + strong))
    if not len(both):
        return None
    w, s = table.names.index("weak"), table.names.index("strong")
    pairs = {name: to_last(p[both][:, [w, s]]) for name, p in probes.items()}
    routers = {name: pair[:, 1] - pair[:, 0] for name, pair in pairs.items()}
    if baseline:
        prompts = [table.prompts[i] for i in both]
        groups = None if table.groups is None else table.groups[both]
        routers |= baselines(prompts, weak[both], strong[both], folds(len(both), seed), groups=groups, seed=seed)
    return routers, both


def score(table: Table, artifact: Artifact, encoder: Encoder, progress: bool = False) -> Array:
    """Probabilities [n, heads of the table] of a fitted artifact; a head that it lacks is an error."""
    artifact.require_encoder(encoder.name, encoder.sha256)
    manifest = artifact.manifest
    require_heads(table, artifact.version, artifact.heads.names)
    features = layer_features(encoder, table.prompts, manifest.layers, manifest.max_tokens, progress)
    return score_features(table, artifact, features)


def require_heads(table: Table, version: str, heads: Sequence[str]) -> None:
    """TableError where an artifact of these heads lacks one that the table asks for."""
    lacking = [name for name in table.names if name not in heads]
    if lacking:
        raise TableError(f"--head {lacking[0]}: artifact {version} has no such head; it has {', '.join(heads)}")


def score_features(table: Table, artifact: Artifact, features: FloatArray) -> Array:
    """The same of features [n, …] that were read before, as the artifact's tier reads them."""
    require_heads(table, artifact.version, artifact.heads.names)
    columns = [artifact.heads.names.index(name) for name in table.names]
    return np.asarray(artifact.heads.predict_proba(features)[:, columns])
