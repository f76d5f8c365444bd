"""What the compilers make of this project's kernels for Hopper GPUs, on a machine without one.

    python benchmarks/gpu_static.py --packages FOLDER [--kernels retile ...] [--keep FOLDER]

Each kernel is lowered for CUDA at a size of V3 and compiled for sm_90a by JAX's own plug-in. Told
are its registers, what ptxas spilled, the shared memory of a block of the grid, how many such
blocks a multiprocessor holds at a time and what forbids one more, and its machine instructions, for
passes also by the 128 elements that a thread has of a tile. These are reasons, not times.

FOLDER is made once, with the version of JAX that runs this (530 MB):
    pip install --no-deps --target FOLDER jax-cuda13-pjrt==VERSION \\
        nvidia-cuda-nvcc nvidia-cuda-nvdisasm
A C compiler, `cc`, makes a stand-in for the driver that says "sm_90".

Expected: a line for each kernel, in half a minute. Without FOLDER, or with JAX before 0.11, it says
so in one line and ends.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

from contenders import command_line

from dsv3_jax.cli import fail, run, user_errors

KERNELS = (
    "rows",
    "columns",
    "both",
    "weight",
    "retile",
    "swiglu_rows",
    "swiglu_columns",
    "multiply_rows",
    "multiply_columns",
    "multiply_bf16",
    "multiply_bf16_transposed",
    "multiply_bf16_columns",
)
# A multiprocessor's, of compute capability 9.0.
REGISTERS, SHARED_BYTES, THREADS = 65_536, 228 * 1024, 2048
RESERVED_BYTES = 1024  # of shared memory, for each block of the grid
PLUGIN = "jax_plugins/xla_cuda13/xla_cuda_plugin.so"

DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0;  /* compute capability, major and minor */
  return 0;
}
"""
# The library has no driver to load what it compiled, and crashes then: hence a process of its own.
COMPILE = """
import ctypes, sys
module = open(sys.argv[2], "rb").read()
ctypes.CDLL(sys.argv[1]).MosaicGpuCompile(module, len(module))
"""


