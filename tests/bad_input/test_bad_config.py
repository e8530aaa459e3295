"""Mistakes in settings and clusters, row by row: one line each with its remedy, never a traceback, nothing lost."""

import socket

import pytest

from tests.bad_input.places import Place, Row, bad_setting, bad_stages, check_row, rewrite, sets

CONFIG = [
    bad_setting("a misspelt setting", "run.stepz=3", "run.stepz is no setting", "did you mean steps?"),
    bad_setting("a setting of another section", "teacher.heads=2", "did you mean teacher.model.heads?"),
    bad_setting("a misspelt setting of a student", "students.early.start.laed=1", "students.early.start.laed", "lead?"),
    bad_setting("text for a number", "run.steps=many", "run.steps is 'many'", "want a whole number"),
    bad_setting("a fraction for a whole number", "data.batch_size=2.5", "data.batch_size is 2.5", "whole number"),
    bad_setting("a number for text", "run.name=5", "run.name is 5", "want text, in quotes"),
    bad_setting("text for a list", "data.sources=abc", "data.sources is 'abc'", "want a list"),
    bad_setting("a list without entries", "data.sources=[]", "data.sources is []", "want at least 1"),
    bad_setting("a number for yes or no", "teacher.model.tied=1", "teacher.model.tied is 1", "true or false"),
    bad_setting("a number that is not finite", "teacher.optimizer.learning_rate=inf", "inf", "want a finite number"),
    bad_setting("a number that is no number", "labels.temperature=nan", "labels.temperature is nan", "finite"),
    bad_setting("no steps", "run.steps=0", "run.steps is 0", "want greater than 0"),
    bad_setting("a word that is no choice", "teacher.precision=fp8", "'fp8'", "'fp32', 'bf16' or 'fp16'"),
    bad_setting("a value for a section", "teacher=3", "teacher is 3", "want a section: [teacher]"),
    bad_setting("one student where a list belongs", "students={}", "begin each student with a line [[students]]"),
    bad_setting("a name that is a path", "run.name=../up", "run.name is '../up'", "use letters, digits"),
    bad_setting("an empty name", "run.name=", "run.name is ''", "use letters, digits"),
    bad_setting("a vocabulary without room for bytes", "data.vocab_size=100", "100", "greater than or equal to 300"),
    bad_setting("heads that do not divide", "students.late.model.hidden=33", "of heads (2), got 33; try 32"),
    bad_setting("an odd width of heads", "teacher.model.hidden=66", "must be even", "got 66 / 2"),
    bad_setting("kv_heads that do not divide", "students.late.model.kv_heads=3", "kv_heads must divide heads (2)"),
    bad_setting("fewer layers than stages", "students.late.layout.pp=2", "late.layout.pp is 2", "more stages than"),
    bad_setting("layers that do not add up", "students.early.layout.layers=[1,2]", "adds up to 3", "model has 2"),
    bad_setting("a list of layers too short", "students.early.layout.layers=[2]", "1 entries, pp is 2", "a stage"),
    bad_setting("tp that does not divide", "teacher.layout.tp=3", "teacher.layout.tp is 3", "at most 2"),
    bad_setting("an optimizer cut in odd parts", "teacher.layout.shard=3", "shard is 3; use 1 or dp (1)"),
    bad_setting(
        "sequence_parallel on a length that does not divide",
        "teacher.layout.sequence_parallel=true data.sequence_length=33",
        "data.sequence_length (33)",
        "use 32",
    ),
    bad_setting("micro_batches that do not divide", "teacher.layout.micro_batches=3", "is 3", "use 2 or 4"),
    bad_setting(
        "micro_batches of a huge batch",
        "data.batch_size=1000000007 teacher.layout.micro_batches=3 students.early.layout.micro_batches=1",
        "use 1 or 1000000007",
    ),
    bad_setting("more replicas than samples", "teacher.layout.dp=16", "dp is 16", "a micro-batch has 8 samples"),
    bad_setting(
        "tp beside stages", "teacher.layout.stages=[{layers=2}]", "layout.tp is 2 beside stages", "leave it out"
    ),
    bad_stages("no stages", "[]", "layout.stages is []", "want at least 1"),
    bad_stages("a stage without layers", "[{layers=0}]", "stages.0.layers", "want greater than 0"),
    bad_stages("a stage that does not say its layers", "[{tp=1}]", "stages.0.layers is missing"),
    bad_stages("stages that leave a gap", "[{layers=1},{layers=1}]", "stages have 2 layers, the model has 1"),
    bad_stages("a share too few", "[{layers=1,dp=2,shares=[3]}]", "stages.0.shares has 1 entries, dp is 2"),
    bad_stages("a share of nothing", "[{layers=1,dp=2,shares=[1,9]}]", "stages.0.shares is [1, 9]", "8 samples"),
    bad_stages("a replica on no island", "[{layers=1,dp=3,islands=[1,1]}]", "stages.0.islands adds up to 2, dp is 3"),
    bad_stages("state shared by islands", "[{layers=1,dp=2,shard=2,islands=[1,1]}]", "stages.0.shard is 2", "use 1"),
    bad_stages("tp of a stage that does not divide", "[{layers=1,tp=3}]", "stages.0.tp is 3", "power of two"),
    bad_stages("chunks that are not listed", "[{layers=[1,1]}]", "stages.0.layers has 2 entries", "chunks is 1"),
    bad_setting(
        "fp16 in one stage only",
        "students.late.model.layers=2 students.late.layout.stages=[{layers=1,precision='fp16'},{layers=1}]",
        "late.layout.stages mix fp16 with fp32",
    ),
    bad_setting(
        "more chunks than layers",
        "students.early.layout.chunks=2 students.early.layout.schedule=interleaved",
        "2 x 2, more than",
        "fewer chunks",
    ),
    bad_setting(
        "an interleaved schedule of one chunk", "students.early.layout.schedule=interleaved", "1 chunks", "use '1f1b'"
    ),
    bad_setting(
        "micro_batches that do not go round",
        "teacher.model.layers=4 teacher.layout.pp=2 teacher.layout.schedule=interleaved teacher.layout.chunks=2 "
        "teacher.layout.micro_batches=1",
        "micro_batches is 1; the interleaved schedule wants a multiple of the stages (2), use 2",
    ),
    bad_setting("two students of one name", "students.early.name=late", "'late' is used 2 times"),
    bad_setting("a student named teacher", "students.late.name=teacher", "taken by the teacher", "choose another"),
    bad_setting("a start by step and by lead", "students.late.start.step=3", "step (3) and lead", "keep one"),
    bad_setting("a start beyond the end", "students.early.start.step=40", "start.step is 40, run.steps is 40"),
    bad_setting(
        "a loss of shares that are not the teacher's",
        "labels.codec=random students.late.distill.loss=mse",
        "distill.loss is 'mse'",
        "'forward_kl'",
    ),
    bad_setting("draws that nobody makes", "labels.codec=top_k labels.draws=3", "labels.draws is set", "leave it out"),
    bad_setting(
        "a loss that draws bias", "students.late.distill.loss=jsd", "students.late.distill.loss is 'jsd'", "top_k"
    ),
    bad_setting("labels larger than the vocabulary", "labels.top_k=600", "top_k is 600", "vocab_size (512)"),
    bad_setting("a batch of no samples", "students.late.batch_size=0", "late.batch_size is 0", "want greater than 0"),
    bad_setting("a batch of less than none", "students.late.batch_size=-3", "late.batch_size is -3", "greater than 0"),
    bad_setting("a batch of a half", "students.late.batch_size=2.5", "late.batch_size is 2.5", "whole number"),
    bad_setting(
        "micro_batches that do not divide a student's own batch",
        "students.early.batch_size=9 students.early.layout.micro_batches=4",
        "early.layout.micro_batches is 4, which does not divide students.early.batch_size (9); use 3 or 9",
    ),
    bad_setting(
        "more replicas than samples in a student's own batch",
        "students.late.batch_size=3 students.late.layout.dp=4",
        "dp is 4, but a micro-batch has 3 samples (students.late.batch_size 3 / 1 micro-batches)",
        "a larger batch",
    ),
    bad_setting(
        "a share of nothing in a student's own batch",
        "students.late.batch_size=3 students.late.layout.stages=[{layers=1,dp=2,shares=[7,1]}]",
        "stages.0.shares is [7, 1]",
        "students.late.batch_size 3",
    ),
    bad_setting(
        "another batch for a student that teaches",
        "students.early.batch_size=16 students.late.teacher=early",
        "students.early.batch_size is 16, but it teaches others",
        "leave it out, for 8",
    ),
    bad_setting(
        "another batch for a student that learns features",
        "students.late.batch_size=16 students.late.distill.features.value=1",
        "students.late.batch_size is 16, but distill.features come step by step",
        "leave it out, for 8",
    ),
    bad_setting(
        "batches over steps of hidden states",
        "students.late.batch_size=3 labels.codec=hidden",
        "students.late.batch_size is 3, but labels of codec 'hidden'",
        "use a divisor of data.batch_size (8)",
    ),
    bad_setting(
        "a batch of more than there is",
        "students.early.batch_size=300",
        "students.early.batch_size is 300, more than all samples from its start on (280)",
        "leave it out",
    ),
    bad_setting(
        "a final rate without a schedule",
        "teacher.optimizer.schedule=constant teacher.optimizer.final_fraction=0.5",
        "final_fraction is 0.5, but schedule is 'constant'; leave it out",
    ),
    bad_setting("an address that is none", "cluster.address=somewhere", "'somewhere'", "want host:port"),
    bad_setting("an address with an impossible port", "cluster.address=a:99999", "'a:99999'", "want host:port"),
    bad_setting(
        "a dashboard for a cluster that is joined",
        "cluster.address=a:6379 cluster.dashboard_port=8265",
        "dashboard_port is 8265",
        "leave it out",
    ),
    bad_setting("an impossible port", "cluster.dashboard_port=70000", "70000", "less than or equal to 65535"),
    bad_setting("a path with a NUL", 'run.dir="a\\u0000b"', "run.dir is 'a\\x00b'", "no NUL"),
    bad_setting("bytes that are no text", "run.name=a\udcff", "no Unicode text"),
    bad_setting("--set without a value", "run.steps", "--set run.steps: want a.b=value"),
    bad_setting("--set without a name", "=3", "--set =3: want a.b=value"),
    bad_setting("--set with an empty part", "run..steps=3", "want a.b=value"),
    bad_setting("--set into a value", "run.name.x=3", "'name' is a value, not a section"),
    bad_setting("--set of a student that is not there", "students.nobody.model.layers=3", "there are early, late"),
    bad_setting("--set of no particular student", "students.model=3", "say which one"),
    Row(
        "several mistakes at once",
        sets("run.stepz=1", "run.steps=few", "teacher.layout.tp=two", "students.late.model.width=3"),
        ("run.stepz", "run.steps is 'few'", "teacher.layout.tp is 'two'", "students.late.model.width"),
        exit_code=2,
        mistakes=4,
    ),
    Row(
        "several contradictions at once",
        sets("teacher.layout.tp=4", "students.late.layout.pp=4", "students.early.start.step=99"),
        ("teacher.layout.tp is 4", "students.late.layout.pp is 4", "students.early.start.step is 99"),
        exit_code=2,
        mistakes=3,
    ),
    Row("several bad --set at once", sets("a", "b"), ("--set a:", "--set b:"), exit_code=2, mistakes=2),
    Row(
        "a setting left out",
        "run tiny.toml",
        ("run.steps is missing and has no default; add it",),
        lambda place: rewrite(place.folder / "tiny.toml", "steps = 40\n", ""),
        exit_code=2,
    ),
    Row("no TOML", "run a.toml", ("a.toml is no TOML", "line 2"), lambda p: p.write("a.toml", "[run]\n= 3\n"), 2),
    Row(
        "a list a thousand deep",
        "run a.toml",
        ("a.toml is no TOML",),
        lambda place: place.write("a.toml", "a = " + "[" * 5000 + "]" * 5000),
        2,
    ),
    Row(
        "a number of 5000 digits",
        "run a.toml",
        ("a.toml is no TOML",),
        lambda place: place.write("a.toml", "a = " + "9" * 5000),
        2,
    ),
    Row("a binary file for a config", "run a", ("no UTF-8", "give the path"), lambda p: p.write("a", b"\xff\xfe\0"), 2),
    Row("a config that is not there", "run no.toml", ("cannot read no.toml", "give the path"), exit_code=2),
    Row("a folder for a config", "plan runs", ("cannot read runs", "Is a directory"), exit_code=2),
    Row("an unknown option", "run tiny.toml --fast", ("No such option: --fast", "--help"), exit_code=2),
    Row("an unknown command", "train tiny.toml", ("No such command 'train'", "--help"), exit_code=2),
    Row("a command without its file", "run", ("Missing argument 'RUN.toml'", "--help"), exit_code=2),
    Row(
        "ranks that are not there",
        sets("teacher.layout.dp=64", "data.batch_size=64"),
        ("layouts need 131 ranks", "there is room for", "use smaller layouts"),
        exit_code=2,
    ),
]


