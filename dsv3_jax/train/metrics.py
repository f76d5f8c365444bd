"""What a run tells on the way: `metrics.jsonl` for readers of tomorrow, a live display for today's.

Both take the same records, made in `records.py`. The display shows those of kind "train" and
"validation". `matmul_share` is a fraction of the machine's matmul peak, `max_violation` the MaxVio
of loss-free balancing.
"""

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsv3_jax.files import replace_file

HEADER_EVERY = 20  # plain lines between two headers: one is always on a screen of 24
PACE_WINDOW = 100  # updates over which the remaining time is estimated
CURVE_POINTS = 48
LOSSES = {"main_loss": "main loss", "mtp_loss": "MTP loss"}
CURVE_BARS = "▁▂▃▄▅▆▇█"


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON for every reader: NaN and infinities become null, arrays and their scalars plain."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Entries of a `metrics.jsonl`, in order. A torn last line, left by a killed run, is no entry.

    ValueError names any other line that is no entry.
    """
    lines = Path(path).read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:  # also what bytes that are not UTF-8 raise
            entry = None
        if _is_entry(entry):
            entries.append(entry)
        elif number < len(lines):
            found = f"{path}, line {number}: found {line[:40]!r}"
            raise ValueError(f"{found}; allowed: a metrics entry")
    return entries


def _is_entry(value: Any) -> bool:
    """Whether what all entries have, and what curves are made of, is there and of its type."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("kind"), str)
        and all(type(value.get(name)) is int for name in ("step", "tokens"))
        and all(
            value.get(name) is None or type(value[name]) in (int, float)
            for name in ("main_loss", "bits_per_byte")
        )
    )


