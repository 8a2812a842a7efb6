"""What `leadline serve` says once it is up. Light: the parent of several workers says it too."""

import sys
from pathlib import Path


def announce(
    home: Path, url: str, *, first_key: str | None, engine: str, engine_away: bool = False, workers: int = 1
) -> None:
    """Tell the operator where the gateway is, and the SDK on this machine too."""
    state = "listens; its local models answer once its engine is up" if engine_away else "is ready"
    (home / "url").write_text(f"{url}/v1")  # where the SDK looks
    question = '{"model":"auto","messages":[{"role":"user","content":"What is 23 + 48 - 7?"}]}'
    code = f'from gateway.sdk import Leadline; print(Leadline(base_url="{url}/v1").explain("What is 2 + 2?"))'
    key_file = home / "key"
    crew = f"\n  Workers    {workers}; SIGHUP replaces them one by one, SIGTERM drains them" if workers > 1 else ""
    sys.stdout.write(
        f"""
Leadline {state}.
  URL        {url}/v1
  Dashboard  {url}/dashboard
  Key        {first_key or f"made earlier, in {key_file}; another: leadline keys create NAME"}
  Engine     {engine}{crew}

Try next:
  curl -i {url}/v1/chat/completions -H "Authorization: Bearer $(cat {key_file})" -d '{question}'
  {sys.executable} -c '{code}'
  open {url}/dashboard and log in with the key

"""
    )
    sys.stdout.flush()


def url_of(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
