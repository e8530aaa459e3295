"""The label service of a run: started on the teacher's node, looked at every second, put up again when it fails.

Where hosts share no storage it is on the driver's node, the home of the run, and ranks go to it for all they keep.
"""

import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from titan.cluster.failure import error_of
from titan.distill.rank import ADDRESS_FILE
from titan.distill.service.connection import Connection, Unreachable
from titan.distill.service.process import ServiceProcess
from titan.distill.service.protocol import HEALTH_ACTION, RUN, location
from titan.errors import LabelError
from titan.observe.events import EventLog

LOOK_EVERY_S = 1.0
HEALTH_S = 3.0
"""A service that gives no answer for so long hangs."""
ACTOR_S = 90.0
"""The same for the actor that keeps it: putting up a service may take it a minute."""


class ServiceActor:
    """Keeps the service's process on a node."""

    def __init__(
        self,
        labels_folder: Path,
        token: str,
        address_file: Path,
        host: str | None,
        port: int = 0,
        home: Mapping[str, Path] | None = None,
    ):
        """host: address to listen on; None takes this node's"""
        self.labels_folder, self.token, self.address_file = labels_folder, token, address_file
        self.host = host or ray.util.get_node_ip_address()
        self.port, self.home = port, home
        self.process = self._start()

    def look(self) -> tuple[int, str]:
        """The pid of the service's process, and why it had to be started anew; "" if it had not."""
        trouble = "" if self.process.alive() else "it died"
        if not trouble:
            try:
                Connection(self.address_file, self.token).act(HEALTH_ACTION, b"", HEALTH_S)
            except (Unreachable, LabelError) as error:
                trouble = "it died" if not self.process.alive() else str(error)
        if trouble:
            self.process.kill()
            self.process = self._start()
        return self.process.pid, trouble

    def _start(self) -> ServiceProcess:
        return ServiceProcess(self.labels_folder, self.token, self.address_file, self.host, self.port, home=self.home)


class ServiceKeeper:
    """The driver's side: never waits, except for the first start."""

    def __init__(self, run_folder: Path, events: EventLog, host: str | None):
        self.run_folder, self.events, self.host = run_folder.absolute(), events, host
        self.token = secrets.token_hex(16)
        self.node_id = ""
        self.pid = 0
        self.port, self.home = 0, dict[str, Path]()
        """Of a run's home."""
        self._actor: Any = None
        self._asked: tuple[Any, float] | None = None
        self._next_look = 0.0

    def start_home(self, folders: Mapping[str, Path]) -> str:
        """Serve the run's folder and others to all hosts, from this process's node; returns the address, which stays.

        folders: what may be read besides, by name
        """
        self.host = self.host or str(ray.util.get_node_ip_address())
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            self.port = probe.getsockname()[1]
        self.home = {**folders, RUN: self.run_folder}
        self.start(ray.get_runtime_context().get_node_id())
        return location(self.host, self.port)

    def start(self, node_id: str) -> None:
        """Begin to serve on a node; `look` does the rest."""
        self.node_id, self.pid = node_id, 0
        affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
        skin = ray.remote(ServiceActor).options(num_cpus=0, max_restarts=0, scheduling_strategy=affinity)
        address_file = self.run_folder / ADDRESS_FILE
        labels = self.run_folder / "labels"
        self._actor = skin.remote(labels, self.token, address_file, self.host, self.port, self.home or None)
        self._ask()

    def look(self) -> None:
        """See whether the service is well; call it often."""
        if self._actor is None:
            return
        if self._asked is None:
            if time.monotonic() >= self._next_look:
                self._ask()
            return
        ref, since = self._asked
        if ray.wait([ref], timeout=0)[0]:
            self._asked, self._next_look = None, time.monotonic() + LOOK_EVERY_S
            error = error_of(ref)
            if error is None:
                self._note(*ray.get(ref))
            else:
                self._again(str(error).strip().splitlines()[-1])
        elif time.monotonic() - since > ACTOR_S:
            self._again(f"its keeper has not answered for {ACTOR_S:.0f} s")

    def stop(self) -> None:
        """End the service; its process ends with the actor's."""
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
            self._actor = self._asked = None

    def _ask(self) -> None:
        self._asked = self._actor.look.remote(), time.monotonic()

    def _note(self, pid: int, trouble: str) -> None:
        if trouble:
            self.events.emit("label_service_lost", error=trouble)
        if pid != self.pid:
            self.pid = pid
            self.events.emit("label_service", pid=pid)

    def _again(self, why: str) -> None:
        self.events.emit("label_service_lost", error=why)
        node = self.node_id
        self.stop()
        if any(one["NodeID"] == node and one["Alive"] for one in ray.nodes()):
            self.start(node)