class MetricsLog:
    """Appends entries to a JSON-lines file; a kill after `append` has returned loses none.

    For `contextlib.closing`.

    `resume_tokens` None starts a file that must not exist yet. With a number, later entries are
    dropped: a resumed run then has one clean curve.
    """

    def __init__(self, path: str | Path, resume_tokens: int | None = None) -> None:
        path = Path(path)
        if resume_tokens is not None:
            entries = read_metrics(path) if path.exists() else []
            kept = [entry for entry in entries if entry["tokens"] <= resume_tokens]
            replace_file(path, "".join(strict_json(e) + "\n" for e in kept).encode())
        self._file = path.open("x" if resume_tokens is None else "a", encoding="utf-8")

    def append(self, entry: dict[str, Any]) -> None:
        """One line, written at once. Values that are not finite become null."""
        self._file.write(strict_json(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Progress:
    """Shows a run while it goes: a live display on a terminal, aligned plain lines anywhere else.

    Use as a context manager, so that an exception or ^C gives the terminal back as it was. `step`
    in the records counts finished steps; `first_step` are those that a resumed run starts with.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        title: str = "training",
        console: Console | None = None,
        measures: Mapping[str, str] = LOSSES,
    ) -> None:
        """`measures`: what is learned by, as names of training records' values with labels; the
        first one's curve is shown.
        """
        self.console = console or Console()
        self.total_steps, self.title = total_steps, title
        self._measures, self._first = measures, next(iter(measures))
        self._labels = {**measures, **_LABELS}
        self._step, self._train, self._validation = first_step, {}, {}
        self._pace: deque[tuple[float, int]] = deque(maxlen=PACE_WINDOW)
        self._finish: float | None = None
        self._curve = _Curve()
        self._lines = 0
        self._start = self.console.get_time()
        self._live: Live | None = None
        # A notebook's console calls itself a terminal in some versions, but cannot redraw.
        if self.console.is_interactive and not self.console.is_jupyter:
            self._live = Live(get_renderable=self._view, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        else:
            self.message(f"{self.title}: {self.total_steps - self._step} steps to go")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Show a "train" or "validation" record; others are for the file only."""
        if record["kind"] == "train":
            self._step, self._train = record["step"], record
            self._estimate()
            self._curve.add(record[self._first])
            if not self._live:
                self._print_line(record)
        elif record["kind"] == "validation":
            self._validation = record
            if not self._live:
                self.message(_validation_line(record))

    @property
    def live(self) -> bool:
        """Whether it redraws in place, so that records between the logged ones can be shown too."""
        return self._live is not None

    def message(self, text: str) -> None:
        """A line of text, above the display where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _estimate(self) -> None:
        now = self.console.get_time()
        self._pace.append((now, self._step))
        then, before = self._pace[0]
        if self._step > before:
            pace = (now - then) / (self._step - before)
            self._finish = now + (self.total_steps - self._step) * pace

    def _remaining(self) -> str:
        if self._finish is None:
            return "-"
        return clock(max(0.0, self._finish - self.console.get_time()))

    def _print_line(self, record: dict[str, Any]) -> None:
        width = max(9, 2 * len(str(self.total_steps)) + 1)
        row = "{:>{w}}{:>11}{:>11}{:>11}{:>12}{:>12}{:>9}{:>9}{:>10}"
        if self._lines % HEADER_EVERY == 0:
            names = "grad norm,learn rate,tokens/s,of peak,MaxVio,ETA"
            heads = (*self._measures.values(), *names.split(","))
            self.message(row.format("step", *heads, w=width))
        cells = [_shown(record, name) for name in (*self._measures, *_AFTER_LOSSES)]
        step = f"{self._step}/{self.total_steps}"
        self.message(row.format(step, *cells, self._remaining(), w=width))
        self._lines += 1

    def _view(self) -> RenderableType:
        """The live display. Called by rich's own thread too, so it only reads."""
        head = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for ratio in (None, 1, None, None):
            head.add_column(ratio=ratio, no_wrap=True)
        head.add_row(
            Text(self.title, "bold"),
            ProgressBar(self.total_steps, self._step),
            f"{self._step}/{self.total_steps} ({self._step / self.total_steps:.0%})",
            f"ETA {self._remaining()}",
        )
        bars = "" if self.console.options.ascii_only else self._curve.bars
        label = f"{self._measures[self._first].split()[-1]} curve"
        curve = [Text.assemble((f"{label:15}", "dim"), (bars, "cyan"), no_wrap=True)]
        return Group(head, *(curve if bars else []), self._numbers())

    def _numbers(self) -> Table:
        """Labelled values, as many beside each other as fit (a pair takes 26 columns)."""
        cells = [cell for name in self._labels for cell in self._cell(name)]
        cells += ["elapsed", clock(self.console.get_time() - self._start)]
        per_row = 2 * max(1, min(3, self.console.width // 26))
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(per_row // 2):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(justify="right", no_wrap=True, min_width=9)
        for start in range(0, len(cells), per_row):
            table.add_row(*cells[start : start + per_row])
        return table

    def _cell(self, name: str) -> tuple[str, Text]:
        record = self._validation if name == "bits_per_byte" else self._train
        value = record.get(name)
        broken = value is not None and not math.isfinite(value)
        return self._labels[name], Text(_shown(record, name), "bold red" if broken else "")


_LABELS = {
    "bits_per_byte": "val bits/byte",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "max_violation": "MaxVio",
    "tokens_per_second": "tokens/s",
    "matmul_share": "of matmul peak",
}
_FORMATS = {
    "main_loss": "#.4g",
    "mtp_loss": "#.4g",
    "reward": "#.4g",
    "kl": "#.3g",
    "grad_norm": "#.4g",
    "learning_rate": ".2e",
    "max_violation": ".3f",
    "tokens_per_second": ",.0f",
    "matmul_share": ".1%",
    "bits_per_byte": ".3f",
}
_AFTER_LOSSES = ("grad_norm", "learning_rate", "tokens_per_second", "matmul_share", "max_violation")


def _shown(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    return "-" if value is None else format(value, _FORMATS[name])


def _validation_line(record: dict[str, Any]) -> str:
    extent = "whole split" if record["whole"] else f"{record['rows']} rows"
    return (
        f"  validation after step {record['step']}: {_shown(record, 'bits_per_byte')} bits per "
        f"byte, {record['loss']:.4f} nats per token ({extent})"
    )


def clock(seconds: float) -> str:
    """3:07, or 12:03:07 from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class _Curve:
    """The whole run's loss as a line of bars, in constant memory: when full, neighbours merge."""

    def __init__(self) -> None:
        self.bars = ""
        self._means: list[float] = []
        self._pending: list[float] = []
        self._stride = 1

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) < self._stride:
            return
        self._means.append(sum(self._pending) / self._stride)
        self._pending = []
        if len(self._means) == CURVE_POINTS:
            self._means = [(a + b) / 2 for a, b in zip(*[iter(self._means)] * 2, strict=True)]
            self._stride *= 2
        self.bars = _bars(self._means)


def _bars(values: list[float]) -> str:
    low, high = min(values), max(values)
    top = len(CURVE_BARS) - 1
    return "".join(CURVE_BARS[round(top * (v - low) / (high - low or 1))] for v in values)
