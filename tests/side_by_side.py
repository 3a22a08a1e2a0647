"""Run two commands at once: the output of the first, which mostly waits, is printed when both have ended.

    python tests/side_by_side.py "python -m pytest -m slurm" "make test"

The exit code is that of the command in front, or, where it ended well, that of the one in the background. Ctrl-C and SIGTERM
interrupt both and wait for them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(background: str, front: str) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell's background job, and what it starts, would ignore it
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("w+", prefix="ksweep-background-", suffix=".log") as log:
        # Each in a session of its own: Ctrl-C reaches it once, from here, so that its fixtures take down what they set up.
        behind = subprocess.Popen(shlex.split(background), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        print(f"in the background: {background} (its output until then: {log.name})", flush=True)
        # Of lower priority: what mostly waits has time limits, and needs a core at once when its moment comes.
        ahead = subprocess.Popen(["nice", "-n", "5", *shlex.split(front)], start_new_session=True)
        interrupted = False
        try:
            ahead.wait()
            if behind.poll() is None:
                print(f"after {time.monotonic() - began:.0f} s, waiting for: {background}", flush=True)
            behind.wait()
        except KeyboardInterrupt:
            interrupted = True
            for process in (ahead, behind):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
        codes = [ahead.wait(), behind.wait()]
        print(f"\n$ {background}\n{Path(log.name).read_text(errors='replace')}", flush=True)
    for command, code in zip((front, background), codes, strict=True):
        print(f"exit code {code}: {command}", flush=True)
    return 130 if interrupted else next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
