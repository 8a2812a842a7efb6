"""A policy as this installation can run it: loaded, and held against what is on this machine. Light: no torch, no HTTP.

Relative paths in a policy (`probe: ./mine`, `model: ./checkpoint`) are relative to the policy file.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from msgspec import convert

from gateway import tiers
from gateway.engine_needs import EngineNeeds
from gateway.guarantees import with_certificates
from gateway.ledger import prices
from local_engine.config import locate, read_speculation
from local_engine.errors import ModelLoadError
from local_engine.plan_types import Exit
from probes.accept_rule import read_rule
from probes.errors import ArtifactError
from routers.errors import PolicyError
from routers.load import load, parse, preset
from routers.plans import EFFORTS
from routers.policy import Model, Policy
from routers.yaml import read, written


class CannotServe(RuntimeError):
    """Nothing was started; the message says why and what to do."""


def load_policy(path: Path | None, env: Mapping[str, str] | None = None) -> Policy:
    """The policy in `path`, else the embedded default; with OPENAI_API_KEY set, the default that knows OpenAI too.

    Prices that it leaves out come from the price list in force. Raises PolicyError with all problems of the policy, or
    of the operator's price list, and OSError when the file cannot be read.
    """
    env = os.environ if env is None else env
    lookup = prices.price_list(env).lookup
    if path is not None:
        return load(path, prices=lookup, rules=partial(accept_numbers, path.parent))
    name: Literal["openai", "default"] = "openai" if env.get("OPENAI_API_KEY") else "default"
    return parse(preset(name), file=f"the embedded policy {name!r}", prices=lookup)


def accept_numbers(folder: Path, name: str) -> dict[str, float]:
    """Of the accept rule in that file, relative to the policy's folder. Raises ValueError."""
    try:
        return read_rule(folder / Path(name).expanduser()).numbers()
    except ArtifactError as error:
        raise ValueError(str(error)) from None


def checked_policy(file: Path | None, *, secrets: bool = True) -> tuple[Policy, Path]:
    """The policy and the folder that its relative paths are relative to. Raises CannotServe.

    `secrets`: whether the providers' keys have to be in the environment.
    """
    try:
        policy = load_policy(file)
    except PolicyError as error:
        raise CannotServe(str(error)) from error
    except OSError as error:
        raise CannotServe(f"{file}: cannot be read ({error.strerror})") from error
    folder = file.parent.absolute() if file is not None else Path.cwd()
    wrong = (missing_secrets(policy) if secrets else []) + unloadable(policy, folder)
    policy, unproven = with_certificates(with_windows(policy, folder), folder)
    wrong += unproven
    if wrong:
        raise CannotServe("\n".join(located(wrong, file)))
    return policy, folder


def located(sentences: Sequence[str], file: Path | None) -> list[str]:
    """Sentences that begin with a field of the policy, each after `FILE:LINE: `; as they are without a file."""
    if file is None or not sentences:
        return [*sentences]
    lines = {written(path): line for path, line in read(file.read_text(encoding="utf-8"), str(file)).lines.items()}
    return [f"{file}:{_line(lines, sentence.partition(': ')[0])}: {sentence}" for sentence in sentences]


def _line(lines: Mapping[str, int], field: str) -> int:
    """Of a field, or of the nearest one around it that is written."""
    while field and field not in lines:
        field = field.rpartition("." if field.rfind(".") > field.rfind("[") else "[")[0]
    return lines.get(field, 1)


def missing_secrets(policy: Policy, env: Mapping[str, str] | None = None) -> list[str]:
    """A sentence for each provider whose key is not in the environment."""
    env = os.environ if env is None else env
    return [
        f"providers.{provider.name}.api_key: the environment variable {provider.api_key_env} is not set; set it, or "
        "remove the provider from the policy"
        for provider in policy.providers.values()
        if provider.api_key_env is not None and not env.get(provider.api_key_env)
    ]


def probe_folder(policy: Policy, folder: Path) -> Path | None:
    """Where the artifact of the encoder's tier lies; None when the policy has none. `folder` holds the policy file."""
    return tiers.artifact(policy, folder, "encoder")


def encoder(policy: Policy, folder: Path) -> str:
    """The engine's one encoder, the probe's where there is a probe: `default`, a folder, or a hub id."""
    embedders = _embedding(policy)
    own = embedders[0].upstream if embedders else "default"
    source = policy.difficulty.encoder if policy.difficulty is not None else own
    return _placed(source, folder)


def local_models(policy: Policy, folder: Path) -> dict[str, str]:
    """The models that the engine process has to load: the engine's name → a folder, a hub id or `bundled/<name>`."""
    return {name: _placed(name, folder) for name in local_names(policy).values()}


def local_names(policy: Policy) -> dict[str, str]:
    """Those models by the policy's names → the engine's, which is what the policy writes as `model`."""
    return {model.name: model.upstream for model in _answering(policy)}


