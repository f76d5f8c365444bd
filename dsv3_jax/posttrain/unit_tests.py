"""The reward of code: the last code block of an answer, run against the tests of its prompt.

Report 5.2.1 checks problems of LeetCode's kind by a compiler and test cases. A prompt's line brings
`tests`, Python that asserts (a text, or a list of them), `cases`, pairs of `input` and `output` of
the program's streams, or both. Each runs in a process of its own. Tests run beside the code and
could be tricked by it, though leaving early is noticed; the outputs of cases never come near it.
"""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dsv3_jax.config.fields import shown
from dsv3_jax.posttrain.attempts import Attempt, Rated
from dsv3_jax.posttrain.code_runner import Program, Runner

_FENCE = re.compile(r"( *)(`{3,})([^`]*)")
_CLOSES = 3  # blanks before the fence that ends a block; behind more of them it is part of the code
_PYTHON = ("python", "python3", "py")

# What Python has when it starts as usual, with its installed packages.
_USUAL = """
import _sitebuiltins, builtins
builtins.exit = _sitebuiltins.Quitter("exit", "")
builtins.quit = _sitebuiltins.Quitter("quit", "")
"""
_MAIN = _USUAL + "exec(compile(open('main.py').read(), 'main.py', 'exec'))"
# Runs the code as a module, then the tests with its names, then tells the word that it was handed:
# a program that has left before cannot have done so.
_HARNESS = (
    _USUAL
    + """
import json, linecache, os, sys, types
def run():
    with open(int(sys.argv[1])) as file:
        code, tests, word = json.load(file)
    told, sys.argv[1:] = int(sys.argv[2]), []
    module = sys.modules["solution"] = types.ModuleType("solution")
    for name, text in (("solution.py", code), ("tests.py", tests)):
        linecache.cache[name] = len(text), None, text.splitlines(True), name
        exec(compile(text, name, "exec"), vars(module))
    os.write(told, word.encode())
run()
"""
)


@dataclass(frozen=True)
class UnitTests:
    """The reward: 1 if all tests pass, else 0; or the share of those that do."""

    runner: Runner
    share: bool = False
    seconds: float = 60.0
    """For all tests of an attempt, besides the runner's limit for each"""
    workers: int = 2
    """Programs at the same time"""

    def rate(self, attempts: Sequence[Attempt]) -> list[Rated]:
        """In order. Without tests that can be read, and where a program cannot be started, an
        attempt has failed.
        """
        with ThreadPoolExecutor(self.workers, "tests") as pool:
            return list(pool.map(self._rate, attempts))

    def _rate(self, attempt: Attempt) -> Rated:
        try:
            tests = list(_tests(attempt.fields))
            code = code_block(attempt.text)
            if code is None:
                return Rated(0.0, "no code block")
            return self._passed(code, tests)
        except (ValueError, OSError) as error:
            return Rated.failure(error)

    def _passed(self, code: str, tests: Sequence["_Test"]) -> Rated:
        end = time.monotonic() + self.seconds
        passed, first = 0, ""
        for number, test in enumerate(tests, start=1):
            why = "out of time" if time.monotonic() > end else test(self.runner, code)
            passed += not why
            if why and not first:
                first = f"test {number} of {len(tests)}: {why}"
            if why == "out of time" or (why and not self.share):
                break
        value = passed / len(tests) if self.share else float(passed == len(tests))
        return Rated(value, first or f"all of {len(tests)}")


def code_block(text: str) -> str | None:
    """The last fenced block in Python; without one, the last that names no language. None if there
    is neither; a block that never ends is none. A block in a list stands as far to the right as its
    fence does, and its lines lose that much.
    """
    blocks: dict[bool, str] = {}
    fence, language, indent, lines = "", "", 0, []
    for line in text.split("\n"):  # a literal may hold any of Unicode's other ends of a line
        found = _FENCE.fullmatch(line.rstrip())
        if not fence:
            if found:
                indent, fence, language = len(found[1]), found[2], found[3].strip().lower()
                lines = []
        elif _ends(found, fence, indent):
            if language in (*_PYTHON, ""):
                blocks[language != ""] = "\n".join(lines) + "\n"
            fence = ""
        else:
            blanks = len(line) - len(line.lstrip(" "))
            lines.append(line[min(blanks, indent) :])
    return blocks.get(True, blocks.get(False))


def _ends(found: re.Match | None, fence: str, indent: int) -> bool:
    if found is None or len(found[1]) > indent + _CLOSES:
        return False
    return len(found[2]) >= len(fence) and not found[3].strip()


_Test = Callable[[Runner, str], str]
"""Why it fails; empty if it passes"""


def _tests(fields: Any) -> Iterator[_Test]:
    tests, cases = fields.get("tests", []), fields.get("cases", [])
    texts = [tests] if isinstance(tests, str) else tests
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"tests is {shown(tests)}; allowed: a text, or a list of texts")
    if not isinstance(cases, list) or not all(map(_is_case, cases)):
        raise ValueError(f"cases is {shown(cases)}; allowed: a list of objects of input and output")
    if not texts and not cases:
        raise ValueError("the prompt has no tests; allowed: tests, cases")
    for text in texts:
        yield _asserts(text)
    for case in cases:
        yield _prints(case["input"], case["output"])


def _is_case(case: Any) -> bool:
    named = isinstance(case, dict) and set(case) == {"input", "output"}
    return named and all(isinstance(text, str) for text in case.values())


def _asserts(tests: str) -> _Test:
    def why(runner: Runner, code: str) -> str:
        word = secrets.token_hex(16)
        ran = runner.run(Program(("-c", _HARNESS), handed=json.dumps([code, tests, word])))
        if ran.trouble:
            return ran.trouble
        return "" if ran.told == word.encode() else "it ended before the tests did"

    return why


def _prints(given: str, wanted: str) -> _Test:
    def why(runner: Runner, code: str) -> str:
        ran = runner.run(Program(("-c", _MAIN), {"main.py": code}, given))
        if ran.trouble:
            return ran.trouble
        return "" if _lines(ran.output) == _lines(wanted) else f"it printed {shown(ran.output)}"

    return why


def _lines(text: str) -> list[str]:
    """Without blanks at the ends of lines and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
