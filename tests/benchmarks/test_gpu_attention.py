"""The benchmark of attention on a GPU: errors first, and what cannot run is said."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_this_projects_attention_is_checked_and_timed_anywhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    import gpu_attention
    from contenders import attention_cases

    broken = {"chunks": attention_cases.VARIANTS["chunks"], "none": lambda q, k, v: 1 / 0}
    monkeypatch.setattr(attention_cases, "VARIANTS", broken)
    gpu_attention.main(["--rows", "1", "--length", "128", "--heads", "1", "--turns", "1"])
    _, errors, left_out, times = capsys.readouterr().out.splitlines()
    assert errors.startswith("chunks: relative errors of o, dq, dk, dv ")
    assert all(1e-4 < float(error) < 6e-3 for error in errors.split()[-4:])
    assert left_out == "none: left out, ZeroDivisionError: division by zero"
    assert times.startswith("1 x 128 x 1 heads, chunks: forward ")


def test_a_cpu_is_not_kept_busy(capsys: pytest.CaptureFixture):
    import gpu_attention

    gpu_attention.main([])
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "skipped: JAX finds no GPU; a CPU takes --length up to 512"


def test_a_wrong_attention_shows():
    from contenders import attention_cases as cases

    chunks = cases.VARIANTS["chunks"]
    wrong = cases.with_gradients(lambda q, k, v: chunks(q, k, v * 1.02))
    args = cases.inputs(1, 128, 1)
    found = cases.relative_error(wrong(*args)[0], cases.exact(args)[0])
    assert found > 1.5e-2


@pytest.mark.parametrize("option", ["--rows", "--heads", "--length", "--turns"])
def test_sizes_that_cannot_be_are_one_line(option: str, capsys: pytest.CaptureFixture):
    import gpu_attention

    with pytest.raises(SystemExit) as end:
        gpu_attention.main([option, "0"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {option} is 0; allowed: at least ")
