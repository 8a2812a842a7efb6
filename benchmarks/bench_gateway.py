"""The gateway's speed, beside nginx, a bare aiohttp proxy and LiteLLM, in one run.

    python benchmarks/bench_gateway.py [--rounds 3] [--seconds 5] [--only streams,leadline] [--quick]

    requests      whole answers: requests/s of one core, CPU, added latency, memory, nothing lost at 256 connections
    streams       paced streams: streams/s of one core, added time to first byte
    conversation  how long a 148 KB request holds the event loop up
    start         from `serve` to readiness
    workers       two workers on two cores over one, with Redis and PostgreSQL

Rounds are interleaved: each section asks each contender once, then the next round starts. Everything that a Leadline
request does is on the path: key, budget, rate, exact cache (missed, then filled), policy, decision, journal, SQL
ledger, metrics, breakers, deadlines. Medians over rounds, with the lowest and highest.
"""

import argparse
import tempfile
from pathlib import Path

import conversation_bench
import requests_bench
import start_bench
import streams_bench
import workers_bench
from contenders import CONTENDERS, available, canned_upstream, litellm_version
from measured import Measured
from results_file import write

SECTIONS = ("requests", "streams", "conversation", "start", "workers")
STREAMERS = ("nginx", "aiohttp-proxy", "litellm", "leadline")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--only", default="", help="sections and contenders, separated by commas; prints only")
    parser.add_argument("--quick", action="store_true", help="one round of a second each; prints only")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rounds, seconds = (1, 1.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    only = set(filter(None, arguments.only.split(",")))
    unknown = only - {*SECTIONS, *(contender.name for contender in CONTENDERS)}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: neither a section nor a contender")
    sections = [section for section in SECTIONS if section in only] or list(SECTIONS)
    named = only - set(SECTIONS)
    contenders = [c for c in CONTENDERS if (not named or c.name in named) and available(c)]
    streamers = [contender for contender in contenders if contender.name in STREAMERS]
    into = Measured()
    direct, direct_first = {"p50_us": 0, "p99_us": 0}, 0.0
    for number in range(rounds):
        seed = (number + 1) * 1000
        print(f"round {number + 1}", flush=True)
        if "requests" in sections:
            with tempfile.TemporaryDirectory(prefix="leadline-bench-") as folder, canned_upstream(Path(folder)):
                direct = requests_bench.direct_us(seconds)
                for contender in contenders:
                    requests_bench.measure(contender, seconds, seed, direct, into)
            into.add_ratios("requests_per_s_c64", requests_bench.RIVALS)
        if "streams" in sections or "conversation" in sections:
            with streams_bench.paced_upstream() as upstream:
                if "streams" in sections:
                    direct_first = streams_bench.direct_first_us(seconds)
                    for contender in streamers:
                        streams_bench.measure(contender, seconds, seed, upstream, direct_first, into)
                    into.add_ratios("streams_per_s", requests_bench.RIVALS)
                if "conversation" in sections:
                    conversation_bench.measure(seconds, into)
        if "start" in sections:
            start_bench.measure(into)
        if "workers" in sections:
            workers_bench.measure(seconds, seed, into)
    rows = into.rows()
    requests_bench.tables(rows, direct)
    streams_bench.tables(rows, direct_first)
    conversation_bench.tables(rows)
    start_bench.tables(rows)
    workers_bench.tables(rows)
    if not (arguments.no_write or arguments.quick or only):
        packages = ("leadline", "uvicorn", "uvloop", "aiohttp", "httptools", "msgspec", "sqlalchemy", "fastapi")
        print(write("gateway", "make bench-gateway", packages, rows, litellm=litellm_version()))


if __name__ == "__main__":
    main()
