"""Finding files and reading documents: what is taken, what is left out, what is refused and how."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from titan.data.readers import LARGE_FILE_BYTES, PIECE_BYTES, cut_file
from titan.data.sources import Document, iter_documents, list_files
from titan.errors import DataError


def documents(*sources: str | Path, field: str = "text") -> list[Document]:
    files = list_files([str(source) for source in sources])
    return [document for file in files for document in iter_documents(file, field) or ()]


def texts(*sources: str | Path, field: str = "text") -> list[str]:
    return [document.text for document in documents(*sources, field=field)]


def test_a_folder_gives_its_text_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/A.MD", "a/c.json", "a/.hidden.txt", ".git/x.txt", "d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a/A.MD", "a/z.py", "b.txt"]
    assert [Path(document.name) for document in documents(tmp_path)] == [
        tmp_path / "a/A.MD",
        tmp_path / "a/z.py",
        tmp_path / "b.txt",
    ]


def test_a_file_that_two_sources_name_is_read_once_whatever_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.json").write_text("b")
    one = list_files([str(tmp_path), str(tmp_path / "a.txt"), str(tmp_path / "*.json")])
    other = list_files([str(tmp_path / "*.json"), str(tmp_path / "a.txt"), str(tmp_path)])
    assert one == other
    assert [Path(file.path).name for file in one] == ["a.txt", "b.json"]


def test_two_stars_in_a_glob_reach_all_folders_below(tmp_path: Path) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "x/y/deep.log").write_text("deep")
    (tmp_path / "top.log").write_text("top")
    assert texts(tmp_path / "**/*.log") == ["top", "deep"]


def test_json_lines_and_parquet_give_one_document_a_row(tmp_path: Path) -> None:
    rows = ["first", "second\nline", "drittes \u00fc \U0001f600", ""]
    lines = "\n".join(json.dumps({"body": row, "other": 1}) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write(lines)
    pq.write_table(pa.table({"other": range(4), "body": rows}), tmp_path / "c.parquet", row_group_size=2)
    assert texts(tmp_path, field="body") == rows * 3
    names = [document.name.removeprefix(f"{tmp_path}/") for document in documents(tmp_path, field="body")]
    assert names[:2] == ["a.jsonl#1", "a.jsonl#2"]
    assert names[-1] == "c.parquet#3"


def test_the_built_in_source_is_ten_megabytes_of_clean_text() -> None:
    found = documents("python-stdlib")
    size = sum(len(document.text.encode()) for document in found)
    assert 5e6 < size < 30e6
    names = [document.name for document in found]
    assert any(name.endswith("/argparse.py") for name in names)
    assert any("topics.py#" in name for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)


@pytest.mark.parametrize("line", ["word " * 20 + "\n", "word " * 20 + "\n\n", "\u00e9\u4e2d\U0001f600", "x", "\r\n"])
def test_a_large_file_becomes_pieces_that_add_up_to_it(tmp_path: Path, line: str) -> None:
    text = line * (LARGE_FILE_BYTES // len(line.encode()) + 1000)
    path = tmp_path / "large.txt"
    path.write_bytes(text.encode())
    pieces = texts(path)
    assert "".join(pieces) == text
    assert len(pieces) >= LARGE_FILE_BYTES // PIECE_BYTES
    assert all(PIECE_BYTES // 2 <= len(piece.encode()) <= PIECE_BYTES for piece in pieces[:-1])
    if "word" in line:
        assert all(piece.endswith(line) for piece in pieces)


def test_a_cut_never_splits_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for shift in range(8):
        text = "a" * shift + "\U0001f600\u00e9" * 50
        path.write_bytes(text.encode())
        assert "".join(cut_file(path, piece_bytes=16)) == text


def test_a_binary_file_is_left_out_of_a_folder_and_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    for name, content in {
        "nul.txt": b"a\0b",
        "latin.txt": b"caf\xe9",
        "large.txt": b"a" * LARGE_FILE_BYTES + b"\n\xff",
        "cut.txt": "\u4e2d".encode() * LARGE_FILE_BYTES + b"\xe4",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path) == ["good"]
        with pytest.raises(DataError, match=rf"data.sources: .*{name} is not UTF-8 text; convert or remove it"):
            texts(tmp_path / name)


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.sources: .*none.txt' does not exist .*; correct the path"):
        list_files([str(tmp_path / "none.txt")])
    with pytest.raises(DataError, match=r"\*.none' matches no text.*; correct the pattern"):
        list_files([str(tmp_path / "*.none")])
    (tmp_path / "only.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"matches no text.*; name files of other endings outright"):
        list_files([str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{oops}", r"line 2 is not JSON: .*; correct or remove the line"),
        (b'{"text": "\xff"}', r"line 2 is not JSON: .*"),
        (b"[1]", r"line 2 is not a JSON object"),
        (b'{"body": "x", "n": 1}', r"line 2 has no field 'text'; its fields are body, n"),
        (b'{"text": null}', r"line 2: 'text' is null, not a string"),
        (b'{"text": 3}', r"line 2: 'text' is int, not a string"),
        (rb'{"text": "\ud800"}', r"line 2: 'text' has half a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"data.*{path} {complaint}") as caught:
        documents(path)
    assert "\n" not in str(caught.value)


def test_a_gzip_file_that_is_cut_short_or_none_at_all_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=rf"{path} is damaged after line \d+: .*; replace it"):
        documents(path)
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DataError, match=rf"{path} is damaged after line 0: .*; replace it"):
        documents(path)


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x", None], "number": [1, 2]}), path)
    with pytest.raises(DataError, match=rf"data.text_field: {path} has no column 'text'; its columns are body, number"):
        documents(path)
    with pytest.raises(DataError, match=rf"{path} row 1: 'body' is null, not a string"):
        documents(path, field="body")
    with pytest.raises(DataError, match=rf"{path} row 0: 'number' is int, not a string"):
        documents(path, field="number")
    whole = path.read_bytes()
    for broken in (b"", b"PAR1" * 5, whole[:-5], whole[:8] + b"\xff" * 40 + whole[48:]):
        path.write_bytes(broken)
        with pytest.raises(
            DataError, match=rf"data.sources: {path} cannot be read as Parquet from row 0: .*; replace it"
        ):
            documents(path, field="body")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    path.chmod(0)
    with pytest.raises(DataError, match=rf"data.sources: cannot read {path}: Permission denied"):
        documents(path)
