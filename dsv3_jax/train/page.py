"""A run as one static page, `report.html`: what happened, curves, experts, samples, configuration.

The file needs nothing else: pictures are inside, there is no script and no address. Equal entries
give equal bytes. All text is escaped, since a model may write anything.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any

from dsv3_jax.config import RunConfig
from dsv3_jax.config.presets import tiny_run
from dsv3_jax.drawing import short
from dsv3_jax.files import replace_file
from dsv3_jax.parallel import processes
from dsv3_jax.train import (
    exchange_page,
    expert_pictures,
    page_pictures,
    pipeline_page,
    quant_page,
    reward_page,
)
from dsv3_jax.train.console import printable
from dsv3_jax.train.folder import RunFolder
from dsv3_jax.train.machine import describe
from dsv3_jax.train.metrics import read_metrics
from dsv3_jax.train.page_pictures import LARGE, Picture
from dsv3_jax.train.page_style import STYLE
from dsv3_jax.train.report import Result
from dsv3_jax.train.story import Facts, Tile, facts_of, sentences, state, tiles

EVENTS = 200  # lines of the table; the first ones of a longer list
OLDER_SAMPLES = 30


def tell_page(run: RunFolder, cfg: RunConfig, say: Callable[[str], None]) -> None:
    """The page of a run that has not ended, by the first process; a disk that is full is no reason
    to end it.
    """
    if not processes.is_first():
        return
    try:
        write_page(run, cfg, describe(), read_metrics(run.metrics), None)
    except OSError as error:
        say(f"report.html not written: {error}")


def write_page(
    run: RunFolder,
    cfg: RunConfig,
    machine: str,
    entries: Sequence[dict[str, Any]],
    result: Result | None,
) -> None:
    """Writes `report.html` into the run's folder; an unfinished run has no `result` yet.

    `entries` are those of `metrics.jsonl`; missing keys and kinds leave their parts of the page
    out. `machine` is one line. OSError where the file cannot be written.
    """
    page = page_html(run.path.name, cfg, machine, entries, result)
    replace_file(run.report, page.encode())


def page_html(
    name: str,
    cfg: RunConfig,
    machine: str,
    entries: Sequence[dict[str, Any]],
    result: Result | None,
) -> str:
    """The page as text."""
    facts, loads = facts_of(cfg, entries, result), expert_pictures.loads_of(entries)
    body = [
        _head(name, facts, loads),
        _rewards(entries),
        _learning(cfg, entries, result),
        _experts(entries, loads),
        _recipe(cfg, entries),
        _machine(entries),
        _exchange(entries),
        _pipeline(entries),
        _quant(entries),
        _events(facts),
        _samples(entries, result),
        _configuration(cfg),
        f"<footer>{_text(machine)}<br>{_files()}</footer>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    """Safe inside an element and inside quotes: no markup, no control characters."""
    return escape(printable(str(value), "utf-8"))


def _head(name: str, facts: Facts, loads: expert_pictures.Loads | None) -> str:
    now = state(facts)
    last_LE = None if loads is None else loads.shares_NLE[-1]
    lines = [f'<p class="{said.tone}">{_text(said.text)}</p>' for said in sentences(facts, last_LE)]
    shown = [_bits_tile(facts), *map(_tile, tiles(facts))]
    return (
        f'<header><h1>{_text(name)}</h1><p class="state {now.tone}">{_text(now.text)}</p>'
        f'<div class="tiles">{"".join(shown)}</div>{"".join(lines)}</header>'
    )


def _tile(tile: Tile) -> str:
    below = f"<dd>{_text(tile.below)}</dd>" if tile.below else ""
    value = f'<dd class="{tile.tone}">{_text(tile.value)}</dd>'
    return f'<dl class="tile"><dt>{_text(tile.label)}</dt>{value}{below}</dl>'


def _bits_tile(facts: Facts) -> str:
    """Bits per byte with zlib's as two bars, the shorter the better."""
    model, yardstick = facts.bits_per_byte, math.nan
    if facts.result and facts.result.zlib_bits_per_byte is not None:
        yardstick = facts.result.zlib_bits_per_byte
    shown = [("model", model, "--c3"), ("zlib", yardstick, "--c9")]
    shown = [bar for bar in shown if math.isfinite(bar[1])]
    if not shown:
        return ""
    longest = max(value for _, value, _ in shown)
    bars = "".join(
        f'<span class="bar">{label}<i style="width:{100 * value / longest:.1f}%;'
        f'background:var({color})"></i></span>'
        for label, value, color in shown
    )
    value = f"{model:.3f}" if math.isfinite(model) else "not finite"
    below = f"zlib -9: {yardstick:.3f}" if math.isfinite(yardstick) else "last validation"
    return f'<dl class="tile"><dt>bits per byte</dt><dd>{value}</dd><dd>{below}{bars}</dd></dl>'


