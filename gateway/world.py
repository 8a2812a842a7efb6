"""What one policy makes of the world: targets, upstreams and keys, built whole and swapped whole."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from gateway import tiers
from gateway.loads import Loads
from gateway.policies import local_models, missing_secrets, with_windows
from gateway.upstream.breaker import Breaker
from gateway.upstream.fleet import Fleet
from gateway.upstream.http import HttpClient
from gateway.upstream.local import EngineLink, LocalUpstream
from gateway.upstream.openai import OpenAIUpstream
from gateway.upstream.types import Planned, Target, Upstream
from local_engine.plan_types import Plan
from routers.cost import ASSUMED_CONTEXT, ASSUMED_MAX_OUTPUT_TOKENS, over_calls
from routers.plans import models_of
from routers.policy import EnginePlan, Policy, Price


class MissingSecret(ValueError):
    """A policy names an environment variable that is not set."""


class World:
    def __init__(
        self,
        policy: Policy,
        targets: Mapping[str, Target],
        upstreams: Mapping[str, Upstream],
        probes: tiers.Tiers,
        engine: EngineLink,
    ) -> None:
        self.policy = policy
        self.engine = engine
        """What its local models and its probes run on."""
        self.under_way = 0
        """Requests and shadows that were admitted in it and have not ended."""
        self.probes = probes
        self.targets = targets
        """By the policy's name of the model."""
        self.upstreams = upstreams
        """By provider."""
        self.breakers = {name: Breaker(policy.providers[target.provider].breaker) for name, target in targets.items()}
        """By the policy's name of the model."""
        self.loads = Loads({name: model.slots for name, model in policy.models.items()}) if policy.timed else None
        """None: no route decides by time."""
        self.explores = any(route.explore is not None for route in policy.routes)
        engines = {name for name, provider in policy.providers.items() if provider.engine is not None}
        self.local_models: dict[str, list[str]] = {}
        """The engine's name of a model → the policy's; several, where it has several plans."""
        for target in targets.values():
            if target.provider in engines and not policy.models[target.model].embeds:
                self.local_models.setdefault(target.wire_model, []).append(target.model)
        self._encoders = [t.model for t in targets.values() if t.provider in engines and policy.models[t.model].embeds]
        """By the policy's names. The engine does not list its encoder among its models: while it is up, it has it."""
        self._dearest: dict[tuple[str, ...], Price | None] = {}
        """By the candidates of a route, or those that its caller's model leaves: as many as the policy can offer."""

    def unavailable(self) -> dict[str, str]:
        """Models that cannot serve now, with the reason."""
        found = {
            name: reason
            for name, breaker in self.breakers.items()
            if not breaker.closed and (reason := breaker.reason()) is not None
        }
        for names in self.local_models.values():
            target = self.targets[names[0]]
            reason = self.upstreams[target.provider].unavailable(target)
            if reason is not None:
                found.update(dict.fromkeys(names, reason))
        if self.engine.client is None:
            found.update(dict.fromkeys(self._encoders, "the engine process is not up"))
        return found

    async def close(self) -> None:
        """End what its upstreams do beside calls."""
        for upstream in self.upstreams.values():
            if isinstance(upstream, Fleet):
                await upstream.close()

    def dearest(self, models: tuple[str, ...]) -> Price | None:
        """The price that repricing compares with: of `models` (or plans of several), the dearest by output token. None:
        all are unpriced."""
        if models not in self._dearest:
            prices = [price for name in models_of(models) if (price := self.targets[name].price) is not None]
            self._dearest[models] = max(prices, key=lambda price: (price.output, price.input), default=None)
        return self._dearest[models]


def build_world(
    policy: Policy,
    client: HttpClient,
    engine: EngineLink,
    salt: bytes,
    env: Mapping[str, str] | None = None,
    *,
    before: World | None = None,
    folder: Path | None = None,
) -> World:
    """`salt` is the secret that tenants' cache salts at engines are made with. `before`: the world whose place this one
    takes; what is known of providers and models that stay as they were is kept. `folder`: the policy file's, to which
    its paths are relative. Raises MissingSecret, and ArtifactError."""
    env = os.environ if env is None else env
    missing = missing_secrets(policy, env)
    if missing:
        raise MissingSecret("; ".join(missing))
    upstreams: dict[str, Upstream] = {}
    for provider in policy.providers.values():
        same = before is not None and before.policy.providers.get(provider.name) == provider
        if before is not None and same and (provider.base_url is not None or before.engine is engine):
            upstreams[provider.name] = before.upstreams[provider.name]
        elif provider.base_url is None:
            upstreams[provider.name] = LocalUpstream(engine)
        else:
            key = env[provider.api_key_env] if provider.api_key_env is not None else None
            urls = (provider.base_url, *provider.replicas)
            upstreams[provider.name] = (
                OpenAIUpstream(client, provider.name, provider.base_url, key)
                if provider.server == "openai" and len(urls) == 1
                else Fleet(client, provider.name, provider.server, urls, key, salt, provider.priority_scheduling)
            )
    place = folder or Path.cwd()
    policy = with_windows(policy, place)
    targets = {}
    for model in policy.models.values():
        provider = policy.providers[model.provider]
        context = model.context or ASSUMED_CONTEXT
        targets[model.name] = Target(
            model=model.name,
            provider=model.provider,
            wire_model=model.upstream,
            price=model.price,
            context=context,
            max_output=model.max_output or min(context, ASSUMED_MAX_OUTPUT_TOKENS),
            timeout_s=provider.timeout_ms / 1000,
            retries=provider.retries,
            connect_timeout_s=provider.connect_timeout_ms / 1000,
            first_byte_timeout_s=(provider.first_byte_timeout_ms or provider.timeout_ms) / 1000,
            idle_timeout_s=(provider.idle_timeout_ms or provider.timeout_ms) / 1000,
            prefix=model.prefix,
        )
    for model in policy.models.values():
        if model.plans:
            planned = {effort: _planned(plan, targets) for effort, plan in model.plans}
            apart = {effort for effort, plan in model.plans if over_calls(policy, model, plan)}
            plans = {effort: plan for effort, plan in planned.items() if effort not in apart}
            steps = {effort: plan for effort, plan in planned.items() if effort in apart}
            targets[model.name] = replace(targets[model.name], plans=plans, steps=steps)
    world = World(policy, targets, upstreams, tiers.load(policy, place, local_models(policy, place)), engine)
    if before is not None:
        for name, target in targets.items():
            same_place = upstreams[target.provider] is before.upstreams.get(target.provider)
            if same_place and name in before.targets and before.targets[name].wire_model == target.wire_model:
                world.breakers[name] = before.breakers[name]
                if world.loads is not None and before.loads is not None:
                    world.loads.keep(name, before.loads)
    return world


def _planned(plan: EnginePlan, targets: Mapping[str, Target]) -> Planned:
    draft = targets[plan.draft] if plan.draft is not None else None
    return Planned(engine_plan(plan, draft.wire_model if draft is not None else None), draft)


def engine_plan(plan: EnginePlan, draft: str | None) -> Plan:
    """As the engine is told it; `draft` by its name there."""
    named = {} if draft is None else {"draft": draft}
    nested = {"exit": {"type": "exit", **exit_plan}} if isinstance(exit_plan := plan.stated.get("exit"), dict) else {}
    stated = {"type": plan.kind, **named, **plan.stated, **nested}
    found: Plan = msgspec.convert(stated, Plan)
    return found
