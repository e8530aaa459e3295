"""A Ray that exists is joined with its token, or refused in one line; a local one has a token of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.hosts.ray_head import Head, ray_head
from tests.runs import RUN_TIMEOUT_S, titan, write_tiny_config
from titan.cluster.token import ask, check_token, local_token
from titan.config.environment import ray_address, ray_token
from titan.config.load import check_config
from titan.errors import ConfigError, PlatformError

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token of the one who runs the tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as made:
        yield made


def test_auto_is_what_ray_address_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_address("a:1") == "a:1" and ray_address("auto") == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "b:2")
    assert ray_address("a:1") == "a:1" and ray_address("auto") == "b:2"


def test_local_is_no_address(tmp_path: Path) -> None:
    model = {"layers": 1, "hidden": 32, "heads": 2, "ffn": 64}
    values = {"run": {"name": "a", "steps": 1}, "data": {"sources": [str(tmp_path)]}, "teacher": {"model": model}}
    assert check_config(values | {"cluster": {"address": "local"}}).cluster.address is None
    assert check_config(values | {"cluster": {"address": "a:1"}}).cluster.address == "a:1"


def test_a_token_is_taken_from_where_ray_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ray_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of home\n")
    assert ray_token() == "of home"
    file = tmp_path / "file"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH is .*No such file.*name the file"):
        ray_token()
    file.write_text("\n")
    with pytest.raises(ConfigError, match="which is empty"):
        ray_token()
    file.write_text("of file\n")
    assert ray_token() == "of file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of variable")
    assert ray_token() == "of variable"


def test_a_local_token_is_ours_alone_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the user")
    seen = set()
    for _ in range(2):
        with local_token():
            path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
            assert path.stat().st_mode & 0o777 == 0o600 and os.environ["RAY_AUTH_MODE"] == "token"
            token = ray_token()
            assert token is not None and len(token) == 64
            seen.add(token)
        assert not path.exists()
    assert len(seen) == 2
    assert os.environ["RAY_AUTH_TOKEN"] == "of the user" and "RAY_AUTH_MODE" not in os.environ
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with local_token():
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ and os.environ["RAY_AUTH_MODE"] == "disabled"


HOLDER = """
import time
from titan.cluster.token import local_token
with local_token():
    print("there", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_the_token_of_a_killed_process_goes_when_the_next_begins_and_that_of_a_living_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = [sys.executable, "-c", HOLDER]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "there\n"
        tokens = set(tmp_path.iterdir())
        assert len(tokens) == 2
        with local_token():
            assert tokens < set(tmp_path.iterdir())
        started[0].kill()
        started[0].wait(10.0)
        with local_token():
            assert len(tokens & set(tmp_path.iterdir())) == 1
    finally:
        for process in started:
            process.kill()
            process.wait(10.0)


@pytest.mark.slow
def test_a_head_lets_in_who_has_its_token_and_tells_others_apart(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(head.address, head.token) == "welcome"
    assert ask(head.address, None) == ask(head.address, "another") == "refused"
    with pytest.raises(PlatformError, match="wants a token, and there is none here; set RAY_AUTH_TOKEN_PATH"):
        check_token(head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    with pytest.raises(PlatformError, match="refuses our token"):
        check_token(head.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    check_token(head.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(PlatformError, match="RAY_AUTH_MODE is 'disabled'; unset it"):
        check_token(head.address)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_head_that_lets_anyone_in_is_refused_unless_that_is_wanted(
    disabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("titan.cluster.token.ask", lambda address, token: "welcome")
    if disabled:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        check_token("a:1")
        return
    with pytest.raises(PlatformError, match="lets anyone in who reaches it; start it with RAY_AUTH_MODE=token"):
        check_token("a:1")


@pytest.mark.slow
def test_a_wrong_token_is_one_line_and_a_right_one_trains(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_tiny_config(tmp_path / "work")
    config.write_text(re.sub(r"\[\[students\]\].*?(?=\[checkpoint\])", "", config.read_text(), flags=re.DOTALL))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    refused = titan("run", "tiny.toml", "--address", head.address, cwd=tmp_path / "work", timeout_s=30)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "refuses our token" in refused.stderr
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token_file))
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    arguments = ("run", "tiny.toml", "--set", "run.steps=6", "--address", "auto", "--resume")
    process = subprocess.Popen(
        [sys.executable, "-m", "titan.cli.main", *arguments], cwd=tmp_path / "work", text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    arguments_seen: set[str] = set()
    while process.poll() is None:
        arguments_seen |= {" ".join(other.info["cmdline"] or []) for other in psutil.process_iter(["cmdline"])}
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            continue
    out, err = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, err
    run = tmp_path / "work/runs/tiny"
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    written = [path for place in (run, head.token_file.parent / "ray") for path in place.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if head.token.encode() in path.read_bytes()]
    assert not [words for words in arguments_seen if head.token in words]
    assert head.token not in out + err
    again = titan("run", "tiny.toml", "--set", "run.steps=6", "--address", "auto", "--resume", cwd=tmp_path / "work")
    assert again.returncode == 0 and "nothing is left to do" in again.stdout, again.stderr
    both = titan("run", "tiny.toml", "--overwrite", "--resume", cwd=tmp_path / "work")
    assert both.returncode == 2 and "leave one of them out" in both.stderr
