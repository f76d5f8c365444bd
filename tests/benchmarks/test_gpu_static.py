"""What the compilers make of kernels: how it is read, and what is lacking is said."""

from collections import Counter
from pathlib import Path

import jax
import pytest

from dsv3_jax.quant.kernels.choice import OLDEST_JAX

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(
    jax.__version_info__[:2] < OLDEST_JAX, reason=f"JAX {jax.__version__} has no kernels; 0.11 does"
)

PTXAS = """ptxas info    : Compiling entry function 'body' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 163 registers, used 2 barriers, 1 bytes smem
"""
LOG = """  %c0 = arith.constant 69640 : i32 loc(#loc1)
  %c1 = arith.constant 1 : i32
  %0 = gpu.launch async blocks(%c1) dynamic_shared_memory_size %c0 {
  %c0 = arith.constant 7 : i32
"""
SASS = """.text.body:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
   -:-:2:Y:01        /*0230*/               @P0 IADD3 R7, P3, R78, 0x30, RZ
   -:-:4:Y:01        /*1a40*/               @!UP0 UTMALDG.4D [UR40], [UR12]
   -:-:1:Y:02        /*10280*/                  LDC.64 R2, c[0x0][0x198]
"""


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    texts = {"ptxas": PTXAS, "mlir-passes.log": LOG, "sass_ctrl": SASS, "ptx": ".maxntid 128, 1, 1"}
    for end, text in texts.items():
        (tmp_path / f"body_0.{end}").write_text(text)
    return tmp_path


def test_what_compilers_wrote_is_read(written: Path):
    import gpu_static

    found = gpu_static.read(written)
    operations = Counter(LDC=2, IADD3=1, UTMALDG=1)
    assert found == gpu_static.Compiled(163, 8, 69640, 128, operations)


def test_a_compiler_that_failed_is_one_line(written: Path, capsys: pytest.CaptureFixture):
    import gpu_static

    (written / "body_0.sass_ctrl").unlink()
    with pytest.raises(SystemExit) as end:
        gpu_static.read(written)
    assert end.value.code == 2
    assert "was not compiled, there is no .sass_ctrl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "expected"),
    [
        (168, 1000, 128, (3, "registers")),
        (169, 1000, 128, (2, "registers")),
        (64, 75 * 1024, 128, (3, "shared memory")),
        (64, 75 * 1024 + 1, 128, (2, "shared memory")),
        (128, 56 * 1024, 128, (4, "registers, shared memory")),
        (16, 1000, 512, (4, "threads")),
    ],
)
def test_blocks_that_fit_on_a_multiprocessor(registers, shared, threads, expected):
    """228 KiB of shared memory, of which each block has one more than its own."""
    import gpu_static

    assert gpu_static.Compiled(registers, 0, shared, threads, Counter()).blocks() == expected


@needs_kernels
def test_kernels_are_handed_over_as_bytes_of_mlir():
    from contenders import gpu_kernels
    from gpu_static import KERNELS

    assert tuple(gpu_kernels.TABLE) == KERNELS
    for name in KERNELS:
        (module,) = gpu_kernels.modules(name)
        assert module.startswith(b"ML\xefR"), name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--packages", "."], "error: --packages is .; allowed: a folder with jax_plugins/"),
        (["--keep", "."], "error: --keep is ., which exists; allowed: a new folder"),
        (["--kernels", "gemm"], "error: argument --kernels: invalid choice: 'gemm'"),
    ],
)
def test_mistakes_are_one_line(args, message: str, capsys: pytest.CaptureFixture):
    import gpu_static

    with pytest.raises(SystemExit) as end:
        gpu_static.main(args)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(message)


@needs_kernels
def test_what_cannot_be_written_or_found_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    import gpu_static

    plugin = tmp_path / gpu_static.PLUGIN
    plugin.parent.mkdir(parents=True)
    plugin.touch()
    (tmp_path / "file").touch()
    for more in (["--keep", str(tmp_path / "file" / "kept")], []):  # and no ptxas
        with pytest.raises(SystemExit) as end:
            gpu_static.main(["--packages", str(tmp_path), *more])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def test_what_is_lacking_is_said(capsys: pytest.CaptureFixture):
    import gpu_static

    gpu_static.main([])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped: ")
