"""Verifiers that may hang or crash: each works in a process of its own, with a limit of time.

What a model writes may make a pattern backtrack without end, or a checker take all memory. A
verifier that takes too long, dies or raises has rejected the answer, and the work goes on.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dsv3_jax.posttrain.attempts import Attempt
from dsv3_jax.posttrain.reward_workers import Workers
from dsv3_jax.posttrain.verifiers import Answer, Verdict, Verifier


@contextlib.contextmanager
def bounded(judges: Sequence[Verifier], seconds: float) -> Iterator[list[Verifier]]:
    """The same verifiers, each with so many seconds for an answer. Their processes start with the
    first answers and end with the block.

    A function of the user's gets an `Attempt` and returns a bool or a number, 1 or more to accept,
    or a pair of one of them and a reason.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for judge in judges:
            name = judge.name if judge.kind is None else judge.name.partition("=")[2]
            workers = Workers(name, seconds, 1)
            stack.callback(workers.close)
            found.append(replace(judge, judge=_judge(workers)))
        yield found


def _judge(workers: Workers) -> Callable[[Answer], Verdict]:
    def judge(answer: Answer) -> Verdict:
        attempt = Attempt(
            answer.prompt,
            answer.text,
            answer.reasoning,
            answer.reference,
            id=answer.id,
            kind=answer.kind,
        )
        (rated,) = workers.rate([attempt])
        return Verdict(not rated.failed and rated.value >= 1, rated.reason)

    return judge
