"""Hosts as Linux namespaces: each has its own network, name, processes, /dev/shm, temporary and private folder.

A switch, which is a network namespace of its own, joins them; nothing of this machine's network is changed.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NETWORK = "10.77.0"
ALL = ("--net", "--uts", "--ipc", "--mount", "--pid")
WAIT_S = 10.0
PREPARE = """
set -e
hostname {name}
mount --make-rprivate /
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount --bind {folder}/{name}/hosts /etc/hosts
mount --bind {folder}/{name}/nsswitch /etc/nsswitch.conf
mount --rbind {folder} /mnt
mount --bind /mnt/{name}/tmp /tmp
mkdir -p {folder}
mount --rbind /mnt {folder}
mount --bind {folder}/{name}/private {folder}/private
umount -R /mnt
ip link set lo up
"""
"""/tmp is private, so the folder that holds it is put back at its place in it."""


@dataclass
class Host:
    """One host. Commands that are started on it end with it."""

    name: str
    address: str
    folder: Path
    """Seen by all hosts at the same path; `folder/private` is another one on each."""
    switch: int
    """Process that holds the network namespace of the switch."""
    init: "subprocess.Popen[bytes]"
    pid: int
    """Of the process that holds the namespaces."""
    processes: "list[subprocess.Popen[str]]" = field(default_factory=list)

    def command(self, *words: object) -> list[str]:
        """A command line that runs on this host."""
        return ["nsenter", "-t", str(self.pid), *ALL, "--", *map(str, words)]

    def command_in(self, folder: Path, *words: object) -> list[str]:
        """The same in a folder: that of this process has another meaning there."""
        return self.command("sh", "-c", 'cd "$0" && exec "$@"', folder, *words)

    def start(self, *words: object, log: Path, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
        """Start a command on this host."""
        with log.open("ab") as out:
            process = subprocess.Popen(
                self.command_in(self.folder, *words),
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(
        self,
        *words: object,
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 30.0,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on this host to its end."""
        return subprocess.run(
            self.command_in(cwd or self.folder, *words),
            env=os.environ | (environment or {}), capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip

    def kill(self) -> None:
        """The host dies at once, with all its processes."""
        os.kill(self.pid, signal.SIGKILL)
        self.init.wait(WAIT_S)

    def boot(self) -> None:
        """A host that was killed is there again, with its address and its files, and no process."""
        for process in self.processes:
            process.wait(WAIT_S)
        self.processes.clear()
        self.init, self.pid = _make_namespaces()
        _set_up(self)

    def unplug(self) -> None:
        """Its link goes down; its processes live on."""
        _do(*self.command("ip", "link", "set", "eth0", "down"))

    def plug_in(self) -> None:
        """Its link comes up again."""
        _do(*self.command("ip", "link", "set", "eth0", "up"))
        _do(*self.command("ip", "route", "replace", "default", "dev", "eth0"))  # it went with the link

    def cap(self, megabit_per_s: int) -> None:
        """Limit what it sends."""
        _do(*self.command("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf"),
            "rate", f"{megabit_per_s}mbit", "burst", "64kb", "latency", "50ms")  # fmt: skip


def require_namespaces() -> None:
    """Skip, with the reason, where hosts cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("not root: hosts are Linux namespaces")
    if missing := [name for name in ("ip", "tc", "nsenter", "unshare") if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install iproute2 util-linux")
    if subprocess.run(["unshare", *ALL, "--fork", "true"], capture_output=True, timeout=WAIT_S).returncode:
        pytest.skip("this machine does not let root make namespaces")


@contextmanager
def hosts(count: int, shared_bytes: int | None = None) -> Iterator[list[Host]]:
    """Hosts h0, h1, ... on one switch. When it ends, so has everything on them.

    shared_bytes: `folder/shared` is a disk of its own, of this size
    """
    folder = Path(tempfile.mkdtemp(prefix="titan-hosts-", dir="/tmp"))
    (folder / "private").mkdir()
    if shared_bytes is not None:
        (folder / "shared").mkdir()
        _do("mount", "-t", "tmpfs", "-o", f"size={shared_bytes}", "tmpfs", str(folder / "shared"))
    made: list[Host] = []
    switch = None
    try:
        switch = subprocess.Popen(["unshare", "--net", "--kill-child", "sleep", "infinity"])
        inside = _holder(switch, "net")
        _do(*_in_switch(inside), "ip", "link", "add", "switch", "type", "bridge")
        _do(*_in_switch(inside), "ip", "link", "set", "switch", "up")
        names = [f"h{number}" for number in range(count)]
        table = "".join(f"{NETWORK}.{number + 1} {name}\n" for number, name in enumerate(names))
        for number, name in enumerate(names):
            made.append(_make_host(folder, name, f"{NETWORK}.{number + 1}", table, inside))
        yield made
    finally:
        for host in made:
            if host.init.poll() is None:
                host.kill()
            for process in host.processes:
                process.wait(WAIT_S)
        if switch is not None:
            switch.kill()
            switch.wait(WAIT_S)
        if shared_bytes is not None:
            _do("umount", "--lazy", str(folder / "shared"))
        shutil.rmtree(folder, ignore_errors=True)


def _make_host(folder: Path, name: str, address: str, table: str, switch: int) -> Host:
    for part in ("tmp", "private"):
        (folder / name / part).mkdir(parents=True)
    (folder / name / "hosts").write_text("127.0.0.1 localhost\n" + table)
    # no name server is in reach: asking one for the name of an address takes five seconds each time
    (folder / name / "nsswitch").write_text("passwd: files\ngroup: files\nhosts: files\n")
    host = Host(name, address, folder, switch, *_make_namespaces())
    _set_up(host)
    return host


def _make_namespaces() -> "tuple[subprocess.Popen[bytes], int]":
    """New namespaces, and the process that holds them."""
    init = subprocess.Popen(
        ["unshare", *ALL, "--fork", "--kill-child", "--mount-proc", "sleep", "infinity"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,  # what it says of a child that was killed
    )
    return init, _holder(init, "pid_for_children")


def _set_up(host: Host) -> None:
    """Name, folders and link of a host."""
    _do(*host.command("bash", "-c", PREPARE.format(name=host.name, folder=host.folder)))
    port, mac = f"to-{host.name}", f"02:00:00:00:00:{int(host.address.rpartition('.')[2]):02x}"  # others remember it
    deadline = time.monotonic() + WAIT_S
    while subprocess.run([*_in_switch(host.switch), "ip", "link", "show", port], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, f"{port} of a host that was killed is still there"
        time.sleep(0.05)  # the kernel takes a link away some time after its host
    _do(*_in_switch(host.switch), "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0",
        "address", mac, "netns", str(host.pid))  # fmt: skip
    _do(*_in_switch(host.switch), "ip", "link", "set", port, "master", "switch", "up")
    _do(*host.command("ip", "address", "add", f"{host.address}/24", "dev", "eth0"))
    _do(*host.command("ip", "link", "set", "eth0", "up"))
    _do(*host.command("ip", "route", "add", "default", "dev", "eth0"))  # so that a host finds its own address


def _holder(parent: "subprocess.Popen[bytes]", kind: str) -> int:
    """The process that is in the new namespaces: `unshare` itself, or with --fork its child."""
    deadline = time.monotonic() + WAIT_S
    outside = os.readlink(f"/proc/self/ns/{kind}")
    while time.monotonic() < deadline:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        pids = [int(child) for child in children]
        for pid in pids if kind == "pid_for_children" else [*pids, parent.pid]:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name == "sleep" and os.readlink(f"/proc/{pid}/ns/{kind}") != outside:
                return pid
        time.sleep(0.02)
    raise AssertionError(f"no namespaces after {WAIT_S} s")


def _in_switch(pid: int) -> Sequence[str]:
    return ("nsenter", "-t", str(pid), "--net", "--")


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
