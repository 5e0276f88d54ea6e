"""Programs in a pseudo-terminal."""

import os
import re
import select
import subprocess
import time


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, words: list[str], **environment: str):
        import pty

        self.master, slave = pty.openpty()
        settings = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "HF_HUB_OFFLINE": "1"}
        environment = {**os.environ, **settings, **environment}
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        self.said = b""

    def until(self, pattern: bytes, seconds: float = 60) -> bytes:
        """What was said from the last call up to `pattern`."""
        start, deadline = len(self.said), time.monotonic() + seconds
        while not (found := re.search(pattern, self.said[start:])):
            assert time.monotonic() < deadline, self.said[-2000:]
            if select.select([self.master], [], [], 0.5)[0]:
                self.said += os.read(self.master, 4096)
        return self.said[start : start + found.end()]

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def type(self, line: str) -> None:
        self.write(line + "\n")
