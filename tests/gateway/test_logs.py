"""What processes write into one log: whole lines."""

import json
import subprocess
import sys
from pathlib import Path

PROCESSES, LINES = 4, 400
PROGRAM = """
import sys
from gateway.telemetry.logs import configure_logs, get_logger

configure_logs(worker=int(sys.argv[1]))
sys.stdin.read()  # all begin at once
for number in range(int(sys.argv[2])):
    get_logger().info("spoken", number=number, text="long " * (3000 * (number % 20 == 0)))
"""


def test_lines_of_processes_that_share_a_log_stay_whole(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as log:
        command = [sys.executable, "-c", PROGRAM]
        speakers = [
            subprocess.Popen([*command, str(worker), str(LINES)], stdin=subprocess.PIPE, stderr=log)
            for worker in range(PROCESSES)
        ]
        for speaker in speakers:
            assert speaker.stdin is not None
            speaker.stdin.close()
        assert [speaker.wait() for speaker in speakers] == [0] * PROCESSES
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted((line["worker"], line["number"]) for line in said) == [
        (worker, number) for worker in range(PROCESSES) for number in range(LINES)
    ]
