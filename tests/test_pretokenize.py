"""Folders of tokens train as their text does, bit for bit; bad input is one line and exit code 2;
what did not finish is not taken for a folder.
"""

import json
import resource
import shlex
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data import held_out, shards, sources, tokenised
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.data.documents import Document
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.pretokenize import main
from tests.commands import help_of

ROOT = Path(__file__).parents[1]
VOCAB = 320


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Some files of every text kind but Parquet."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": f"def f{i}(x):\n    return [\n{i}\n]\n" * 3}) for i in range(20)]
    (folder / "b.jsonl").write_text("\n".join(lines))
    for i in range(8):
        (folder / f"a{i}.py").write_text(f"class A{i}:\n    '''你好'''\n" * (i + 1))
    return folder


def build(cfg: DataConfig) -> Corpus:
    return build_corpus(cfg, VOCAB, 5, lambda line: None)


def assert_same_rows(found: Rows, expected: Rows, count: int) -> None:
    assert len(found) == len(expected)
    for index in range(count):
        row, wanted = found[index], expected[index]
        np.testing.assert_array_equal(row.tokens_T, wanted.tokens_T)
        np.testing.assert_array_equal(row.labels_T, wanted.labels_T)
        np.testing.assert_array_equal(row.segments_T, wanted.segments_T)
        assert found.names_of(index) == expected.names_of(index)


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ({}, "*"),
        ({"split_rate": 0.5}, "*"),
        ({"validation_fraction": 0.3}, "*"),
        ({}, "a7.py"),  # one document, which is cut
        ({"validation_fraction": 0.98}, "a[67].py"),
    ],
)
def test_training_on_the_folder_is_training_on_the_text(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict, pattern: str
):
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (500,))
    out = tmp_path / "tokens"
    cfg = DataConfig(source=f"{text}/{pattern}", length=24, fim_rate=0.5, isolate=True, **flags)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    main(["--source", cfg.source, "--out", str(out), "--vocab-size", str(VOCAB), *options])
    expected, found = build(cfg), build(replace(cfg, source=str(out)))
    assert found.tokenizer.content_hash == expected.tokenizer.content_hash
    assert found.content_hash == expected.content_hash
    assert_same_rows(found.train, expected.train, 2 * len(expected.train))
    assert_same_rows(found.validation, expected.validation, len(expected.validation))