def _rewards(entries: Sequence[dict]) -> str:
    pictures = _grid(reward_page.large(entries), "pictures large")
    pictures += _grid(reward_page.small(entries), "pictures")
    return _section("Rewards", pictures, reward_page.NOTE)


def _learning(cfg: RunConfig, entries: Sequence[dict], result: Result | None) -> str:
    zlib_bpb = result.zlib_bits_per_byte if result else None
    pictures = [
        None if cfg.data.weighted else page_pictures.losses(entries),
        page_pictures.bits(entries, zlib_bpb),
        page_pictures.gradients(entries, cfg.optimizer.clip_norm),
        page_pictures.single(entries, "balance_loss", "Balance loss, before its weight", LARGE),
    ]
    marked = "; dotted lines are events" if page_pictures.frame_of(entries).trouble else ""
    note = f"by consumed tokens; faint as measured, strong averaged{marked}"
    return _section("Learning", _grid(pictures, "pictures large"), note)


def _experts(entries: Sequence[dict], loads: expert_pictures.Loads | None) -> str:
    pictures = [
        page_pictures.single(entries, "max_violation", "MaxVio: 0 is balance", LARGE),
        expert_pictures.bias_drift(entries),
    ]
    maps = _heat_maps(loads) if loads else ""
    return _section("Experts", _grid(pictures, "pictures large") + maps, "")


def _heat_maps(loads: expert_pictures.Loads) -> str:
    figures = "".join(
        f"<figure><figcaption>{_text(heat.layer)} "
        f'<span class="note">{_ratio(heat.idlest)} to {_ratio(heat.busiest)}</span></figcaption>'
        f'<img src="{heat.png}" alt="Expert loads of {_text(heat.layer)} over the run"></figure>'
        for heat in expert_pictures.heat_maps(loads)
    )
    number = loads.shares_NLE.shape[-1]
    return (
        f'<p class="scale note"><b>Load of each expert over the run.</b> 0 '
        f'<img src="{expert_pictures.color_scale()}" alt="from blue over white to red"> '
        f"{expert_pictures.BRIGHTEST:g} times the layer's mean or more</p>"
        f'<p class="note">To the right: consumed tokens, up to {short(max(loads.tokens))}. '
        f"Downwards: experts 0 to {number - 1}. Beside a layer's name: its idlest and its busiest "
        f'expert at the end.</p><div class="maps">{figures}</div>'
    )


def _ratio(value: float) -> str:
    return f"{value:.2f}×" if math.isfinite(value) else "–"


def _recipe(cfg: RunConfig, entries: Sequence[dict]) -> str:
    pictures = page_pictures.schedules(entries, cfg)
    return _section(
        "Schedules", _grid(pictures, "pictures"), "dashed: as the newest configuration plans it"
    )


def _machine(entries: Sequence[dict]) -> str:
    single = page_pictures.single
    pictures = [
        single(entries, "tokens_per_second", "Tokens per second"),
        single(entries, "matmul_share", "Share of the matmul peak, %", factor=100),
        single(entries, "data_wait", "Waiting for data, % of the time", factor=100),
        page_pictures.memory(entries),
    ]
    return _section("Speed and memory", _grid(pictures, "pictures"), "")


def _exchange(entries: Sequence[dict]) -> str:
    pictures = exchange_page.pictures(entries)
    if not pictures:
        return ""
    return _section("Between devices", _grid(pictures, "pictures"), exchange_page.NOTE)


def _pipeline(entries: Sequence[dict]) -> str:
    pictures = _grid(pipeline_page.pictures(entries), "pictures large")
    rows = pipeline_page.table(entries)
    return _section(
        "Pipeline", pictures + _table(pipeline_page.HEADS, rows) if rows else "", pipeline_page.NOTE
    )


