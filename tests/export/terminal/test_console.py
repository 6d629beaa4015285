"""What moves on a terminal: every line that is written meanwhile is a line of its own, whoever writes it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
from pathlib import Path

from tests import children

ROOT = Path(__file__).resolve().parents[3]
LONG = "/folder" * 30 + "/note"  # wider than a terminal: whoever copies it wants it whole
CODE = f"""
import logging, sys, time, warnings
sys.path.insert(0, {str(ROOT)!r})
from export.terminal import command_line, console
def write(what):
    time.sleep(0.2)  # until something moves
    logging.getLogger('resnet').info(what + ' logged {LONG}')
    warnings.warn(what + ' warned {LONG}')
    sys.stderr.write(what + ' written {LONG}\\n')
    print(what + ' printed {LONG}')
    time.sleep(0.2)
command_line.show_log(informing='resnet')
with console.Progress() as progress:
    progress('a step')
    write('spinner')
    progress('another step')
with console.images_bar('a file', 5) as progress:
    progress(1)
    write('bar')
    progress(5)
"""
PRINTED = "".join(f"{what} printed {LONG}\n" for what in ("spinner", "bar"))


def test_lines_written_meanwhile_stand_alone() -> None:
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    process = children.start([sys.executable, "-c", CODE], env=environment, stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the last writer is gone
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert children.finish(process).stdout == PRINTED  # into the file or pipe that it was sent to
    text = shown.decode()
    assert "⠋" in text and "1/5" in text  # both did move
    lines = re.split(r"\r\n|\x1b\[2K", text)
    for what in ("spinner", "bar"):
        for note in (f"logged {LONG}", f"warned {LONG}", f"written {LONG}"):
            (line,) = (line for line in lines if f"{what} {note}" in line)
            assert re.fullmatch(rf"(<string>:\d+: UserWarning: )?{what} {note}", line), line


def test_in_a_pipe_nothing_moves() -> None:
    finished = children.run([sys.executable, "-c", CODE])
    lines = finished.stderr.splitlines()
    assert f"spinner logged {LONG}" in lines and f"bar written {LONG}" in lines and finished.stdout == PRINTED
    assert "\x1b" not in finished.stderr and "\r" not in finished.stderr
    steps = [re.sub(r"^ +\d\.\d s  ", "", line) for line in lines if " s  " in line]
    assert steps == ["a step", "another step", "a file: 5 images"]