def test_the_last_line_says_how_to_train(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "tokens"
    args = ["--source", f"{text}/*", "--out", str(out), "--vocab-size", str(VOCAB)]
    assert not main([*args, "--split-rate", "0.25"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"{out}: 28 documents, ")
    size = shards.TokenFolder(out).tokenizer.vocab_size
    options = f"--data.source {out} --model.vocab-size {size} --data.split-rate 0.25"
    assert last.endswith(f"train on it with {options}")


def test_the_options_of_the_last_line_are_a_shells(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "my $tokens"
    main(["--source", f"{text}/*", "--out", str(out), "--vocab-size", str(VOCAB)])
    options = shlex.split(capsys.readouterr().out.strip().splitlines()[-1].rpartition(" with ")[2])
    assert options[:2] == ["--data.source", str(out)]


def test_a_given_tokenizer_goes_into_the_folder(text: Path, tmp_path: Path):
    tokenizer = train_tokenizer(["abc"], 300)
    tokenizer.save(tmp_path / "mine.json")
    options = ["--tokenizer", str(tmp_path / "mine.json"), "--out", str(tmp_path / "tokens")]
    main(["--source", f"{text}/*", *options])
    folder = shards.TokenFolder(tmp_path / "tokens")
    assert folder.tokenizer.content_hash == tokenizer.content_hash


def refused(args: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_bad_input_is_one_line_and_leaves_no_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "tokens"
    (text / "c.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    (text / "bad.txt").write_bytes(b"ab\xff")
    for options, expected in [
        ([f"{text}/c.jsonl"], "c.jsonl line 2: field 'text' is of type int"),
        ([f"{text}/c.jsonl", "--text-field", "body"], "c.jsonl line 1 has no field 'body'"),
        ([f"{text}/bad.txt"], "byte 0xff at offset 2"),
        ([f"{text}/none*"], f"error: --source '{text}/none*': no file matches"),
        (
            [f"{text}/a*", "--vocab-size", "99"],
            "--vocab-size is 99; allowed with a trained",
        ),
        ([f"{text}/a*", "--vocab-size", str(10**20)], f"--vocab-size is {10**20}; allowed"),
        ([f"{text}/a*", "--tokenizer", "gone.json"], "tokenizer gone.json: cannot read it"),
        (["~nosuchuser/a"], "error: --source ~nosuchuser/a: no home folder is known for ~nosuch"),
        ([f"{text}/a*", "--tokenizer", "~nosuchuser/a"], "tokenizer ~nosuchuser/a: no home folder"),
        ([f"{text}/a*", "--split-rate", "2"], "--split-rate is 2.0; allowed: 0 to 1"),
        ([f"{text}/a*", "--bad-utf8", "ignore"], "--bad-utf8"),
    ]:
        assert expected in refused(["--out", str(out), "--source", *options], capsys)
        assert not out.exists()
    main(["--out", str(out), "--source", f"{text}/bad.txt", "--bad-utf8", "replace"])


def test_an_output_that_holds_something_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    source = ["--source", f"{text}/*"]
    message = refused([*source, "--out", str(tmp_path / "full")], capsys)
    assert f"--out {tmp_path / 'full'} holds mine; allowed: a new or an empty folder" in message
    message = refused([*source, "--out", str(tmp_path / "file")], capsys)
    assert f"--out {tmp_path / 'file'} is a file; allowed: a new or an empty folder" in message
    assert "--out" in refused(source, capsys)


def test_tokens_are_no_text(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "tokens"
    main(["--source", f"{text}/*", "--out", str(out)])
    message = refused(["--source", str(out), "--out", str(tmp_path / "again")], capsys)
    assert f"--source {out} holds tokens already; allowed: text" in message


@pytest.mark.parametrize("is_new", [True, False])
def test_an_interrupted_command_leaves_the_folder_as_it_was(
    text: Path, tmp_path: Path, is_new: bool, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "tokens"
    if not is_new:
        out.mkdir()
    original, added = shards.ShardWriter.add, []

    def add(self: shards.ShardWriter, *document: object) -> None:
        original(self, *document)
        added.append(document)
        if len(added) == 9:
            assert list(out.iterdir())
            raise KeyboardInterrupt

    monkeypatch.setattr(shards.ShardWriter, "add", add)
    args = ["--source", f"{text}/*", "--out", str(out), "--vocab-size", str(VOCAB)]
    with pytest.raises(KeyboardInterrupt):
        main(args)
    assert out.exists() is not is_new
    assert is_new or not list(out.iterdir())


def test_two_commands_cannot_write_one_folder(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    out, seen = tmp_path / "tokens", []
    args = ["--source", f"{text}/*", "--out", str(out), "--vocab-size", str(VOCAB)]
    original_survey, original_add = held_out.survey, shards.ShardWriter.add

    def second() -> None:
        before = sorted(out.iterdir())
        seen.append(refused(args, capsys))
        assert sorted(out.iterdir()) == before

    def survey(*given: object) -> held_out.Survey:
        monkeypatch.setattr(held_out, "survey", original_survey)
        second()  # nothing is written yet
        return original_survey(*given)

    def add(self: shards.ShardWriter, *document: object) -> None:
        monkeypatch.setattr(shards.ShardWriter, "add", original_add)
        original_add(self, *document)
        second()

    monkeypatch.setattr(held_out, "survey", survey)
    monkeypatch.setattr(shards.ShardWriter, "add", add)
    main(args)
    assert seen == [f"error: --out {out}: another process is writing there"] * 2
    folder = shards.TokenFolder(out)
    assert {path.name for path in out.iterdir()} == {shards.MANIFEST, *folder.manifest.files}


def test_a_failed_command_removes_nothing_that_it_has_not_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "tokens"
    original = shards.ShardWriter.add

    def add(self: shards.ShardWriter, *document: object) -> None:
        original(self, *document)
        (out / "mine").touch()
        (out / "folder").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.ShardWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        main(["--source", f"{text}/*", "--out", str(out), "--vocab-size", str(VOCAB)])
    assert {path.name for path in out.iterdir()} == {"mine", "folder"}


def test_a_full_disk_is_one_line_and_leaves_no_folder(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (text / "large.txt").write_text("0123456789\n" * 20_000)
    out = tmp_path / "tokens"
    train_tokenizer(["ab"], 262).save(tmp_path / "bytes.json")
    args = ["--source", f"{text}/*", "--tokenizer", str(tmp_path / "bytes.json")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = refused([*args, "--out", str(out)], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {out / 'shard-00000.array_record'}: " in message
    assert "File too large" in message
    assert not out.exists()


def test_text_that_changes_meanwhile_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    original = tokenised.encode_documents

    def change_then_encode(*args: object) -> Iterator:
        (text / "b.jsonl").write_text('{"text": "another"}')
        return original(*args)

    monkeypatch.setattr(tokenised, "encode_documents", change_then_encode)
    args = ["--source", f"{text}/*", "--out", str(tmp_path / "tokens")]
    assert "--source has changed while it was read" in refused(args, capsys)


def test_documents_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenised, "_CHUNK", 4)
    alive, most = set(), [0]

    def documents(*args: object) -> Iterator[Document]:
        for number in range(200):
            document = Document(str(number), f"document number {number}\n")
            reference = weakref.ref(document, alive.discard)
            alive.add(reference)
            most[0] = max(most[0], len(alive))
            yield document
            del document

    monkeypatch.setattr(sources, "iterate_documents", documents)
    main(["--out", str(tmp_path / "tokens")])
    assert shards.TokenFolder(tmp_path / "tokens").manifest.documents == 200
    assert most[0] <= 4 + 4  # a chunk, and what passes from hand to hand


def test_help_loads_no_jax():
    shown, loaded = help_of("dsv3_jax.pretokenize")
    assert loaded.isdisjoint({"jax", "jaxlib", "grain", "numpy", "array_record", "pyarrow"})
    options = ("out", "source", "tokenizer", "vocab-size", "split-rate", "text-field", "bad-utf8")
    for name in options:
        assert f"--{name}" in shown