def _quant(entries: Sequence[dict]) -> str:
    rows = quant_page.table(entries)
    if not rows:
        return ""
    recipe = page_pictures.of_kind(entries, "quant")[-1]["recipe"]
    note = f"recipe {recipe}; one micro-batch of held-out text at the last validation"
    pictures = _grid(quant_page.pictures(entries), "pictures large")
    return _section("Low precision", pictures + _table(quant_page.HEADS, rows), note)


def _grid(pictures: Iterable[Picture | None], kind: str) -> str:
    figures = "".join(_figure(picture) for picture in pictures if picture)
    return f'<div class="{kind}">{figures}</div>' if figures else ""


def _figure(picture: Picture) -> str:
    keys = "".join(
        f'<span><i style="background:{color}"></i>{_text(label)}</span>'
        for label, color in picture.legend
    )
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    return f"<figure><figcaption>{_text(picture.title)}{legend}</figcaption>{picture.svg}</figure>"


def _section(title: str, content: str, note: str) -> str:
    if not content:
        return ""
    small = f" <small>{_text(note)}</small>" if note else ""
    return f"<section><h2>{_text(title)}{small}</h2>{content}</section>"


def _events(facts: Facts) -> str:
    rows = [
        (f"{event['step']:,}", _tokens(event), event.get("event", ""), event.get("text", ""))
        for event in facts.events[:EVENTS]
    ]
    more = len(facts.events) - len(rows)
    note = f"{more:,} more in metrics.jsonl" if more else ""
    heads = ("step", "tokens", "what", "")
    return _section("Events", _table(heads, rows) if rows else "", note)


def _tokens(entry: dict[str, Any]) -> str:
    tokens = entry.get("tokens")
    return "" if tokens is None else short(tokens)


def _samples(entries: Sequence[dict], result: Result | None) -> str:
    """The newest text in full, older ones folded."""
    shown = [
        (f"after {_tokens(entry)} tokens", entry.get("prompt") or "", entry.get("text") or "")
        for entry in page_pictures.of_kind(entries, "sample")
    ]
    if result and result.sample_text:
        final = ("at the end", result.sample_prompt, result.sample_text)
        shown = [*(shown[:-1] if shown and shown[-1][1:] == final[1:] else shown), final]
    if not shown:
        return ""
    *older, (when, prompt, text) = shown
    older = older[:: 1 + len(older) // OLDER_SAMPLES]
    folded = "".join(
        f"<details><summary>{_text(then)}</summary>{_sample(*words)}</details>"
        for then, *words in older
    )
    before = f'<div class="text">{folded}</div>' if folded else ""
    newest = f'<p class="note">{_text(when)}; the prompt is bold</p>{_sample(prompt, text)}'
    return _section("What it writes", before + f'<div class="text">{newest}</div>', "")


def _sample(prompt: str, text: str) -> str:
    return f'<pre dir="ltr"><b>{_text(prompt)}</b>{_text(text)}</pre>'


def _configuration(cfg: RunConfig) -> str:
    rows = [
        (path, _shown(value), _shown(default))
        for path, value, default in _pairs(cfg, tiny_run())
        if value != default
    ]
    changed = _table(("field", "this run", "default run"), rows) if rows else ""
    whole = f"<details><summary>all of it</summary><pre>{_text(cfg.to_json())}</pre></details>"
    return _section("Configuration", changed + whole, "what differs from the default run")


def _pairs(one: Any, other: Any, path: str = "") -> Iterable[tuple[str, Any, Any]]:
    """The leaves of two configurations of one type, with their names."""
    for field in fields(one):
        name = f"{path}.{field.name}".strip(".")
        value, default = getattr(one, field.name), getattr(other, field.name)
        if is_dataclass(value):
            yield from _pairs(value, default, name)
        else:
            yield name, value, default


def _shown(value: Any) -> str:
    """A configuration value; lists of phases one a line, without the names of their fields."""
    if isinstance(value, tuple) and value and is_dataclass(value[0]):
        return "; ".join(
            ", ".join(f"{f.name} {getattr(item, f.name)}" for f in fields(item)) for item in value
        )
    return value if isinstance(value, str) else json.dumps(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in heads)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'


def _files() -> str:
    names = ("metrics.jsonl", "config.json")
    links = ", ".join(f'<a href="{name}">{name}</a>' for name in names)
    return f"Beside this page: {links}"
