"""Old labels go when the settings say so, and whoever needed them is told."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.label_logs import Producer, assert_whole, flip, read_all, snapshot
from titan.distill.log.reader import DroppedError, LabelReader
from titan.distill.log.repair import reopen
from titan.distill.log.retention import (
    KEPT,
    Kept,
    Retention,
    drop_before,
    first_kept,
    read_places,
    read_position,
    remove_place,
    retain,
    write_place,
    write_position,
)
from titan.distill.log.segment import parts_of, scan, segments_of
from titan.distill.log.verify import verify_log
from titan.errors import ConfigError, LabelError


def log_of(folder: Path, steps: int = 20, dp: int = 2) -> Path:
    """Segments of two steps or so in each part."""
    Producer(folder, dp, segment_bytes=400).steps(1, steps).close()
    return folder


def steps_there(folder: Path) -> set[int]:
    """The slow way: steps of which every sample is in some segment."""
    samples: dict[int, int] = {}
    for part in parts_of(folder):
        for path in segments_of(folder, part):
            for block in scan(path):
                samples[block.header.step] = samples.get(block.header.step, 0) + block.header.samples
    return {step for step, count in samples.items() if count == 4}


def size_of(folder: Path) -> int:
    return sum(len(data) for name, data in snapshot(folder).items() if name.startswith("part-"))


def test_places_of_readers_are_read_back_and_removed(tmp_path: Path) -> None:
    assert read_places(tmp_path) == {}
    write_place(tmp_path, "small", 3)
    write_place(tmp_path, "tiny", 9)
    write_place(tmp_path, "small", 4)
    (tmp_path / "readers" / ".small.json.1.tmp").write_bytes(b"half")
    assert read_places(tmp_path) == {"small": 4, "tiny": 9}
    remove_place(tmp_path, "small")
    remove_place(tmp_path, "small")
    assert read_places(tmp_path) == {"tiny": 9}


def test_a_log_that_is_kept_whole_loses_nothing(tmp_path: Path) -> None:
    before = snapshot(log_of(tmp_path))
    write_place(tmp_path, "small", 20)
    kept = retain(tmp_path, Retention())
    assert kept == Kept(0, size_of(tmp_path), 0, full=False)
    assert {name: data for name, data in snapshot(tmp_path).items() if name in before} == before


@pytest.mark.parametrize("slowest", range(21))
def test_what_the_slowest_reader_has_not_learned_is_kept(tmp_path: Path, slowest: int) -> None:
    log_of(tmp_path)
    before = size_of(tmp_path)
    for name, step in (("small", slowest), ("tiny", 20)):
        write_place(tmp_path, name, step)
    kept = retain(tmp_path, Retention("needed"))
    assert kept.first_step <= slowest + 1 and not kept.overtaken
    assert steps_there(tmp_path) >= set(range(slowest + 1, 21)) | {20}
    for part in parts_of(tmp_path):
        paths = segments_of(tmp_path, part)
        needless = [path for path in paths[:-1] if max(block.header.step for block in scan(path)) <= slowest]
        assert not needless, "every segment that could go is gone"
    assert kept.dropped_bytes == before - kept.size_bytes and kept.size_bytes == size_of(tmp_path)
    first = max(kept.first_step, 1)
    for step, blocks in read_all(tmp_path, 20, first=first).items():
        assert_whole(blocks, step)
    assert verify_findings(tmp_path) == [] and reopen(tmp_path) == 20


def verify_findings(folder: Path) -> list[str]:
    """Without log.json, which these logs do not have."""
    return [str(finding) for finding in verify_log(folder).findings if "log.json" not in finding.problem]


def test_without_readers_nothing_is_dropped_and_an_expected_reader_needs_everything(tmp_path: Path) -> None:
    log_of(tmp_path)
    assert retain(tmp_path, Retention("needed")).dropped_bytes == 0
    write_place(tmp_path, "small", 20)
    assert retain(tmp_path, Retention("needed"), expected={"small": 0, "late": 0}).dropped_bytes == 0
    assert retain(tmp_path, Retention("needed"), expected={"small": 0}).dropped_bytes > 0


def test_a_part_of_an_older_layout_is_dropped_whole(tmp_path: Path) -> None:
    log_of(tmp_path, 6, dp=2)
    Producer(tmp_path, 1, segment_bytes=400).steps(7, 20).close()
    write_place(tmp_path, "small", 15)
    retain(tmp_path, Retention("needed"))
    assert segments_of(tmp_path, 1) == [] and steps_there(tmp_path) >= set(range(16, 21))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999, 1.0])
def test_drop_frees_the_oldest_steps_until_the_log_fits(tmp_path: Path, share: float) -> None:
    log_of(tmp_path)
    before = size_of(tmp_path)
    write_place(tmp_path, "small", 7)
    kept = retain(tmp_path, Retention("all", int(before * share), "drop"))
    assert kept.size_bytes == size_of(tmp_path) and not kept.full
    assert 20 in steps_there(tmp_path), "the newest step is never dropped"
    if share >= 0.2:
        assert kept.size_bytes <= before * share
        assert kept.size_bytes + before // 8 >= before * share, "no more than needed: a segment a part is a tenth"
    assert kept.overtaken == (("small",) if kept.first_step > 8 else ())
    assert retain(tmp_path, Retention("all", int(before * share), "drop")).overtaken == (), "told once"
    for step, blocks in read_all(tmp_path, 20, first=max(1, kept.first_step)).items():
        assert_whole(blocks, step)


def test_stop_says_who_is_slowest_and_drops_nothing(tmp_path: Path) -> None:
    before = snapshot(log_of(tmp_path))
    write_place(tmp_path, "small", 7)
    with pytest.raises(LabelError, match="the slowest reader is small at step 7") as caught:
        retain(tmp_path, Retention("all", 1000, "stop"))
    assert "labels.max_bytes is 1000" in str(caught.value) and "\n" not in str(caught.value)
    assert set(snapshot(tmp_path)) == set(before) | {"readers/small.json"}


def test_a_full_log_that_waits_has_room_once_its_readers_have_learned_enough(tmp_path: Path) -> None:
    log_of(tmp_path)
    rule = Retention("needed", size_of(tmp_path) // 2, "wait")
    fulls = []
    for step in range(2, 21):
        write_place(tmp_path, "small", step)
        fulls.append(retain(tmp_path, rule).full)
    assert fulls == sorted(fulls, reverse=True) and fulls[0] and not fulls[-1]
    assert size_of(tmp_path) <= rule.max_bytes
    assert retain(tmp_path, Retention("needed", rule.max_bytes, "wait", room_bytes=rule.max_bytes)).full is False, (
        "nothing more could go"
    )


def test_a_log_with_one_segment_is_not_waited_for(tmp_path: Path) -> None:
    log_of(tmp_path, 2)
    assert not retain(tmp_path, Retention("needed", 10, "wait"), expected={"small": 0}).full
    with pytest.raises(ConfigError, match="no reader could ever make room"):
        Retention("all", 10, "wait")


def test_room_for_the_next_step_is_made_before_it_comes(tmp_path: Path) -> None:
    log_of(tmp_path)
    limit = size_of(tmp_path)
    assert retain(tmp_path, Retention("all", limit, "drop")).dropped_bytes == 0
    kept = retain(tmp_path, Retention("all", limit, "drop", room_bytes=limit // 2))
    assert kept.size_bytes <= limit - limit // 2


def test_an_expected_reader_needs_nothing_before_its_start(tmp_path: Path) -> None:
    log_of(tmp_path)
    kept = retain(tmp_path, Retention("needed"), expected={"late": 12})
    assert 1 < kept.first_step <= 13 and steps_there(tmp_path) >= set(range(13, 21))


def test_steps_before_one_are_dropped_where_a_copy_follows_its_log(tmp_path: Path) -> None:
    log_of(tmp_path)
    drop_before(tmp_path, 9)
    assert first_kept(tmp_path) == 9 and steps_there(tmp_path) >= set(range(9, 21))
    before = snapshot(tmp_path)
    drop_before(tmp_path, 4)
    assert snapshot(tmp_path) == before, "what is gone stays gone"


def test_a_position_is_the_newest_that_was_told(tmp_path: Path) -> None:
    assert read_position(tmp_path, "small") is None
    for step in (3, 12, 5):  # it goes back where a student starts again
        write_position(tmp_path, "small", step)
        assert read_position(tmp_path, "small") == step
    assert read_places(tmp_path) == {}, "it holds no label back"
    (tmp_path / "readers" / "small.at").write_bytes(b"")
    assert read_position(tmp_path, "small") is None


def dropped(folder: Path) -> LabelReader:
    """A reader that has read step 2 of a log from which steps are dropped now."""
    log_of(folder)
    reader = LabelReader(folder, 1.0)
    commit = reader.wait_commit(2)
    assert commit is not None
    reader.read(commit)
    write_place(folder, "tiny", 10)
    assert retain(folder, Retention("needed")).first_step > 3
    return reader


def test_a_reader_that_finds_its_step_dropped_gets_the_first_that_is_still_there(tmp_path: Path) -> None:
    reader = dropped(tmp_path)
    first = first_kept(tmp_path)
    commit = reader.wait_commit(3)
    assert commit is not None and commit.step == reader.first_step == first > 3
    assert_whole(reader.read(commit)[0], first)
    late = LabelReader(tmp_path, 1.0)
    commit = late.wait_commit(1)
    assert commit is not None and commit.step == first
    assert_whole(late.read(commit)[0], first)


def test_a_step_that_is_dropped_between_its_commit_and_its_reading_says_so(tmp_path: Path) -> None:
    log_of(tmp_path)
    reader = LabelReader(tmp_path, 1.0)
    commit = reader.wait_commit(3)
    write_place(tmp_path, "tiny", 20)
    retain(tmp_path, Retention("needed"))
    assert commit is not None
    with pytest.raises(DroppedError, match=r"step 3 was dropped .* is the first there"):
        reader.read(commit)


def test_a_reader_in_a_segment_that_is_deleted_reads_on(tmp_path: Path) -> None:
    log_of(tmp_path)
    reader = LabelReader(tmp_path, 1.0)
    commits = [reader.wait_commit(step) for step in (3, 4)]
    assert commits[0] is not None
    reader.read(commits[0])
    open_segment = reader.parts[0].path
    write_place(tmp_path, "tiny", 20)
    retain(tmp_path, Retention("needed"))
    assert open_segment is not None and not open_segment.exists()
    assert_whole(reader.read(commits[0])[0], 3)


@pytest.mark.parametrize("when", ["after kept.json", "after some segments"])
def test_a_crash_while_dropping_is_cleaned_up(tmp_path: Path, when: str) -> None:
    files = snapshot(log_of(tmp_path / "log"))
    write_place(tmp_path / "log", "tiny", 11)
    retain(tmp_path / "log", Retention("needed"))
    after = snapshot(tmp_path / "log")
    gone = sorted(set(files) - set(after))
    assert len(gone) > 8
    for name in gone[: 4 if when == "after some segments" else None]:
        (tmp_path / "log" / name).write_bytes(files[name])
    reader = LabelReader(tmp_path / "log", 1.0)
    commit = reader.wait_commit(1)
    assert commit is not None and commit.step == first_kept(tmp_path / "log")
    assert reopen(tmp_path / "log") == 20
    assert snapshot(tmp_path / "log") == after


@pytest.mark.parametrize(
    ("name", "look"), [(KEPT, first_kept), ("readers/small.json", read_places)], ids=["kept", "place"]
)
def test_damaged_small_files_are_named(tmp_path: Path, name: str, look: Callable[[Path], object]) -> None:
    log_of(tmp_path)
    write_place(tmp_path, "small", 12)
    retain(tmp_path, Retention("needed"))
    data = (tmp_path / name).read_bytes()
    for place in range(len(data)):
        flip(tmp_path / name, place, bit=place % 8)
        with pytest.raises(LabelError, match="is damaged"):
            look(tmp_path)
        (tmp_path / name).write_bytes(data)
