"""A run folder that is on the driver's host alone: as on a disk of one's own, or an error that says why."""

import errno
import json
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.label_nodes import TOKEN, encoded
from tests.run_home import ROLE, Run, tree
from titan.checkpoint.files import LocalFiles
from titan.checkpoint.folder import complete_steps, newest_step
from titan.checkpoint.pieces import Piece, PieceKey
from titan.checkpoint.save import CheckpointWriter
from titan.distill.log.ledger import Ledger, Place, read_ledger
from titan.distill.log.records import FINISHED, Commit
from titan.distill.log.repair import reopen
from titan.distill.log.retention import Retention
from titan.distill.service import home as home_module
from titan.distill.service.connection import Connection, WaitedError
from titan.distill.service.home import Home
from titan.distill.service.process import ServiceProcess
from titan.distill.service.protocol import HOME_ACTION, location
from titan.distill.service.replica import ReplicaWriter
from titan.distill.service.server import serve
from titan.distill.storage import CORPUS
from titan.errors import CheckpointError, LabelError, OvertakenError, RunError

DEADLINE_S = 0.6


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "run")
    yield made
    made.close()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the kind of its error."""
    try:
        return call()
    except OSError as error:
        return error.errno
    except (RunError, LabelError) as error:
        return "bytes instead of" in str(error) or "belong behind" in str(error)


NAMES = st.sampled_from(["a", "b", "sub/a", "sub/b", "sub"])
DATA = st.binary(max_size=40)
CALLS = st.one_of(
    st.tuples(st.just("write"), NAMES, DATA),
    st.tuples(st.just("append"), NAMES, st.integers(0, 50), DATA),
    st.tuples(st.just("truncate"), NAMES, st.integers(0, 50), st.integers(0, 50)),
    st.tuples(st.just("move"), NAMES, NAMES),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("sync"), NAMES),
    st.tuples(st.just("read"), NAMES, st.integers(0, 50), st.one_of(st.none(), st.integers(0, 50))),
    st.tuples(st.just("checksum"), NAMES),
    st.tuples(st.just("find"), st.sampled_from(["*", "sub/*", "*/a", "c"])),
)


@given(calls=st.lists(CALLS, max_size=14))
@settings(max_examples=60, deadline=None)
def test_files_at_home_are_as_files_on_a_disk_of_ones_own_also_when_every_call_comes_twice(
    calls: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("home")
    run, near = Run(folder / "run"), LocalFiles(folder / "near")
    near.path.mkdir()
    there = run.folder / "checkpoints" / ROLE
    there.mkdir(parents=True)
    far = run.home().files(f"checkpoints/{ROLE}")
    try:
        for name, *arguments in calls:
            expected = outcome(lambda name=name, arguments=arguments: getattr(near, name)(*arguments))
            found = outcome(lambda name=name, arguments=arguments: getattr(far, name)(*arguments))
            assert found == expected, (name, arguments)
            assert tree(there) == tree(near.path), (name, arguments)
            if expected is None and name not in ("read", "checksum"):
                getattr(far, name)(*arguments)
                assert tree(there) == tree(near.path), f"{name} came twice"
    finally:
        run.close()


# --- large files ---


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home_module, "PIECE_BYTES", 100)


@pytest.mark.usefixtures("small_pieces")
def test_a_large_file_comes_in_pieces_and_is_there_whole_or_not_at_all(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, data = run.home(), bytes(range(256)) * 4 + b"end"
    files, there = home.files(f"checkpoints/{ROLE}"), run.folder / "checkpoints" / ROLE
    plain_ask, sent = Home.ask, 0

    def breaks_off(self: Home, call: str, *arguments: Any, **fields: Any) -> bytes:
        nonlocal sent
        sent += 1
        if sent == 5:
            raise WaitedError("the host died")
        return plain_ask(self, call, *arguments, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Home, "ask", breaks_off)
        with pytest.raises(WaitedError):
            files.write("step-00000001.partial/part", data)
    assert not (there / "step-00000001.partial/part").exists() and complete_steps(there) == []
    files.write("step-00000001.partial/part", data)
    assert files.read("step-00000001.partial/part") == data
    assert files.read("step-00000001.partial/part", 90, 310) == data[90:310]
    assert files.read("step-00000001.partial/part", 900, 5000) == data[900:]
    assert files.checksum("step-00000001.partial/part") == (len(data), zlib.crc32(data))


@pytest.mark.usefixtures("small_pieces")
def test_a_file_whose_checksum_is_wrong_is_refused_and_nothing_of_it_is_left(run: Run) -> None:
    home = run.home()
    files, there = home.files(f"checkpoints/{ROLE}"), run.folder / "checkpoints" / ROLE
    name = f"checkpoints/{ROLE}/part"
    files.append("part.draft", 0, b"x" * 90)
    (there / "part.draft").write_bytes(b"x" * 89 + b"y")  # a bit of the disk
    with pytest.raises(LabelError, match=r"part came damaged .*nothing was written"):
        seal = {"to": name, "size": 90, "checksum": zlib.crc32(b"x" * 90)}
        home.ask("seal", "it", root="run", name=f"{name}.draft", **seal)
    assert tree(there) == {}
    connection = Connection(run.where, TOKEN)
    who = {"role": ROLE, "number": home.generation.number, "id": home.generation.id}
    for call in ({"call": "write", "durable": True}, {"call": "append", "at": 0}):
        head = {"crc32": zlib.crc32(b"sent"), "root": "run", "name": name} | who | call
        with pytest.raises(LabelError, match=r"4 bytes for .*part came damaged; nothing was written"):
            connection.act(HOME_ACTION, json.dumps(head).encode() + b"\nsemt", 5.0)
    connection.drop()
    assert tree(there) == {}


# --- who may do what ---


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "config.toml", "checkpoints/late/x", "ledger/late.jsonl", "labels/teacher/x",
     "generations/early.json", "checkpoints/early", "labels/teacher/readers/late.json", "checkpoints/early/../late/x"],
)  # fmt: skip
def test_a_role_writes_its_own_files_alone_and_nothing_leads_out_of_the_folder(run: Run, name: str) -> None:
    home = run.home()
    (run.folder / "config.toml").write_text("mine")
    (run.folder / "checkpoints/late").mkdir(parents=True)
    before, files = tree(run.folder.parent), home.files()
    calls: list[Callable[[], Any]] = [
        lambda: files.write(name, b"x"), lambda: files.append(name, 0, b"x"), lambda: files.truncate(name, 0, 0),
        lambda: files.remove(name), lambda: files.move(f"checkpoints/{ROLE}/a", name),
        lambda: files.move(name, f"checkpoints/{ROLE}/a"),
        lambda: home.files(root=CORPUS).write(f"checkpoints/{ROLE}/a", b"x"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LabelError, match=r"may not write|is no name below"):
            call()
    if ".." in name or name.startswith("/"):
        for call in (lambda: files.read(name), lambda: files.checksum(name), lambda: files.find(name)):
            with pytest.raises(LabelError, match="is no name below"):
                call()
    assert tree(run.folder.parent) == before


def test_without_the_token_nobody_is_let_in_and_without_a_home_there_is_none(run: Run, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(LabelError, match=r"the run's home at .* refuses the token of this run") as caught:
        run.home(token="another").files(f"checkpoints/{ROLE}").write("x", b"x")
    assert time.monotonic() - begin < 5.0 and TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "labels").mkdir()
    plain = serve(tmp_path / "labels", TOKEN)
    run.closing.append(plain.close)
    with pytest.raises(LabelError, match="has no action 'home'"):
        run.home(where=location("127.0.0.1", plain.port)).files().read("config.toml")


def test_a_generation_that_was_given_up_writes_nothing_and_is_told_so(run: Run) -> None:
    old = run.home()
    files = old.files(f"checkpoints/{ROLE}")
    files.write("kept", b"1")
    ledger = Ledger(old.files(), ROLE)
    ledger.note(1, Place(1, 0), Place(2, 0), "consumed")
    labels = ReplicaWriter(old.location, TOKEN, ROLE, 0, 5.0, old.generation)
    labels.append(1, encoded(1, 0, 4))
    run.home()
    before = tree(run.folder)
    late: list[Callable[[], Any]] = [
        files.check, lambda: files.write("x", b"x"), lambda: files.append("kept", 1, b"x"),
        lambda: files.truncate("kept", 1, 0), lambda: files.move("kept", "x"), lambda: files.remove("kept"),
        lambda: ledger.note(2, Place(2, 0), Place(3, 0), "consumed"), lambda: ledger.rewind(0),
        lambda: labels.append(2, encoded(2, 0, 4)), lambda: labels.commit(Commit(1, (0,), 4, 1.0)),
        lambda: labels.end(FINISHED), lambda: old.log().retain(Retention(), {}),
    ]  # fmt: skip
    for call in late:
        with pytest.raises(OvertakenError, match="generation 1 of early writes nothing more: generation 2 has taken"):
            call()
        assert tree(run.folder) == before
    labels.close()


# --- home is away ---


def test_a_home_that_is_gone_is_waited_for_and_then_named(run: Run) -> None:
    home = run.home(timeout_s=DEADLINE_S)
    home.files().check()
    run.service.close()
    begin = time.monotonic()
    with pytest.raises(WaitedError) as caught:
        home.files(f"checkpoints/{ROLE}").write("x", b"x")
    assert DEADLINE_S / 2 < time.monotonic() - begin < 10 * DEADLINE_S
    for words in ("waited 1 s for", f"the run's home at {run.where}", "is its node alive? (cluster.step_timeout_s"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_home_that_is_killed_and_put_up_again_on_its_port_costs_nothing_but_time(run: Run) -> None:
    port, address = run.service.port, run.folder / "label_service.json"
    run.service.close()
    folders = {"run": run.folder}
    process = ServiceProcess(run.folder / "labels", TOKEN, address, port=port, home=folders)
    home = run.home(where=location("127.0.0.1", port))
    ledger = Ledger(home.files(), ROLE)
    labels = ReplicaWriter(home.location, TOKEN, ROLE, 0, 60.0, home.generation)
    for step in range(1, 31):
        if step % 10 == 5:
            process.kill()
            with open(run.folder / f"labels/{ROLE}/part-000/0000000001.segment", "ab") as segment:
                segment.write(b"torn")
            process = ServiceProcess(run.folder / "labels", TOKEN, address, port=port, home=folders)
        ledger.note(step, Place(step, 0), Place(step + 1, 0), "consumed")
        labels.append(step, encoded(step, 0, 4))
        labels.append(step, encoded(step, 0, 4))
        labels.commit(Commit(step, (0,), 4, 1.0))
    labels.close()
    process.kill()
    assert [entry.start.step for entry in read_ledger(ledger.path)] == list(range(1, 31))
    assert reopen(run.folder / "labels" / ROLE) == 30


def test_a_full_disk_at_home_is_told_as_one_of_ones_own(run: Run) -> None:
    place = run.folder / "checkpoints"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a disk")
    try:
        files = run.home().files(f"checkpoints/{ROLE}")
        with pytest.raises(OSError, match="No space left on device") as caught:
            files.write("x", bytes(2 << 20))
        assert caught.value.errno == errno.ENOSPC
        writer = CheckpointWriter(files, 0, 1, 2, 5.0)
        writer.save(2, [Piece(PieceKey("weight", "w", 0, 1, 0, 1 << 19), torch.ones(1 << 19))], {"state": {}})
        with pytest.raises(CheckpointError, match=r"No space left on device \(on grpc.*free space"):
            writer.wait()
        assert newest_step(files) is None
    finally:
        subprocess.run(["umount", str(place)], check=True)
