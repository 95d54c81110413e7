"""`localmix.cli.signals`: where a signal becomes an exception, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.commands import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")

# The main thread takes from a queue that another thread fills, until it is interrupted somewhere there: by a timer,
# which hits it while it runs, and then does what SIGTERM does.
ROUNDS = """
import queue, signal, sys, threading, time
from localmix.cli.signals import raise_on_signals

def fill(items, left):
    for count in range(10**7):
        items.put(count)
        if left:
            return
        if count % 50 == 0:
            time.sleep(0)

stuck = 0
for round in range(int(sys.argv[1])):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    items, left = queue.Queue(), []
    filling = threading.Thread(target=fill, args=(items, left), daemon=True)
    filling.start()
    raise_on_signals()
    try:
        terminate = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGALRM, terminate)
        signal.setitimer(signal.ITIMER_REAL, 0.002 + round % 100 * 1e-5)
        while True:
            items.get(timeout=60)
    except KeyboardInterrupt:
        left.append(True)
    filling.join(10)
    stuck += filling.is_alive()
print(stuck)
"""

WAITING = """
import threading
from localmix.cli.signals import ignore_signals, raise_on_signals

raise_on_signals()
try:
    print("ready", flush=True)
    threading.Event().wait(60)
except KeyboardInterrupt as error:
    print(type(error).__name__, flush=True)
    threading.Event().wait(0.5)
    ignore_signals()  # Python's end takes our handlers away
"""


def test_no_lock_stays_taken() -> None:
    command = [sys.executable, "-c", ROUNDS, "200"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr


def test_a_wait_is_left_once() -> None:
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "Terminated\n"
        for _ in range(100):
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert time.monotonic() - started < 30
