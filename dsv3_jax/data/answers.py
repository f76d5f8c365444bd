"""Conversations as tokens of which some are answers: the loss looks at these alone (report 5.1).

An answer reaches from where a template lets the assistant begin to speak to the token that ends its
turn, both as at inference: what stands before it is the very prompt that a model is asked with, and
is encoded apart from it, since a prompt's last letters never merge with what is written after them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.data.chat import ChatTemplate

# In the place of an answer, to see what a template puts behind one; Unicode guarantees that these
# are no characters.
_PROBE = "\ufdd1\ufdd2\ufdd1"


class Sample(NamedTuple):
    """A conversation up to the end of its last answer."""

    tokens_N: np.ndarray
    """int32 [N]"""
    answer_N: np.ndarray
    """bool [N]: of an answer, its end included"""


class AnswerTemplate(ChatTemplate):
    """A chat template that knows where answers begin and end."""

    def sample(self, messages: Sequence[Mapping[str, Any]]) -> Sample:
        """All answers of a conversation count.

        ValueError, one line, for messages that the template refuses, for a template that rewrites
        an answer or what stood before it, and for one that puts no token behind an answer.
        """
        ids, counts = [], []
        for text, is_answer in self.divided(messages):
            for part in self._encoded(text):
                ids.append(np.asarray(part, np.int32))
                counts.append(np.full(len(part), is_answer))
        return Sample(np.concatenate(ids), np.concatenate(counts))

    def ends(self) -> frozenset[int]:
        """The token that ends an answer; none of a template that `sample` refuses."""
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        try:
            sample = self.sample(turns)
        except ValueError:
            return frozenset()
        return frozenset({int(sample.tokens_N[sample.answer_N][-1])})

    def divided(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
        """Its text in pieces, and whether each is an answer. Errors as of `sample`."""
        apart = [self._apart(message) for message in messages]
        whole, done = self._rendered(apart, answer=False), 0
        for place, message in enumerate(apart):
            if message["role"] != "assistant":
                continue
            before = self._rendered(apart[:place], answer=True)
            until = self._rendered(apart[: place + 1], answer=False)
            if not (until.startswith(before) and len(before) >= done):
                raise ValueError(
                    f"{self.name}: what stands before messages[{place}] is not what a model is "
                    "asked with; allowed: templates that do not change it"
                )
            if not whole.startswith(until):
                raise ValueError(
                    f"{self.name} changes messages[{place}] when the conversation goes on; "
                    "allowed: samples of one answer each"
                )
            end = self._end(apart, place, len(before), until)
            yield whole[done : len(before)], False
            yield whole[len(before) : end], True
            done = end

    def _end(self, apart: Sequence[Mapping[str, Any]], place: int, begin: int, until: str) -> int:
        """Where the token behind an answer ends, in the text `until` there."""
        probed = self._rendered([*apart[:place], {**apart[place], "content": _PROBE}], answer=False)
        _, found, behind = probed.rpartition(_PROBE)
        said = apart[place]["content"].strip()
        if not (found and until.endswith(behind)):
            said = None
        end = len(until) - len(behind)
        if said is None or not until[begin:end].rstrip().endswith(said):
            raise ValueError(f"{self.name} changes what messages[{place}] says")
        mark = self._marks.search(until, end) if self._marks else None
        if mark is None:
            raise ValueError(
                f"{self.name} puts no token behind messages[{place}], so that a model would never "
                "learn to end; allowed: templates that end an answer with eos_token or another mark"
            )
        return mark.end()
