"""What ranks keep at the run's home, and what they find there when they start."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.label_nodes import TOKEN, encoded
from tests.run_home import ROLE, Run, tree
from tests.test_fence import config_of
from titan.checkpoint.fence import take_over
from titan.checkpoint.files import Files
from titan.checkpoint.folder import complete_steps, newest_step, step_name
from titan.checkpoint.load import Checkpoint
from titan.checkpoint.pieces import Piece, PieceKey
from titan.checkpoint.save import CheckpointWriter
from titan.config.load import check_config
from titan.config.settings import TEACHER
from titan.data.corpus import Corpus
from titan.data.prepare import prepare_corpus
from titan.distill.log.records import FINISHED, Commit
from titan.distill.log.repair import reopen
from titan.distill.log.retention import Retention, first_kept, read_places, read_position
from titan.distill.place import PlaceTeller
from titan.distill.rank import RankSpec
from titan.distill.service import home as home_module
from titan.distill.service.client import FlightLabelReader
from titan.distill.service.connection import WaitedError
from titan.distill.service.process import ServiceProcess
from titan.distill.service.protocol import location
from titan.distill.service.replica import ReplicaWriter
from titan.distill.storage import CORPUS, Storage, check_storage
from titan.errors import CheckpointError, ConfigError, DataError, OvertakenError, RunError
from titan.model.parameters import ParameterSpec

DEADLINE_S = 0.6
FORK = multiprocessing.get_context("fork")
WHOLE = ParameterSpec((8, 6), (8, 6), 0, 0.02)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "run")
    yield made
    made.close()


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home_module, "PIECE_BYTES", 100)


# --- what is kept there ---


def pieces_of(rank: int, value: float) -> list[Piece]:
    values = torch.full((24,), value) + torch.arange(24.0)
    return [Piece(PieceKey(kind, "w", rank, 2, 0, 24), values) for kind in ("weight", "exp_avg")]


@pytest.mark.usefixtures("small_pieces")
def test_a_checkpoint_that_ranks_of_several_hosts_send_is_that_of_one_host(run: Run, tmp_path: Path) -> None:
    near = tmp_path / "near"
    home = run.home()
    far = home.files(f"checkpoints/{ROLE}")
    places: tuple[Path | Files, ...] = (near, far)
    for place in places:
        writers = [CheckpointWriter(place, rank, 2, 2, 10.0) for rank in range(2)]
        for step in (1, 2, 3):
            for rank, writer in enumerate(writers):
                writer.save(step, pieces_of(rank, float(step)), {"state": {"step": step}})
            for writer in writers:
                writer.wait()
    assert tree(run.folder / "checkpoints" / ROLE) == tree(near)
    assert complete_steps(far) == [2, 3]
    one, two = Checkpoint(near / step_name(3)), Checkpoint(far.below(step_name(3)))
    assert one.manifest == two.manifest
    for kind in ("weight", "exp_avg"):
        assert torch.equal(one.whole(kind, "w", WHOLE), two.whole(kind, "w", WHOLE))
    damaged = next((run.folder / "checkpoints" / ROLE / step_name(3)).glob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{damaged.name} is damaged .*delete .*{step_name(3)}"):
        Checkpoint(far.below(step_name(3)))


def test_a_checkpoint_is_committed_only_once_every_host_has_sent_its_part(run: Run) -> None:
    files = run.home().files(f"checkpoints/{ROLE}")
    lead = CheckpointWriter(files, 0, 2, 2, timeout_s=0.5)
    lead.save(1, pieces_of(0, 1.0), {})
    with pytest.raises(CheckpointError, match="rank 1 did not write its part"):
        lead.wait()
    assert newest_step(files) is None


def test_labels_of_a_host_that_dies_go_on_from_what_home_has(run: Run) -> None:
    log = run.folder / "labels" / TEACHER

    def start() -> list[ReplicaWriter]:
        home = run.home(TEACHER)
        return [
            ReplicaWriter(home.location, TOKEN, TEACHER, part, 5.0, home.generation, segment_bytes=900)
            for part in range(2)
        ]

    def step_of(writers: list[ReplicaWriter], step: int, commits: bool = True) -> None:
        for part, writer in enumerate(writers):
            writer.append(step, encoded(step, 2 * part, 2))
        if commits:
            writers[0].commit(Commit(step, (0, 1), 4, 1.0))

    first = start()
    for step in range(1, 6):
        step_of(first, step)
    step_of(first, 6, commits=False)  # and dies
    second = start()
    reopen(log)  # as the driver does
    assert second[0].last_committed() == 5
    second[1].append(6, encoded(6, 1, 3))  # in another layout, so that what was not committed is seen to be gone
    second[0].append(6, encoded(6, 0, 1))
    second[0].commit(Commit(6, (0, 1), 4, 1.0))
    with pytest.raises(OvertakenError):
        first[0].commit(Commit(6, (0, 1), 4, 1.0))
    step_of(second, 7)
    second[0].make_durable()
    second[0].end(FINISHED)
    reader = FlightLabelReader(run.where, TOKEN, TEACHER, 5.0)
    learned = []
    while (commit := reader.wait_commit(len(learned) + 1)) is not None:
        blocks, _ = reader.read(commit)
        learned.append([(block.first_sample, len(block.sample_ids_B)) for block in blocks])
    reader.close()
    assert learned == [[(0, 2), (2, 2)]] * 5 + [[(0, 1), (1, 3)], [(0, 2), (2, 2)]]
    for writer in (*first, *second):
        writer.close()
    assert reopen(log) == 7


def test_places_and_old_labels_are_kept_at_home(run: Run) -> None:
    student, teacher = run.home(), run.home(TEACHER)
    labels = ReplicaWriter(teacher.location, TOKEN, TEACHER, 0, 5.0, teacher.generation, segment_bytes=300)
    for step in range(1, 31):
        labels.append(step, encoded(step, 0, 2))
        labels.commit(Commit(step, (0,), 2, 1.0))
    labels.close()
    log, checkpoints = run.folder / "labels" / TEACHER, student.files(f"checkpoints/{ROLE}")
    teller = PlaceTeller(student.files(f"labels/{TEACHER}"), ROLE, checkpoints, live=True)
    assert read_places(log) == {}
    teller.tell(21)
    assert read_position(log, ROLE) == teacher.log().position(ROLE) == 21
    assert teacher.log().position("late") is None
    writer = CheckpointWriter(checkpoints, 0, 1, 2, 5.0)
    writer.save(20, [], {})
    writer.wait()
    teller.look()
    assert read_places(log) == {ROLE: 20}
    before = teacher.log().size_bytes()
    assert before > 30 * 100 and 100 < teacher.log().step_bytes() < before / 20
    kept = teacher.log().retain(Retention("needed"), {ROLE: 0})
    assert kept.first_step == first_kept(log) > 10 and kept.size_bytes == teacher.log().size_bytes() < before


# --- the start of a rank ---


def spec_of(folder: Path, home: str = "", role: str = "s", **more: Any) -> RankSpec:
    config = config_of(folder)
    run = folder / "r"
    run.mkdir(exist_ok=True)
    return RankSpec(config, role, 0, run, folder / "data", generation=take_over(run, role), home=home, **more)


def test_a_host_that_lacks_something_says_so_before_it_does_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan.distill.storage.SEE_S", 0.3)
    spec = spec_of(tmp_path)
    spec = replace(spec, corpus_folder=prepare_corpus(spec.config.data, tmp_path / "data"))
    check_storage(spec)
    elsewhere = tmp_path / "other" / "r"
    for unseen in (elsewhere, tmp_path / "stale"):
        if unseen != elsewhere:
            shutil.copytree(spec.run_folder, unseen)  # a run folder of the same name, of an earlier day
            take_over(unseen, "s")
        words = rf"does not see the run folder {unseen}; .* or set run.storage = 'per-node'"
        with pytest.raises(RunError, match=words):
            check_storage(replace(spec, run_folder=unseen, generation=take_over(spec.run_folder, "s")))
    assert not elsewhere.exists()
    spec = replace(spec, generation=take_over(spec.run_folder, "s"))
    with pytest.raises(RunError, match=r"does not see the prepared corpus, .*index.json; put data.cache on"):
        check_storage(replace(spec, corpus_folder=tmp_path / "none"))
    with pytest.raises(RunError, match=r"does not see the weights to start from, .*none; "):
        check_storage(replace(spec, init=tmp_path / "none"))
    begin = time.monotonic()
    config = spec.config.model_copy(
        update={"cluster": spec.config.cluster.model_copy(update={"step_timeout_s": DEADLINE_S})}
    )
    with pytest.raises(WaitedError, match="the run's home at grpc"):
        check_storage(replace(spec, config=config, home="grpc+tcp://127.0.0.1:9", label_token=TOKEN))
    assert time.monotonic() - begin < 10 * DEADLINE_S


def fetch(spec: RankSpec, said: Path) -> None:
    storage = Storage(spec)
    Corpus.open(storage.corpus(), verify=True)
    storage.close()
    said.write_text("done")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_corpus_is_brought_once_to_each_host_whole_or_not_at_all(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    source = prepare_corpus(spec.config.data, tmp_path / "data")
    (spec.run_folder / "labels").mkdir()
    folders = {"run": spec.run_folder, CORPUS: source}
    process = ServiceProcess(spec.run_folder / "labels", TOKEN, tmp_path / "address", home=folders)
    try:
        where = location("127.0.0.1", json.loads((tmp_path / "address").read_bytes())["port"])
        there = tmp_path / "host" / source.name
        there.mkdir(parents=True)
        (there / "train-00000.arrow").write_bytes(b"of a copy that broke off")
        spec = replace(spec, home=where, label_token=TOKEN, corpus_folder=there)
        ranks = [FORK.Process(target=fetch, args=(spec, tmp_path / f"said-{rank}")) for rank in range(3)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        assert all((tmp_path / f"said-{rank}").exists() for rank in range(3))
        assert tree(there) == tree(source)
        assert sorted(path.name for path in there.parent.iterdir()) == [f".{source.name}.lock", source.name]
        shutil.rmtree(source)
        with pytest.raises(DataError, match=r"index\.json is gone from the driver's host"):
            Storage(replace(spec, corpus_folder=tmp_path / "host/again")).corpus()
        assert not (tmp_path / "host/again").exists()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"labels": {"delivery": "files"}}, "labels.delivery is 'files', but run.storage is 'per-node'"),
        ({"labels": {"copy_to": "/copy"}}, "labels.copy_to is '/copy', but run.storage is 'per-node'"),
        ({"features": True}, "students.s.distill.features is set, but run.storage is 'per-node'"),
    ],
)
def test_what_needs_shared_storage_is_refused_without_it(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    fields = config_of(tmp_path).model_dump(mode="json")
    if more.pop("features", False):
        fields["students"][0]["distill"]["features"] = {"value": 1.0}
    for section, values in more.items():
        fields[section] |= values
    check_config(fields)
    fields["run"]["storage"] = "per-node"
    with pytest.raises(ConfigError) as caught:
        check_config(fields)
    assert words in str(caught.value)
