"""What commands print: their --help, with what they load for that, and one line for a mistake."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def help_of(module: str) -> tuple[str, set[str]]:
    """What `python -m module --help` prints, and the top-level packages it has loaded by then."""
    code = (
        "import sys\n"
        f"from {module} import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    print(*sys.modules, file=sys.stderr)\n    raise\n"
    )
    environment = os.environ | {"COLUMNS": "300"}
    help_ = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert help_.returncode == 0, help_.stderr
    loaded = {name.partition(".")[0] for name in help_.stderr.split()}
    assert "tyro" in loaded
    return help_.stdout, loaded


def mistake_of(main: Callable, args: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command prints, on stderr alone, for arguments that it exits 2 for."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    out = capsys.readouterr()
    assert stopped.value.code == 2
    assert out.err.count("\n") == 1
    assert not out.out
    return out.err
