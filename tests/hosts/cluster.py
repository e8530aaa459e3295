"""A run on three hosts that fail: everything that can be done to it, and what puts it right again afterwards.

Host 0 has Ray's head and the driver; each host has room for two ranks. `folder/shared`, a disk of its own, is what all
hosts share: run folder, corpus, checkpoints, labels.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.hosts.namespaces import Host
from tests.hosts.ray_hosts import RAY, RayHosts, start_node, start_ray
from titan.observe.events import read_events

ROOM = ("--num-cpus=1",)
"""Of `ray start` on each host."""
PARTS_OF_RAY = ("raylet", "gcs_server", "/ray/", "ray::", "bin/ray")
END_S = 120.0
"""Longest wait for a run to end that has lost what it needs."""


class NotThereError(Exception):
    """What was to be struck is not there now."""


class HurtRun:
    """One run, started and resumed as often as need be."""

    def __init__(
        self,
        hosts: list[Host],
        settings: tuple[str, ...],
        rooms: Sequence[tuple[str, ...]] = (ROOM,) * 3,
        num_up: int | None = None,
    ):
        """rooms: what `ray start` offers on each host
        num_up: hosts that have Ray from the beginning, the first ones; all if None, the others may `join`
        """
        self.hosts, self.settings = hosts, settings
        self.rooms = {host.name: room for host, room in zip(hosts, rooms, strict=True)}
        self.shared = hosts[0].folder / "shared"
        self.run = self.shared / "runs/tiny"
        self.cluster: RayHosts = start_ray(hosts[:num_up], rooms[:num_up])
        self.down = {host.name for host in hosts[len(hosts[:num_up]) :]}
        """Hosts that are dead, unplugged, or without Ray as yet."""
        self.process: subprocess.Popen[str] | None = None
        self.starts = 0

    # --- the run ---

    def begin(self, *words: object) -> None:
        """Start `titan ...` on the first host."""
        self.starts += 1
        sets = [part for one in (*self.settings, f"run.dir={self.run.parent}") for part in ("--set", one)]
        command = (sys.executable, "-m", "titan.cli.main", *words, "--address", self.cluster.address, *sets)
        self.process = self.hosts[0].start(*command, log=self.log, environment=self.cluster.environment)

    @property
    def log(self) -> Path:
        """What the newest start says."""
        return self.hosts[0].folder / f"titan-{self.starts}.log"

    def resume(self) -> None:
        """Go on after the run has ended."""
        self.begin("resume", self.run)

    def ended(self) -> int | None:
        """Exit code of the newest start; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def must_end(self, code: int, *words: str) -> float:
        """Wait until it ends, with this code and these words in its last line; returns the seconds."""
        begin = time.monotonic()
        self.wait_for_end(END_S)
        text = self.log.read_text()
        said = ([line for line in text.splitlines() if line.startswith("titan: ")] or [text[-500:]])[-1]
        assert self.ended() == code, f"it ended with {self.ended()}, not {code}: {said}"
        assert all(word in said for word in words), f"{words} expected in: {said}"
        return time.monotonic() - begin

    def wait(self, true: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for something in a run that goes on, and mend Ray meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not true():
            assert self.ended() is None, f"the run ended with {self.ended()}: {self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s:.0f} s: {self.log.read_text()[-2000:]}"
            self.mend()
            time.sleep(0.2)

    def wait_for_end(self, timeout_s: float) -> None:
        """The same for the end of the run."""
        deadline = time.monotonic() + timeout_s
        while self.ended() is None:
            assert time.monotonic() < deadline, f"no end of the run in {timeout_s:.0f} s"
            self.mend()
            time.sleep(0.2)

    # --- Ray ---

    def mend(self) -> None:
        """Start Ray again on hosts that are there and have lost it; the first one's only when it is struck itself."""
        for host in self.hosts[1:]:
            if host.name not in self.down and self._ray(host).poll() is not None:
                self._end_ray(host)
                start_node(host, self.cluster, (f"--address={self.cluster.address}", *self.rooms[host.name]))

    def restart_ray(self) -> None:
        """All of it, after its head is gone."""
        for host in self.hosts:
            self._end_ray(host)
        self.cluster = start_ray(self.hosts, list(self.rooms.values()))

    def _ray(self, host: Host) -> "subprocess.Popen[str]":
        return [process for process in host.processes if {str(RAY), "start"} <= set(process.args)][-1]  # type: ignore[arg-type]

    def _end_ray(self, host: Host) -> None:
        """Kill what is left of Ray on a host, by number."""
        for pid, words in commands(host).items():
            if any(part in words for part in PARTS_OF_RAY):
                host.run("kill", "-9", pid)

    # --- faults ---

    def strike_rank(self, role: str, choose: Callable[[list[str]], str], blow: str) -> str:
        """Send a signal to a rank's process."""
        name, _, pid = choose(self.placed(role)).rpartition(":")
        return self._signal(name, int(pid), "RankActor", blow)

    def strike_service(self, blow: str) -> str:
        """The same to the label service, wherever it is."""
        told = [event["pid"] for event in read_events(self.run) if event["event"] == "label_service"]
        if not told:
            raise NotThereError("no service")
        marker = "titan.distill.service"
        for host in self.hosts:
            if host.name not in self.down and marker in commands(host).get(told[-1], ""):
                return self._signal(host.name, told[-1], marker, blow)
        raise NotThereError("the service is not up")

    def placed(self, role: str) -> list[str]:
        """HOST:PID of the ranks of a role, those that were started last."""
        told = [one for one in read_events(self.run) if one["event"] == "placed" and one["role"] == role]
        if not told:
            raise NotThereError(f"{role} was not placed")
        return [str(process) for process in told[-1]["processes"]]

    def _signal(self, name: str, pid: int, marker: str, blow: str) -> str:
        host = next(host for host in self.hosts if host.name == name)
        if name in self.down or marker not in commands(host).get(pid, ""):
            raise NotThereError(f"{marker} {pid} on {name}")
        host.run("kill", f"-{blow}", pid)
        return name

    def kill_raylet(self, host: Host) -> None:
        """Ray's own daemon of a host."""
        for pid, words in commands(host).items():
            if words.split()[0].endswith("/raylet"):
                host.run("kill", "-9", pid)
                return
        raise NotThereError(f"no raylet on {host.name}")

    def kill_host(self, host: Host, seconds: float) -> None:
        """A host dies, and is there again some time later."""
        self.down.add(host.name)
        host.kill()
        time.sleep(seconds)
        self.bring_back(host)

    def bring_back(self, host: Host) -> None:
        """A host that was killed is there again, with Ray."""
        host.boot()
        self.join(host)

    def join(self, host: Host) -> None:
        """A host that is there starts Ray."""
        start_node(host, self.cluster, (f"--address={self.cluster.address}", *self.rooms[host.name]))
        self.down.remove(host.name)

    def unplug(self, host: Host, seconds: float, given_up: bool) -> None:
        """A host's link is down for a time. given_up: so long that Ray is started anew there."""
        self.down.add(host.name)
        host.unplug()
        time.sleep(seconds)
        host.plug_in()
        if given_up:
            time.sleep(2.0)  # in which those that were cut off may do harm
            self._end_ray(host)
            self._ray(host).wait(10.0)
        self.down.remove(host.name)

    def fill_disk(self) -> float:
        """Until the run has noticed and ended; returns the seconds that took."""
        filler = self.shared / "filler"
        try:
            with filler.open("wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12, 1):
                    try:
                        while file.write(b"\0" * size) == size:
                            pass
                    except OSError:
                        continue
            return self.must_end(1, "No space left on device", "resume")
        finally:
            filler.unlink()

    def kill_driver(self) -> None:
        """The process of `titan` itself."""
        assert self.process is not None
        (driver,) = psutil.Process(self.process.pid).children()
        driver.kill()
        self.process.wait(10.0)

    def kill_head(self) -> float:
        """Ray's head process; the run ends by itself, the seconds are returned, and Ray is started anew everywhere."""
        for pid, words in commands(self.hosts[0]).items():
            if words.split()[0].endswith("/gcs_server"):
                self.hosts[0].run("kill", "-9", pid)
        seconds = self.must_end(1, "Ray's head", "resume")
        self.restart_ray()
        return seconds

    # --- what is left ---

    def leftovers(self) -> dict[str, list[str]]:
        """Processes of titan by host that lives, and what is left there of any kind once Ray is ended too."""
        found: dict[str, list[str]] = {}
        living = [host for host in self.hosts if host.name not in self.down]
        for host in living:
            there = commands(host).values()
            found[host.name] = (
                [] if any("raylet" in words for words in there) else ["no raylet: this look sees nothing"]
            )
            found[host.name] += [words for words in there if "RankActor" in words or "titan." in words]
            self._end_ray(host)
        time.sleep(1.0)
        for host in living:
            found[host.name] += commands(host).values()
            found[host.name] += host.run("ss", "-Hltn").stdout.splitlines()
            found[host.name] += host.run("find", "/dev/shm", "-mindepth", "1").stdout.splitlines()
        return {name: left for name, left in found.items() if left}


def commands(host: Host) -> dict[int, str]:
    """Command lines of a host's living processes, without its first one and this look itself."""
    lines = host.run("ps", "ax", "-o", "pid=,args=").stdout.splitlines()
    found = {int(pid): words for pid, _, words in (line.strip().partition(" ") for line in lines)}
    return {
        pid: words.strip()
        for pid, words in found.items()
        if pid != 1 and "<defunct>" not in words and "ps ax -o pid=,args=" not in words
    }
