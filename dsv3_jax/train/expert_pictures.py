"""Experts over a run: heat maps of their loads, one a layer, and the drift of their biases (2.1.2).

Colour is an expert's load over the layer's mean: 1 is balance, 0 an expert without a token.
"""

import base64
import io
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv3_jax.drawing import BLUE, ORANGE, PINK, column, new_figure, tokens_on_x
from dsv3_jax.train.page_pictures import (
    LARGE,
    VARIABLES,
    Entries,
    Picture,
    frame_of,
    of_kind,
    one_panel,
    svg_of,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.colors import Colormap

COLUMNS = 120  # of a heat map: consumed tokens in equal parts
BRIGHTEST = 2.0  # times the mean; more is drawn alike


class HeatMap(NamedTuple):
    """One layer: a PNG as a data address, and the last loads over their mean."""

    layer: str
    png: str
    busiest: float
    idlest: float


class Loads(NamedTuple):
    """What the "experts" entries of a run agree on."""

    layers: list[str]
    tokens: list[float]
    shares_NLE: "np.ndarray"  # N entries; 1 is the layer's mean, NaN where no token came


def loads_of(entries: Entries) -> Loads | None:
    """Loads over their mean; entries that name other layers than the last one are left out."""
    import numpy as np

    found = [entry for entry in of_kind(entries, "experts") if entry.get("load_LE")]
    found = [e for e in found if e.get("layers") and e.get("tokens") is not None]
    if not found:
        return None
    shape = np.shape(found[-1]["load_LE"])
    alike = [
        entry
        for entry in found
        if entry["layers"] == found[-1]["layers"] and np.shape(entry["load_LE"]) == shape
    ]
    load_NLE = np.array([entry["load_LE"] for entry in alike], np.float64)
    mean_NL1 = load_NLE.mean(-1, keepdims=True)
    shares_NLE = np.divide(load_NLE, mean_NL1, np.full_like(load_NLE, np.nan), where=mean_NL1 > 0)
    return Loads(found[-1]["layers"], [float(e["tokens"]) for e in alike], shares_NLE)


def heat_maps(loads: Loads) -> list[HeatMap]:
    """One picture a layer: consumed tokens to the right, experts downwards."""
    import numpy as np

    order = sorted(range(len(loads.tokens)), key=loads.tokens.__getitem__)
    tokens = [loads.tokens[place] for place in order]
    # The entry that covers a column is the first at or after the column's middle.
    middles = ((c + 0.5) / COLUMNS * tokens[-1] for c in range(COLUMNS))
    covering = [order[bisect_left(tokens, middle)] for middle in middles]
    maps = []
    for place, layer in enumerate(loads.layers):
        shares_NE = loads.shares_NLE[:, place]
        last_E = shares_NE[order[-1]]
        png = png_of(np.ascontiguousarray(shares_NE[covering].T))
        maps.append(HeatMap(layer, png, float(last_E.max()), float(last_E.min())))
    return maps


def png_of(shares_EC: "np.ndarray") -> str:
    """A pixel a value, as a data address; NaN is transparent."""
    from matplotlib import colormaps
    from matplotlib.image import imsave

    colors = colormaps["RdBu_r"].with_extremes(bad=(0, 0, 0, 0))
    data = io.BytesIO()
    with new_figure(1, 1):  # our settings, not the user's
        imsave(
            data,
            colors(shares_EC / BRIGHTEST, bytes=True),
            format="png",
            metadata={"Software": None},
            pil_kwargs={"optimize": True},
        )
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def color_scale() -> str:
    """The colours of heat maps from 0 to `BRIGHTEST`, as a picture of one line."""
    import numpy as np

    return png_of(np.linspace(0, BRIGHTEST, 128)[None, :])


def bias_drift(entries: Entries) -> Picture | None:
    """The span of each layer's biases over the run; without "experts" entries, that of all."""
    found = [e for e in of_kind(entries, "experts") if e.get("bias_LE") and e.get("layers")]
    train = of_kind(entries, "train")
    if found:
        layers = found[-1]["layers"]
        alike = [entry for entry in found if entry["layers"] == layers]
        spans = [
            ([min(e["bias_LE"][i]) for e in alike], [max(e["bias_LE"][i]) for e in alike])
            for i in range(len(layers))
        ]
        return _spans(column(alike, "tokens"), spans, layers, frame_of(entries).last_token)
    ends = column(train, "bias_min"), column(train, "bias_max")
    if not any(map(math.isfinite, ends[0])):
        return None
    return _spans(column(train, "tokens"), [ends], ["all layers"], frame_of(entries).last_token)


def _spans(
    tokens: list[float], spans: Sequence[tuple[Any, Any]], layers: list[str], last_token: float
) -> Picture:
    """Lowest and highest bias of each layer, in the colour of its depth."""
    from matplotlib.colors import to_hex

    depth = _depth_colors()
    colors = [to_hex(depth(place / max(1, len(layers) - 1))) for place in range(len(layers))]
    title = "Router biases: lowest and highest of each layer"
    with one_panel(title, LARGE) as panel:
        for (low, high), color in zip(spans, colors, strict=True):
            panel.plot(tokens, low, color=color, linewidth=1.2)
            panel.plot(tokens, high, color=color, linewidth=1.2)
        tokens_on_x(panel, last_token)
        svg = svg_of(panel, title)
    named = [(layer, VARIABLES.get(c.upper(), c)) for layer, c in zip(layers, colors, strict=True)]
    shown = named if len(named) <= 4 else [named[0], named[len(named) // 2], named[-1]]
    return Picture(title, svg, tuple(shown))


def _depth_colors() -> "Colormap":
    """From shallow to deep in colours that are seen on white and on black."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("depth", [BLUE, PINK, ORANGE])
