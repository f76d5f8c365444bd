"""A text between two engines: one has read its prompt, the other goes on with it (report 3.4).

Prefill and decoding are deployed apart, on other meshes with other batches, so what one engine
knows of a text must reach the other: `Handover`, plain data on the host, which bytes carry anywhere
without losing a bit. It holds each layer's latents token by token; neither engine's pages, rows or
mesh are in it. How the bytes travel is left to whoever has two engines: a pipe, a socket, a file.
"""

import json
import math
import operator
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with np.dtype)
import numpy as np

from dsv3_jax.inference.cache import Pool
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.settings import EngineConfig
from dsv3_jax.inference.weights import Weights

_MAGIC = b"dsv3_jax hand-over 1\n"
_LENGTHS = struct.Struct("<QQ")  # of all the bytes, and of the header behind these two numbers
_DTYPES = ("float64", "float32", "bfloat16", "float8_e4m3fn")
_OF_TRAINING = ("init_std", "balance_indicator")  # fields of a model that say nothing of a text


def form_of(weights: Weights, settings: EngineConfig) -> dict[str, Any]:
    """What two engines must agree on, as JSON has it: the model (`weights` is a checksum of its
    last norm's gains), the drafts, and how latents are stored.
    """
    rest = weights.rest
    model = {f"model.{k}": v for k, v in asdict(rest.cfg).items() if k not in _OF_TRAINING}
    return model | {
        "engine.drafts": settings.drafts,
        "engine.fp8_cache": settings.fp8_cache,
        "dtype": rest.embed_VD.dtype.name,
        "weights": zlib.crc32(np.asarray(rest.norm_D[...]).tobytes()),
    }


@dataclass(frozen=True, eq=False)
class Handover:
    """A request of which S tokens are read, and one more is known: the newest of its answer."""

    request: Request
    tokens: list[int]
    """Prompt and answer so far, S + 1"""
    logprobs: list[float]
    """Of the answer's tokens, at temperature 1"""
    form: Mapping[str, Any]
    """`form_of` the engine that read it"""
    latents: tuple[np.ndarray, ...] = field(repr=False)
    """Of the main model's layers, then of the MTP modules: c_kv [S, C] and k_R [S, R], exactly as
    stored; in an FP8 cache c_kv's E4M3 values [S, C] and float32 scales [S, C / 128]"""
    hidden_WD: np.ndarray = field(repr=False)
    """Normed hidden states of the last W positions that are read, up to 2 for each draft: what MTP
    modules begin with"""

    @property
    def slots(self) -> int:
        """S: tokens whose latents are here."""
        return len(self.tokens) - 1

    def check(self, form: Mapping[str, Any], pools: Sequence[Pool]) -> None:
        """ValueError, one line, unless an engine of this form and these pools can go on with it."""
        for name in sorted({*form, *self.form}):
            theirs, ours = self.form.get(name), form.get(name)
            if theirs != ours:
                raise ValueError(f"a hand-over with {name} {theirs}; allowed here: {ours}")
        prompt, vocab = list(self.request.prompt), form["model.vocab_size"]
        answered = len(self.tokens) - len(prompt)
        begins = self.tokens[: len(prompt)] == prompt and 1 <= answered == len(self.logprobs)
        if not begins or not all(0 <= token < vocab for token in self.tokens):
            raise ValueError(
                "a hand-over whose tokens are not its prompt and an answer's beginning"
            )
        limit = min(len(prompt) + self.request.max_tokens, form["model.max_length"])
        if len(self.tokens) >= limit or self.tokens[-1] in self.request.end_ids:
            raise ValueError("a hand-over of a text that has ended")
        slots, held = self.slots, len(self.hidden_WD)
        wanted = [((slots, x.shape[-1]), x.dtype) for x in jax.tree.leaves(pools)]
        hidden = (held, form["model.d_model"]), jax.tree.leaves(pools)[-1].dtype
        most = min(2 * form["engine.drafts"], slots)
        found = [(x.shape, x.dtype) for x in (*self.latents, self.hidden_WD)]
        if found != [*wanted, hidden] or held > most:
            raise ValueError(f"a hand-over whose arrays are not those of {slots} tokens here")

    # --- bytes -----------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """A line that says what it is, two lengths, a header in JSON, and the arrays' bytes."""
        fields = asdict(self.request)
        request = asdict(_request(fields))
        request |= {"end_ids": sorted(request["end_ids"])}
        arrays = [np.ascontiguousarray(x) for x in (*self.latents, self.hidden_WD)]
        header = {
            "request": request,
            "tokens": self.tokens,
            "logprobs": self.logprobs,
            "form": dict(self.form),
            "arrays": [[x.dtype.name, *x.shape] for x in arrays],
        }
        head = json.dumps(header).encode()
        raw = [x.reshape(-1).view(np.uint8) for x in arrays]
        total = len(_MAGIC) + _LENGTHS.size + len(head) + sum(map(len, raw))
        return b"".join([_MAGIC, _LENGTHS.pack(total, len(head)), head, *raw])

    @classmethod
    def from_bytes(cls, data: bytes) -> "Handover":
        """The arrays are views of `data`. ValueError, one line, for bytes that are no hand-over, or
        not all of one. Nothing in them is ever run.
        """
        begin = len(_MAGIC) + _LENGTHS.size
        if data[: len(_MAGIC)] != _MAGIC or len(data) < begin:
            raise ValueError(f"{len(data)} bytes that are no hand-over: they begin otherwise")
        total, length = _LENGTHS.unpack_from(data, len(_MAGIC))
        if len(data) != total:
            raise ValueError(f"a hand-over of {total} bytes, of which {len(data)} are here")
        try:
            header = json.loads(bytes(data[begin : begin + length]))
            arrays = _arrays(header["arrays"], memoryview(data)[begin + length :])
            return cls(
                _request(header["request"]),
                _ints(header["tokens"]),
                [float(x) for x in header["logprobs"]],
                dict(header["form"]),
                tuple(arrays[:-1]),
                arrays[-1],
            )
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError("a hand-over whose header cannot be read") from error


def _request(fields: Mapping[str, Any]) -> Request:
    counts = {name: _ints([fields[name]])[0] for name in ("max_tokens", "seed")}
    shares = {name: float(fields[name]) for name in ("temperature", "top_p")}
    lists = {"prompt": _ints(fields["prompt"]), "end_ids": frozenset(_ints(fields["end_ids"]))}
    return Request(**fields | counts | shares | lists | {"prompt_logprobs": False})


def _arrays(described: Sequence[Sequence[Any]], data: memoryview) -> list[np.ndarray]:
    arrays, begin = [], 0
    for name, *shape in described:
        if name not in _DTYPES or min(_ints(shape)) < 0:
            raise ValueError("no such array")
        flat = np.frombuffer(data, np.dtype(name), math.prod(shape), begin)
        arrays.append(flat.reshape(shape))
        begin += arrays[-1].nbytes
    if begin != len(data):
        raise ValueError("the arrays have other sizes")
    return arrays


def _ints(numbers: Sequence[Any]) -> list[int]:
    """NumPy's become Python's; TypeError for what is no whole number."""
    return [int(operator.index(number)) for number in numbers]