def take_port(place: Place) -> None:
    """A socket that listens and never says a word."""
    taken = place.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    place.words["port"] = str(taken.getsockname()[1])
    place.patch.setattr("titan.cluster.preflight.CONNECT_TIMEOUT_S", 0.2)


CLUSTER = [
    Row(
        "a dashboard port that is taken",
        sets("cluster.dashboard_port={port}"),
        ("cluster.dashboard_port is", "Address already in use", "choose another"),
        take_port,
    ),
    Row(
        "an address where nobody listens",
        sets("cluster.address=127.0.0.1:9"),
        ("cluster.address is 127.0.0.1:9", "Connection refused", "ray start --head"),
    ),
    Row(
        "an address of something that is no Ray",
        sets("cluster.address=127.0.0.1:{port}"),
        ("cluster.address is 127.0.0.1:", "no answer within", "leave it out for a local Ray"),
        take_port,
    ),
    Row(
        "a device that is not there",
        sets("cluster.device=cuda"),
        ("cluster.device is 'cuda'", "set cluster.device to 'auto' or 'cpu'"),
        lambda place: place.patch.setattr("titan.cluster.session._may_have_accelerator", lambda: False),
    ),
]


ROWS = [*CONFIG, *CLUSTER]


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
def test_a_mistake_is_one_line_and_loses_nothing(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    check_row(row, place, capsys)
