"""What speaks for a process that is silent: run as a program of its own by `progress.alive`, because an import or a long call may hold Python's
lock, so that no thread of the process itself gets a word in.

Its standard input says what the process works at: whether it has just spoken (1 or 0), the moment that the work began (time.monotonic, which
all processes share), and the words, or none while another process speaks. It ends with its input. Nothing of finebits is imported, and
nothing that takes long.
"""

import os
import select
import signal
import sys
import time

FIRST = 0.4  # seconds


def watch(silence, live):
    """Speak whenever nothing has come for `silence` seconds."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # which a whole group is sent: this ends when the process does, which may have to save
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    begun, text, rest, beats = 0.0, "", b"", False
    due = time.monotonic() + silence
    while True:
        ready = select.select([0], [], [], max(due - time.monotonic(), 0) if text else None)[0]
        if not ready:
            took = f"  ({time.monotonic() - begun:.0f} s)"
            line = f" {text[: 118 - len(took)]}{took}" if live else f" {text}{took}"
            os.write(2, (f"\r{line:119}" if live else line + "\n").encode(errors="replace"))
            due, beats = time.monotonic() + silence, True
            continue
        new = os.read(0, 65536)
        if not new:
            break
        *lines, rest = (rest + new).split(b"\n")
        for message in lines:
            before = text
            spoke, at, text = message.decode().split(" ", 2)
            begun = float(at)
            if spoke == "1":
                due, beats = time.monotonic() + silence, False
            elif not before:  # another has spoken until now, or nobody yet
                due = time.monotonic() + FIRST
    if beats and live:
        os.write(2, b"\r\x1b[K")


if __name__ == "__main__":
    watch(float(sys.argv[1]), sys.argv[2] == "live")
