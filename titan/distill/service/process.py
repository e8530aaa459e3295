"""The label service as a process of its own: started, found by its address file, and ended with its parent."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from titan.distill.service.protocol import read_address
from titan.distill.service.server import LOCALHOST
from titan.errors import LabelError

START_S = 60.0
STOP_S = 10.0
LOOK_S = 0.02


class ServiceProcess:
    """A label service that runs beside this process. It ends with this process, however that ends.

    labels_folder: RUN/labels;  address_file: written by the service as soon as it listens; what it says
                   goes to a file beside it with the suffix .log
    token:         given to the service through a pipe, never on a command line or in a log
    home:          folders of the run by name, if ranks elsewhere read and write them through the service
    advertise:     name of this host for readers elsewhere, if `host` is not one, as 0.0.0.0 is none
    Raises LabelError if it does not come up, with what it said.
    """

    def __init__(
        self,
        labels_folder: Path,
        token: str,
        address_file: Path,
        host: str = LOCALHOST,
        port: int = 0,
        advertise: str | None = None,
        start_s: float = START_S,
        home: Mapping[str, Path] | None = None,
    ):
        address_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "titan.distill.service.server", "--parent", str(os.getpid())]
        command += ["--labels", str(labels_folder), "--address-file", str(address_file)]
        command += ["--host", host, "--port", str(port), *(["--advertise", advertise] if advertise else [])]
        command += [part for name, folder in (home or {}).items() for part in ("--home", f"{name}={folder}")]
        said = address_file.with_suffix(".log")
        with open(said, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(token.encode() + b"\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already, and says why
        deadline = time.monotonic() + start_s
        while read_address(address_file) is None:
            if not self.alive() or time.monotonic() > deadline:
                self.kill()
                lines = said.read_text().strip().splitlines() or ["no answer"]
                raise LabelError(f"the label service did not start: {lines[-1]} (more in {said})")
            time.sleep(LOOK_S)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def alive(self) -> bool:
        """Whether it runs; one that hangs does."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        self.process.terminate()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
