"""Processes that compile kernels on all cores and that nothing outlives: neither they nor their temporary files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def workers(most: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes, since threads of this one, such as torch's, do not survive a fork; `most` of all cores.

    Where the block is left by an error or by Ctrl-C they are ended at once, with whatever is still to be done.
    """
    before, count = set(multiprocessing.active_children()), min(os.cpu_count() or 1, most or 1_000)
    with tempfile.TemporaryDirectory(prefix="resnet-deploy-", ignore_cleanup_errors=True) as folder:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(folder,))
        try:
            yield pool
        except BaseException:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:  # one that had only begun
                process.kill()
                process.join()


def _begin(folder: str) -> None:
    """In a new process: what it leaves in a temporary file goes with the folder, and it goes with its parent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which may reach every process: the parent decides
        signal.signal(number, signal.SIG_IGN)
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