@dataclass(frozen=True)
class Compiled:
    """A kernel's program, as its compilers tell of it."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    instructions: Counter[str]

    def blocks(self) -> tuple[int, str]:
        """Of the grid, on a multiprocessor at a time; and what forbids one more."""
        registers = -(-self.registers // 8) * 8 * self.threads
        fitting = {
            "registers": REGISTERS // registers,
            "shared memory": SHARED_BYTES // (self.shared_bytes + RESERVED_BYTES),
            "threads": THREADS // self.threads,
        }
        least = min(fitting.values())
        return least, ", ".join(name for name, count in fitting.items() if count == least)


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """Exits 0 after --help, 2 after a mistake."""
    parser = command_line.parser("gpu_static.py", __doc__)
    add = parser.add_argument
    add("--packages", type=Path, metavar="FOLDER", help="where the packages named above are")
    add("--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="that are compiled")
    add("--keep", type=Path, metavar="FOLDER", help="new folder that keeps PTX and SASS")
    options = command_line.parsed(parser, args)
    if options.packages and not (options.packages / PLUGIN).is_file():
        fail(f"--packages is {options.packages}; allowed: a folder with {PLUGIN}")
    if options.keep and options.keep.exists():
        fail(f"--keep is {options.keep}, which exists; allowed: a new folder")
    return options


def main(args: Sequence[str]) -> None:
    """Prints a line for each kernel."""
    options = parsed(args)
    import jax

    from dsv3_jax.quant.kernels.choice import OLDEST_JAX

    if jax.__version_info__[:2] < OLDEST_JAX:
        print(f"skipped: kernels need jax 0.11 or later, and this is {jax.__version__}")
        return
    if not options.packages:
        print("skipped: --packages names no folder of CUDA's compilers; --help says how to make it")
        return
    from contenders.gpu_kernels import modules

    with user_errors(), tempfile.TemporaryDirectory() as made:
        kept = options.keep or Path(made)
        driver = stand_in(kept)
        print(f"sm_90a, jax {jax.__version__}, {ptxas(options.packages)}")
        for name in options.kernels:
            folder = kept / name
            folder.mkdir()
            for module in modules(name):
                compile_into(folder, module, options.packages, driver)
            print(told(name, read(folder)), flush=True)


def stand_in(folder: Path) -> Path:
    """A folder with a library that the plug-in takes for the driver."""
    driver = folder / "driver"
    driver.mkdir(parents=True)
    source = driver / "driver.c"
    source.write_text(DRIVER)
    library = driver / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"the stand-in for the driver: {error}", hint="a C compiler by the name cc makes it")
    return driver


def ptxas(packages: Path) -> str:
    command = [packages / "nvidia/cu13/bin/ptxas", "--version"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return f"ptxas {re.search(r'release ([0-9.]+)', told).group(1)}"


def compile_into(folder: Path, module: bytes, packages: Path, driver: Path) -> None:
    """Leaves what the compilers wrote in `folder`."""
    (folder / "module").write_bytes(module)
    cuda = packages.resolve() / "nvidia/cu13"
    environment = {
        "PATH": f"{cuda / 'bin'}:/usr/bin:/bin",
        "LD_LIBRARY_PATH": str(driver.resolve()),
        "MOSAIC_GPU_CUDA_ROOT": str(cuda),
        "MOSAIC_GPU_DUMP_TO": str(folder.resolve()),
        **{f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "SASS_CTRL")},
    }
    command = [sys.executable, "-c", COMPILE, packages.resolve() / PLUGIN, folder / "module"]
    subprocess.run(command, env=environment, capture_output=True)


def read(folder: Path) -> Compiled:
    """Exits 2 where a compiler did not come to its end."""

    def number(pattern: str, text: str) -> int:
        return int(re.search(pattern, text).group(1))

    written = {path.suffix: path for path in folder.iterdir()}
    missing = {".log", ".ptx", ".ptxas", ".sass_ctrl"} - set(written)
    if missing:
        fail(
            f"{folder.name} was not compiled, there is no {', '.join(sorted(missing))}",
            hint="the packages are to be of the version of JAX that runs this",
        )
    ptxas, ptx, sass = (written[end].read_text() for end in (".ptxas", ".ptx", ".sass_ctrl"))
    return Compiled(
        number(r"Used (\d+) registers", ptxas),
        number(r"(\d+) bytes spill stores", ptxas),
        shared_bytes(written[".log"]),
        number(r"\.maxntid (\d+)", ptx),
        Counter(operations(sass)),
    )


def shared_bytes(log: Path) -> int:
    """Of the launch, as it is first written: a constant by name, which comes before it."""
    constants: dict[str, int] = {}
    with log.open() as lines:
        for line in lines:
            if found := re.search(r"(%\w+) = arith\.constant (\d+) : i32", line):
                constants[found.group(1)] = int(found.group(2))
            if found := re.search(r"dynamic_shared_memory_size (%\w+)", line):
                return constants[found.group(1)]
    raise ValueError(f"{log} has no launch")


def operations(sass: str) -> Iterator[str]:
    """Name of each machine instruction."""
    for line in re.finditer(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_]*)", sass):
        yield line.group(1)


def told(name: str, it: Compiled) -> str:
    blocks, limit = it.blocks()
    of_each = "" if name.startswith("multiply") else f" ({it.instructions.total() / 128:.1f} each)"
    spilled = f", {it.spilled_bytes} bytes spilled" if it.spilled_bytes else ""
    most = ", ".join(f"{n} {operation}" for operation, n in it.instructions.most_common(6))
    return (
        f"{name}: {it.registers} registers{spilled}, {it.shared_bytes:,} bytes of shared memory, "
        f"{blocks} block{'s' * (blocks != 1)} of {it.threads} threads ({limit}), "
        f"{it.instructions.total():,} instructions{of_each}: {most}"
    )


if __name__ == "__main__":
    run(main)
