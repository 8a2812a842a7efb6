"""The guarantees of a policy, each bound to the certificate of the probe that proves it. Light: no torch, no numpy."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from gateway import tiers
from probes.errors import ArtifactError
from probes.manifest import Certificate, Manifest, read_manifest
from routers.aims import Bound, Guarantee
from routers.policy import Policy


def with_certificates(policy: Policy, folder: Path) -> tuple[Policy, list[str]]:
    """The policy with each guarantee bound to the probe's certificate, and a sentence for each that has none."""
    guaranteed = [f"routes[{index}].guarantee" for index, route in enumerate(policy.routes) if route.guarantee]
    if not guaranteed:
        return policy, []
    probes = tiers.places(policy, folder)
    if len(probes) != 1:
        why = f"a certificate speaks for one probe, and signals.difficulty.probe names {len(probes)}; name one"
        return policy, [f"{field}: {why}" for field in guaranteed]
    (artifact,) = probes
    try:
        manifest = read_manifest(artifact)
    except ArtifactError:  # `tiers.problems` says so
        return policy, []
    routes, wrong = [], []
    for index, route in enumerate(policy.routes):
        if route.guarantee is not None:
            names = route.candidates[:1] if route.guarantee.loss == "accepted_wrong" else route.candidates
            certificate = _certificate(manifest, route.guarantee, [route.heads[name] for name in names])
            if certificate is None:
                why = _no_certificate(route.guarantee, [route.heads[name] for name in names], artifact)
                wrong.append(f"routes[{index}].guarantee: {why}")
            else:
                bound = Bound(names, certificate.threshold, str(certificate))
                route = replace(route, guarantee=replace(route.guarantee, bound=bound))
        routes.append(route)
    return replace(policy, routes=tuple(routes)), wrong


def _certificate(manifest: Manifest, guarantee: Guarantee, heads: Sequence[str]) -> Certificate | None:
    method: Literal["ltt"] | None = "ltt" if guarantee.confidence is not None else None
    found = manifest.certificate_for(guarantee.at_most, guarantee.loss, heads, method)
    if found is None or guarantee.confidence is None:
        return found
    delta = 1 if found.delta is None else found.delta
    return found if delta <= 1 - guarantee.confidence + 1e-9 else None


def _no_certificate(guarantee: Guarantee, heads: Sequence[str], artifact: Path) -> str:
    of = " ".join(f"--head {head}=COLUMN" for head in heads)
    sure = "" if guarantee.confidence is None else f" --method ltt --delta {1 - guarantee.confidence:.4g}"
    return (
        f"the probe has no certificate for {guarantee.loss} of {', '.join(heads)} at most {guarantee.at_most:g}"
        + ("" if guarantee.confidence is None else f" with {100 * guarantee.confidence:g}% confidence")
        + f"; make one from labelled rows: leadline probe certify {artifact} TABLE --prompt COLUMN {of} "
        f"--alpha {guarantee.at_most:g}{sure}"
    )
