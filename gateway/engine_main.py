"""The engine process: `python -m gateway.engine_main NEEDS SOCKET`, NEEDS being an `EngineNeeds` as JSON.

The one place where engine and probe meet: neither package knows the other. The only module of `gateway` that leads to
torch; no worker imports it.
"""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from gateway.engine_needs import EngineNeeds
from gateway.settings import EngineSettings, SettingsError
from gateway.telemetry.logs import configure_logs
from local_engine.config import EngineConfig, configure_process, locate
from local_engine.errors import ConfigError, ModelLoadError
from local_engine.probe_types import Prober, PromptReader
from local_engine.server import run_engine
from probes.errors import ArtifactError, ProbeError

_VARIABLES = {
    "device": "LEADLINE_ENGINE_DEVICE",
    "prefix_disk": "LEADLINE_KV_DISK",
    "prefix_redis": "LEADLINE_KV_REDIS",
    "socket_path": "--socket",
}
"""Where the operator writes a setting of the engine."""


def main(argument: str, socket_path: str, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """`on_ready` is called once the engine answers."""
    configure_logs()
    config: EngineNeeds = json.loads(argument)
    try:
        given = EngineSettings.from_env().given()
    except SettingsError as error:
        sys.exit(f"engine: {error}")
    engine = EngineConfig(
        models=config["models"],
        speculation=config["speculation"],
        socket_path=socket_path,
        exit_with_parent=config["exit_with_parent"],
        **given,
    )
    configure_process(engine.threads)
    from transformers.utils import logging as of_transformers

    of_transformers.disable_default_handler()  # its words are events like all others
    of_transformers.enable_propagation()
    logging.getLogger("huggingface_hub").handlers.clear()
    try:
        prober: Prober | None = None
        if config["probe"] is not None:
            from probes.runtime import EncoderProbe

            prober = EncoderProbe.load(config["probe"], config["encoder"])
        elif config["embeds"]:
            from probes.runtime import TextEncoder

            prober = TextEncoder.load(config["encoder"])
        run_engine(engine, prober, _readers(config), on_ready)
    except ConfigError as error:
        sys.exit(f"engine: {_VARIABLES.get(error.field, error.field)}: {error.why}")
    except (ProbeError, ModelLoadError, ModuleNotFoundError) as error:
        sys.exit(f"engine: {error}")


def _readers(config: EngineNeeds) -> dict[str, list[PromptReader]]:
    """Raises ProbeError where a probe was fitted on other weights than its model has."""
    if not config["readers"]:
        return {}
    from probes.prefill import PromptProbe

    found: dict[str, list[PromptReader]] = {}
    for name, artifacts in config["readers"].items():
        place, here = locate(config["models"][name])
        if not here:
            raise ArtifactError(f"model {name!r} is fetched from a hub; a probe that hears it needs its folder")
        found[name] = [PromptProbe.load(artifact, Path(place)) for artifact in artifacts]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
