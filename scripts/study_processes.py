"""The child processes of a study: one at a time, or one on each device where there are several."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from hfkd.errors import InputError, RunError

from .study_file import Run


Work = Callable[[Run], None]


def in_turn(work: Work, items: Sequence[Run]) -> None:
    """Do the runs one after another."""
    for item in items:
        work(item)


def cuda_devices() -> list[str]:
    """CUDA's devices as `CUDA_VISIBLE_DEVICES` names them."""
    import torch  # a study's table can be made without it

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


class Processes:
    """Runs `hfkd` in child processes, each of which sees a single device.

    Args:
        devices: as `cuda_devices` gives them. With fewer than two, runs go one by one and see what there is.
    """

    def __init__(self, devices: Sequence[str] = ()) -> None:
        self._count = max(len(devices), 1)
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for device in devices if len(devices) > 1 else [None]:
            self._free.put(device)
        self._children: set[subprocess.Popen] = set()
        self._guard = threading.Lock()
        self._stopped_by: int | None = None

    def __call__(self, arguments: list[str], item: Run, folder: Path, lock: int) -> None:
        """Run `hfkd` with these arguments on a free device; its output is appended to `log.txt` in the run's folder.

        `lock` is a file descriptor that the child holds, too.

        Raises:
            InputError: the child found bad input.
            RunError: it failed, or was stopped.
        """
        device = self._free.get()
        try:
            with (folder / "log.txt").open("ab") as log:
                code = self._start(arguments, device, log.fileno(), lock).wait()
        finally:
            self._free.put(device)
        if code:
            log_file = folder / "log.txt"
            last = log_file.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            message = f"arm {item.arm!r}, seed {item.seed}: exit code {code}: {last} (see {log_file})"
            raise InputError(message) if code == 2 else RunError(message)

    def _start(self, arguments: list[str], device: str | None, log: int, lock: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "hfkd.scripts.cli", *arguments]
        environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        with self._guard:
            if self._stopped_by is not None:
                raise RunError(f"stopped by {signal.Signals(self._stopped_by).name} before it began")
            # A session of its own: Ctrl-C reaches it once, from here, and not twice.
            child = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, pass_fds=(lock,), start_new_session=True
            )
            self._children.add(child)
        return child

    def each(self, work: Work, items: Sequence[Run]) -> None:
        """Do the runs, at most one at a time on each device.

        A signal is handed on to the children, which save and stop before this returns. Where a run has bad input, the
        others that are under way end before it is raised.
        """
        # Threads, as the main one must stay free for signals.
        executor = ThreadPoolExecutor(self._count)
        try:
            for future in as_completed([executor.submit(work, item) for item in items]):
                future.result()
        except (KeyboardInterrupt, SystemExit) as stop:
            self._stop(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            raise
        finally:
            executor.shutdown(cancel_futures=True)

    def _stop(self, signum: int) -> None:
        with self._guard:
            self._stopped_by = signum
            for child in self._children:
                child.send_signal(signum)  # nothing happens to one that has ended
