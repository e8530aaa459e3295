"""A student regroups the samples of its teacher's steps: each once, in order, whatever the sizes, wherever it stops."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.label_logs import MANIFEST, Producer, make_block
from tests.worlds import BATCH, LENGTH, labels_of, make_trainer, run_world, tokens_of
from titan.checkpoint.folder import MANIFEST as CHECKPOINT
from titan.checkpoint.folder import encode_manifest, step_folder
from titan.cli.plan import show_plan
from titan.cluster.planning import plan_run, with_layouts
from titan.config.check import find_mistakes
from titan.config.load import check_config
from titan.config.model import LayoutSettings
from titan.distill.account import LabelAccount
from titan.distill.follow import Next
from titan.distill.log.audit import audit
from titan.distill.log.ledger import Ledger, Place, read_ledger
from titan.distill.log.manifest import write_manifest
from titan.distill.log.records import Commit
from titan.distill.log.retention import read_places
from titan.distill.place import PlaceTeller
from titan.distill.regroup import Batch, Piece, Regrouper, piece_of
from titan.ops.objective import Objective
from titan.parallel.world import World
from titan.train.restore import trainer_pieces

STEP = 4
"""Samples of a teacher step; `tests.label_logs` makes them."""


def found(step: int, blocks: int = 2) -> Next:
    """A step as it comes from the log, in several blocks."""
    share = STEP // blocks
    parts = [make_block(step, first, share) for first in range(0, STEP, share)]
    return Next(Commit(step, (0,), STEP, step / 10), parts, 100 + step, 3, step, None)


def ids_of(step: int) -> list[int]:
    return [100 * step + sample for sample in range(STEP)]


class Student:
    """A student without a model, on one rank, with its ledger."""

    def __init__(self, run: Path, size: int, start: int = 0, state: dict | None = None):
        self.account = LabelAccount(size, STEP)
        if state is None:
            self.account.begin(start)
        else:
            self.account.load(state)
        self.account.ledger = Ledger(run, "small")
        self.account.ledger.rewind(self.account.own_step, self.account.place)
        self.regrouper = Regrouper(size, self.account.place)
        self.learned: list[list[int]] = []

    def take(self, step: int, rest: bool = False) -> list[Batch]:
        self.regrouper.put(piece_of(found(step), 1.0))
        batches = list(self.regrouper.batches(rest))
        for batch in batches:
            self.account.consume(batch)
            self.learned.append(batch.sample_ids.tolist())
        return batches

    def jump(self, step: int) -> None:
        self.account.skip(Place(step, 0), "further behind")
        self.regrouper.jump(Place(step, 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3 * STEP + 1), st.integers(1, 8), st.integers(0, 2), st.integers(0, 7))
def test_every_sample_comes_once_in_order_and_a_restart_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, size: int, steps: int, start: int, stopped_at: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    student = Student(run, size, start)
    learned, last = [], start + steps
    for step in range(start + 1, last + 1):
        student.take(step, rest=step == last)
        if step == start + 1 + stopped_at:
            learned, state = list(student.learned), student.account.state()
            student.take(step + 1)  # in the ledger, and behind the checkpoint
            student = Student(run, size, state=state)
            for again in range(student.regrouper.place.step, step + 1):
                assert student.take(again, rest=again == last) == [], "what was in hand is less than a batch"
    learned += student.learned
    stream = [number for step in range(start + 1, last + 1) for number in ids_of(step)]
    assert learned == [stream[first : first + size] for first in range(0, len(stream), size)]
    assert student.account.place == (last + 1, 0)
    assert student.account.consumed == steps * STEP
    assert student.account.own_step == student.account.own_steps(last) == len(learned)
    entries = list(read_ledger(run / "ledger/small.jsonl"))
    assert [entry.own_step for entry in entries] == list(range(1, len(learned) + 1))
    assert student.account.label_bytes == sum(100 + step for step in range(start + 1, last + 1))


def test_with_the_teachers_batch_size_a_batch_is_a_step_as_it_was_read() -> None:
    regrouper, whole = Regrouper(STEP, Place(3, 0)), piece_of(found(3), 1.0)
    regrouper.put(whole)
    (batch,) = regrouper.batches(rest=False)
    tokens, labels, weight_B = batch.filled(STEP)
    assert batch.pieces == (whole,) and labels is whole.labels and weight_B.tolist() == [1.0] * STEP
    np.testing.assert_array_equal(tokens, whole.tokens_BS1)
    assert (batch.cross_entropy, batch.size_bytes, batch.lag) == (0.3, 103, 3)


def test_a_batch_over_steps_has_their_labels_and_the_mean_of_the_teachers_losses() -> None:
    regrouper = Regrouper(6, Place(1, 3))
    for step in (1, 2, 3):
        regrouper.put(piece_of(found(step), 1.0))
    (batch,) = regrouper.batches(rest=False)
    assert batch.sample_ids.tolist() == [103, *ids_of(2), 300]
    assert (batch.start, batch.end) == ((1, 3), (3, 1))
    assert batch.cross_entropy == pytest.approx((0.1 + 4 * 0.2 + 0.3) / 6)
    _, labels, _ = batch.filled(6)
    wanted = np.concatenate([piece_of(found(step), 1.0).labels.dense_BSV for step in (1, 2, 3)])[3:9]
    np.testing.assert_array_equal(labels.dense_BSV, wanted)


@pytest.mark.parametrize("size", [3, 4, 6, 11])
def test_what_a_jump_leaves_out_is_skipped_once_and_the_audit_comes_out_even(tmp_path: Path, size: int) -> None:
    """Also where a checkpoint lies between two jumps, and where less than a batch was in hand."""
    log = tmp_path / "labels/teacher"
    write_manifest(log, replace(MANIFEST, batch_size=STEP))
    Producer(log, samples=STEP).steps(1, 9).close()
    student = Student(tmp_path, size)
    student.take(1)
    student.take(2)
    student.jump(4)
    student.take(4)
    state = student.account.state()
    student.jump(6)
    student.take(6)
    student = Student(tmp_path, size, state=state)
    before = student.account.place
    for step in range(before.step, 5):
        student.take(step)
    student.jump(7)
    for step in (7, 8, 9):
        student.take(step, rest=step == 9)
    account = student.account
    assert account.place == (10, 0) and account.consumed + account.skipped == 9 * STEP
    assert account.own_step <= account.own_steps(9)
    folder = step_folder(tmp_path / "checkpoints/small", 9)
    folder.mkdir(parents=True)
    (folder / CHECKPOINT).write_bytes(encode_manifest({"state": account.state() | {"producer": "teacher"}}))
    result = audit(tmp_path)
    assert result.clean, result.findings
    assert result.students[0].consumed == account.consumed and result.students[0].skipped >= 2 * STEP


def test_old_labels_stay_as_long_as_a_checkpoint_may_ask_for_them(tmp_path: Path) -> None:
    log, checkpoints = tmp_path / "log", tmp_path / "checkpoints"
    folder = step_folder(checkpoints, 8)
    folder.mkdir(parents=True)
    (folder / CHECKPOINT).write_text("{}")
    PlaceTeller(log, "small", checkpoints, live=False, held=2)
    assert read_places(log) == {"small": 6}


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_steps_in_hand_are_never_more_than_said(size: int, step: int) -> None:
    samples, most = 0, 0
    for _ in range(2 * size):
        samples = (samples + step) % size
        most = max(most, -(-samples // step))
    student = {"name": "small", "model": {"layers": 1, "hidden": 8, "heads": 1, "ffn": 8}, "batch_size": size}
    values = {"run": {"name": "r", "steps": 99}, "data": {"sources": ["x"], "batch_size": step}, "students": [student]}
    config = check_config(values | {"teacher": {"model": student["model"]}})
    assert most <= config.steps_in_hand(config.students[0])
    assert (config.steps_in_hand(config.students[0]) == 0) == (step % size == 0)


def test_a_runs_plan_is_for_the_batch_of_each_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "devices.toml").write_text('nodes = [{ name = "n", kind = "fast", devices = 4, memory_gb = 1 }]\n')
    (tmp_path / "costs.toml").write_text('peaks = [{ kind = "fast", tflops = 1 }]\n')
    model = {"layers": 2, "hidden": 64, "heads": 2, "ffn": 128}
    role = {"model": model, "layout": {"planned": True, "mixed": False}}
    cluster = {"inventory": str(tmp_path / "devices.toml"), "profile": str(tmp_path / "costs.toml"), "device": "cpu"}
    config = check_config(
        {
            "run": {"name": "r", "steps": 9},
            "data": {"sources": ["x"], "batch_size": 8},
            "teacher": role,
            "students": [role | {"name": "small", "batch_size": 15}],
            "cluster": cluster,
        }
    )
    planned = plan_run(config, 512)
    for name, size in (("teacher", 8), ("small", 15)):
        found = planned.predictions[name]
        assert found.micro_batch_samples * found.layout.micro_batches == size
    alike = config.model_copy(update={"students": (config.students[0].model_copy(update={"batch_size": None}),)})
    layouts = {student.name: student.layout for student in planned.config.students}
    assert not find_mistakes(planned.config)
    at_once = LayoutSettings(stages=layouts["small"].stages, micro_batches=1)
    steps_s = [
        plan_run(with_layouts(one, {"small": at_once, "teacher": LayoutSettings()}), 512).predictions["small"].step_s
        for one in (alike, config)
    ]
    assert 1 < steps_s[1] / steps_s[0] <= 15 / 8
    show_plan(planned.config, Console(width=160), as_json=False)
    told = capsys.readouterr().out
    assert "s a step of 15 samples, as predicted" in told and told.count("of 15 samples") == 1


# --- a short batch in a layout that wants a whole one ---


def _learn(world: World, layout: LayoutSettings, batch: int, samples: int) -> list[tuple[str, torch.Tensor]]:
    """Two steps on `samples` samples, filled up to `batch`."""
    trainer = make_trainer(world, layout, batch=batch)
    for step in (1, 2):
        tokens, labels = tokens_of(step)[:samples], labels_of(step).rows(0, samples)
        short = Batch((Piece(step, 0, samples, 1.0, 0, 0, tokens, np.arange(samples), labels),))
        tokens, labels, weight_B = short.filled(batch)
        result = trainer.step(tokens, 1e-3, Objective(0.9), labels=labels, weight_B=weight_B)
        assert result.tokens == samples * LENGTH
    return [(str(piece.key), piece.values.clone()) for piece in trainer_pieces(trainer)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"pp": 2, "micro_batches": 2}, {"dp": 2}], ids=str)
def test_a_short_batch_filled_up_learns_what_a_batch_of_its_size_does(layout: dict[str, int]) -> None:
    want = dict(run_world(LayoutSettings(), _learn, LayoutSettings(), 6, 6)[0])
    settings = LayoutSettings.model_validate(layout)
    for rank in run_world(settings, _learn, settings, BATCH, 6):
        for name, value in rank:
            torch.testing.assert_close(value, want[name], rtol=0, atol=1e-5)
