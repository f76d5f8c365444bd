"""Keys come from a file or the environment; no message has one in it."""

from pathlib import Path

import pytest

from dsv3_jax.server.keys import VARIABLE, Keys, read_keys


def test_a_key_opens_and_nothing_else_does():
    keys = Keys(["one", "two"])
    assert keys
    assert not Keys()
    for sent in (b"Bearer one", b"bearer two", b"BEARER  two "):
        assert keys.open(sent)
    for sent in (
        b"",
        b"one",
        b"Bearer",
        b"Bearer onetwo",
        b"Bearer on",
        b"Basic one",
        b"Bearer \xff",
    ):
        assert not keys.open(sent)
    assert not Keys().open(b"Bearer one")
    assert "one" not in repr(vars(keys))


def test_a_file_has_one_a_line(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "elsewhere")
    file = tmp_path / "keys"
    file.write_text("# ours\n\n one \ntwo\r\n")
    keys = read_keys(file)
    assert [
        keys.open(f"Bearer {key}".encode()) for key in ("one", "two", "elsewhere", "# ours")
    ] == [
        True,
        True,
        False,
        False,
    ]


def test_the_environment_has_them_between_commas(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not read_keys(None)
    monkeypatch.setenv(VARIABLE, " one, #two ,")
    assert read_keys(None).open(b"Bearer #two")
    for empty in ("", " , "):  # whoever sets it does not mean to leave the server open
        monkeypatch.setenv(VARIABLE, empty)
        with pytest.raises(ValueError, match=f"{VARIABLE} holds no key; allowed: one or more"):
            read_keys(None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n# none\n", "holds no key; allowed: one or more"),
        ("gehéim".encode(), "key 1 has characters beyond ASCII, or spaces"),
        (b"ok\ntwo words", "key 2 has characters beyond ASCII, or spaces"),
        (b"a\xffb", "byte 1 is no UTF-8"),
    ],
)
def test_what_can_be_no_key_is_refused_without_being_told(tmp_path: Path, content, said):
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as raised:
        read_keys(file)
    for secret in ("gehéim", "words", "a\ufffdb"):
        assert secret not in str(raised.value)