def engine_needs(policy: Policy, folder: Path, *, exit_with_parent: bool = True) -> EngineNeeds | None:
    """What the policy's engine process has to be told; None when the policy needs no engine."""
    models = local_models(policy, folder)
    embeds = bool(_embedding(policy))
    probe = probe_folder(policy, folder)
    if not models and probe is None and not embeds:
        return None
    return EngineNeeds(
        models=models,
        speculation=_speculation(policy, folder),
        probe=str(probe) if probe is not None else None,
        encoder=encoder(policy, folder),
        embeds=embeds,
        readers=tiers.readers(policy, folder, models),
        exit_with_parent=exit_with_parent,
    )


def _speculation(policy: Policy, folder: Path) -> dict[str, str]:
    """How the engine's models draft; paths of drafting models made absolute."""
    completing = [model for model in policy.models.values() if not model.embeds]
    said = {model.upstream: model.speculation for model in completing if model.speculation is not None}
    return {name: "+".join(_drafting(part, folder) for part in how.split("+")) for name, how in said.items()}


def _drafting(part: str, folder: Path) -> str:
    return f"draft:{_placed(part.removeprefix('draft:'), folder)}" if part.startswith("draft:") else part


def _placed(source: str, folder: Path) -> str:
    """A path as the policy writes it, made absolute; anything else as it is."""
    return str(folder / Path(source).expanduser()) if source.startswith((".", "~", os.sep)) else source


def unloadable(policy: Policy, folder: Path) -> list[str]:
    """A sentence for each probe, head, encoder and local model that the policy names and that is not there."""
    models = local_models(policy, folder)
    found = tiers.problems(policy, folder, models) + _without_encoder(policy, folder)
    fields = {model.upstream: f"models.{model.name}" for model in _answering(policy)}
    missing = [f"{fields[name]}.model: {why}" for name, why in unloadable_models(models).items()]
    found += missing + _too_long(policy, models) + _toolless(policy, models)
    return found + _undraftable(policy, _speculation(policy, folder), models, fields) + _unfitted(policy, models)


def _answering(policy: Policy) -> list[Model]:
    """The local models, without those that embed."""
    return [model for model in _local(policy) if not model.embeds]


def _embedding(policy: Policy) -> list[Model]:
    """The other local models: names of the engine's one encoder."""
    return [model for model in _local(policy) if model.embeds]


def _local(policy: Policy) -> list[Model]:
    return [model for model in policy.models.values() if policy.providers[model.provider].engine is not None]


def _without_encoder(policy: Policy, folder: Path) -> list[str]:
    """A sentence for each field that names an encoder which is not there."""
    sources = {f"models.{model.name}.model": model.upstream for model in _embedding(policy)}
    if policy.difficulty is not None:
        sources["signals.difficulty.encoder"] = policy.difficulty.encoder
    found = []
    for field, source in sources.items():
        try:
            find_encoder(source if source == "default" else _placed(source, folder))
        except ModelLoadError as error:
            found.append(f"{field}: {error}")
    return found


def _too_long(policy: Policy, sources: Mapping[str, str]) -> list[str]:
    """A sentence for each local model whose `context` is more than it has: the engine takes no longer prompt."""
    found = []
    for model in _answering(policy):
        if model.context is None:
            continue
        window = _stated(sources[model.upstream], "max_position_embeddings")
        if window is not None and model.context > window:
            told = f"{model.context} is more than the {window} tokens that the model has room for"
            found.append(f"models.{model.name}.context: {told}; write at most that, or leave it out")
    return found


def _toolless(policy: Policy, sources: Mapping[str, str]) -> list[str]:
    """A sentence for each local model with `tools: true` whose chat template knows none: each call would be refused."""
    return [
        f"models.{model.name}.tools: the model's chat template knows no tools; leave it out"
        for model in _answering(policy)
        if model.tools and (template := _chat_template(sources[model.upstream])) is not None and "tools" not in template
    ]


def _chat_template(source: str) -> str | None:
    """As a model's files say it, all of them where there are several; None where they are not here."""
    try:
        path, here = locate(source)
        if not here:
            return None
        folder = Path(path)
        files = *folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")
        own = [file.read_text() for file in files]
        told = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template", "")
    except (ModelLoadError, OSError, ValueError, AttributeError):
        return None
    return "\n".join([*own, json.dumps(told)])


def unloadable_models(sources: Mapping[str, str]) -> dict[str, str]:
    """Of each of these that is not there, or cannot be a checkpoint by its files' names, why."""
    found = {}
    for name, source in sources.items():
        try:
            _find(source)
        except ModelLoadError as error:
            found[name] = str(error)
    return found


def find_encoder(source: str) -> None:
    """Look for an encoder: `default`, a folder, or a hub id. Raises ModelLoadError where it cannot be one."""
    if source.startswith("bundled/"):
        fix = "write default, a folder, or a hub id"
        raise ModelLoadError(f"{source!r} answers conversations and is no encoder; {fix}")
    if source != "default":
        _find(source, "model.safetensors")


