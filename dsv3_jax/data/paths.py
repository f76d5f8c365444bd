"""Paths as users write them."""

from pathlib import Path


def user_path(path: str | Path, field: str) -> Path:
    """With a home folder for ~. ValueError, which begins with `field`, if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = Path(path).parts[0]
        raise ValueError(
            f"{field} {path}: no home folder is known for {home}; allowed: ~ or ~user of this "
            f"machine, or './{home}' for a file of that name"
        ) from None
