"""A command's --help in a process of its own: what it prints, and what it loads for that."""

import os
import subprocess
import sys
from pathlib import Path

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
