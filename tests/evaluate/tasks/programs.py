"""Programs that a model completes: what is run, and whether it does what the tests say.

lm-eval's HumanEval loads its metric from the network; this one needs none. A program runs in a
process of its own, with nothing but a limit of time around it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence

SECONDS = 20


def with_prompts(resps: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """Completions behind what they complete."""
    return [
        [doc["prompt"] + completion for completion in completions]
        for completions, doc in zip(resps, docs, strict=True)
    ]


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]]) -> float:
    """The share of a question's programs that pass its tests."""
    passed = [passes(program, references[0]) for program in predictions[0]]
    return sum(passed) / len(passed)


def passes(program: str, tests: str) -> bool:
    """Whether both run to the end, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", f"{program}\n\n{tests}\n"],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
            )
        except (subprocess.TimeoutExpired, ValueError):  # a program with a zero byte is none
            return False
    return done.returncode == 0