def _find(source: str, weights: str = "*.safetensors") -> bool:
    """Whether a source is a folder here, which has a checkpoint's files by their names. Raises ModelLoadError."""
    path, here = locate(source)
    lacking = [name for name in ("config.json", weights) if here and not any(Path(path).glob(name))]
    if lacking:
        fix = "name the folder of a checkpoint, with its config.json and its weights in safetensors"
        raise ModelLoadError(f"the folder {path!r} has no {' and no '.join(lacking)}; {fix}")
    return here


def _undraftable(
    policy: Policy, speculation: Mapping[str, str], models: Mapping[str, str], fields: Mapping[str, str]
) -> list[str]:
    """A sentence for each drafting model, or layer to draft at, that is not there."""
    found = []
    for name, how in speculation.items():
        field = f"{fields[name]}.speculation"
        try:
            wanted = read_speculation(how)
            if wanted.draft is not None and not _find(wanted.draft) and "/" not in wanted.draft:
                raise ModelLoadError(_unknown(wanted.draft, [m.name for m in _answering(policy) if m.upstream != name]))
            layers = _stated(models[name], "num_hidden_layers") if wanted.exit_layer is not None else None
        except (ModelLoadError, ValueError) as error:
            found.append(f"{field}: {error}")
            continue
        if wanted.exit_layer is not None and layers is not None and wanted.exit_layer >= layers:
            found.append(
                f"{field}: exit:{wanted.exit_layer} must name a layer from 1 to {layers - 1}: the model has {layers}"
            )
    return found


def _unknown(draft: str, names: Sequence[str]) -> str:
    """What is wrong with a word that is no drafting model's; `names`: the policy's local models that could draft."""
    meant = get_close_matches(draft, names, n=1)
    if not meant and not unloadable_models({draft: f"bundled/{draft}"}):
        meant = [f"bundled/{draft}"]
    fix = f"did you mean `{meant[0]}`?" if meant else "write the name of one, bundled/…, a folder, or a hub id"
    return f"{draft!r} is no local model of this policy, nor a folder; {fix}"


def _unfitted(policy: Policy, models: Mapping[str, str]) -> list[str]:
    """A sentence for each exit rule that the files of its model hold no fit for, which would refuse each request."""
    found: dict[str, None] = {}
    for model in policy.models.values():
        everywhere = len({plan for _, plan in model.plans}) == 1 and len(model.plans) == len(EFFORTS)
        for effort, plan in model.plans:
            leave = plan.stated if plan.kind == "exit" else plan.stated.get("exit")  # a vote's samples may be left, too
            home = policy.providers[model.provider].engine is not None
            if isinstance(leave, dict) and home and (why := _no_exits(leave, models[model.upstream])):
                field = "plan" if everywhere else f"plans.{effort}"
                found[f"models.{model.name}.{field}.{'' if plan.kind == 'exit' else 'vote.'}exit.{why}"] = None
    return list(found)


def _no_exits(stated: Mapping[str, object], source: str) -> str | None:
    """Why a rule as stated cannot run for the model in `source`; None: it can, or its files are not here to tell."""
    from local_engine.reason.artifact import read_manifest

    rule = stated["rule"]
    if rule != "probe" and (rule != "budget" or "budget" in stated):
        return None
    try:
        place, here = locate(source)
        if not here:
            return None
        manifest = read_manifest(Path(place))
    except ModelLoadError as error:
        return f"rule: {error}"
    if manifest is None:
        other = "write the `budget`" if rule == "budget" else "take a rule that is not fitted, such as convergence"
        return f"rule: `{rule}` is fitted on a model, and {source} has no fit: run `leadline exits fit`, or {other}"
    if rule == "probe":
        asked = convert(stated, Exit)
        try:
            manifest.threshold(asked.delta, asked.form, asked.loss)
        except ValueError as error:
            return f"delta: {str(error).removeprefix('plan.')}"
    return None


def with_windows(policy: Policy, folder: Path) -> Policy:
    """The policy with the context window of each local model that it says none of, where the model's files say it.

    Without, the longest that is assumed of any model would be held for each of its calls.
    """
    sources = local_models(policy, folder)
    models = {
        model.name: replace(model, context=window)
        for model in _answering(policy)
        if model.context is None and model.upstream in sources
        and (window := _stated(sources[model.upstream], "max_position_embeddings")) is not None
    }  # fmt: skip
    return replace(policy, models=MappingProxyType({**policy.models, **models})) if models else policy


def _stated(source: str, field: str) -> int | None:
    """A number of a model's configuration; None where its files do not say so, or are not here."""
    try:
        path, here = locate(source)
        config = json.loads((Path(path) / "config.json").read_bytes()) if here else {}
        number = config.get(field)
    except (ModelLoadError, OSError, ValueError, AttributeError):
        return None
    return number if isinstance(number, int) and number > 0 else None
