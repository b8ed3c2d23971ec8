import os
import signal
import subprocess
import sys
import time

from castalia.train.stop_signals import TOGETHER_S, StopSignals

HUNG_UP = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
from castalia.train.stop_signals import StopSignals
with StopSignals() as signals:
    signal.raise_signal(signal.SIGHUP)
    print(signals.received)
"""


def test_a_closed_terminal_stops_a_run_unless_it_is_to_go_on():
    for how, told in (("shell", "SIGHUP"), ("nohup", "None")):
        done = subprocess.run([sys.executable, "-c", HUNG_UP, how], capture_output=True, text=True)
        assert done.stdout == told + "\n"


BUSY = """
import hashlib
from castalia.train.stop_signals import StopSignals
with StopSignals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one instruction of Python's, of many minutes
"""


def test_signals_are_answered_in_the_middle_of_an_instruction():
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stderr.readline() == "SIGTERM: stopping after this micro-batch; again to stop at once\n"
        time.sleep(TOGETHER_S + 0.1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
    finally:
        child.kill()
        child.communicate()


def test_a_later_signal_ends_the_process():
    child = os.fork()
    if child == 0:
        with StopSignals():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # a launcher passing it on
            time.sleep(TOGETHER_S + 0.1)
            signal.raise_signal(signal.SIGINT)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGINT
