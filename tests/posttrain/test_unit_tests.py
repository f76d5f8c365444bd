"""Rewards of code: which block is taken, what passes, and what only seems to."""

from typing import Any

import pytest

from dsv3_jax.posttrain.attempts import Attempt, Rated
from dsv3_jax.posttrain.code_runner import Program, Ran, Runner, find_box
from dsv3_jax.posttrain.rewards import Means, rewards
from dsv3_jax.posttrain.sandbox.limits import Limits
from dsv3_jax.posttrain.unit_tests import UnitTests, code_block

DOUBLE = "def double(x):\n    return 2 * x\n"
ADD = "if __name__ == '__main__':\n    print(sum(map(int, input().split())))\n    exit()\n"
TELLS = """
import os
for number in range(3, 20):
    try: os.write(number, b'passed')
    except OSError: pass
os._exit(0)
"""


def attempt(code: str, **fields: Any) -> Attempt:
    return Attempt("Write it.", f"Here it is:\n```python\n{code}```\nDone.", fields=fields)


@pytest.fixture(scope="module")
def runner() -> Runner:
    """In a box if there is one: these programs are ours."""
    return Runner(find_box()[0], Limits(seconds=60.0))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("no code", None),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\n```py\nb\n\nc\n```", "b\n\nc\n"),
        ("```python\na\n```\nIt prints\n```\n1\n```", "a\n"),
        ("```text\nx\n```", None),
        ("```\na\n```\n```bash\nx\n```", "a\n"),
        ("````Python\n```\ninner\n```\n````", "```\ninner\n```\n"),
        ("```python\na\n```\n```python\nnever closed", "a\n"),
        ("  ```python\n  a\n  ```", "a\n"),
        ("1. So\n   ```python\n   if a:\n       b\n\n  c\n\td\n   ```", "if a:\n    b\n\nc\n\td\n"),
        ("```python\na = '\u2028\x85\x0c'\n```", "a = '\u2028\x85\x0c'\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("1. a\n   10. b\n       ```python\n       c\n         ```\n", "c\n"),
        ('```python\n"""\n    ```\n"""\n```', '"""\n    ```\n"""\n'),
        ("``python\na\n``", None),
        ("```python\n```", "\n"),
    ],
)
def test_the_last_block_in_python_is_the_code(text: str, code: str | None):
    assert code_block(text) == code


def test_code_is_worth_1_if_all_tests_pass_or_its_share(runner: Runner):
    asserts = ["assert double(2) == 4", "assert double(3) == 7", "assert double('a') == 'aa'"]
    cases = [{"input": "1 2", "output": "3"}, {"input": "4 5\n", "output": "9\n\n"}]
    attempts = [
        attempt(DOUBLE, tests=asserts[0] + "\n" + asserts[2]),
        attempt(DOUBLE, tests=asserts),
        attempt(ADD, cases=cases),
        attempt(ADD, cases=[*cases, {"input": "1 1", "output": "3"}]),
        Attempt("Write it.", "I cannot.", fields={"tests": asserts}),
    ]
    assert UnitTests(runner).rate(attempts) == [
        Rated(1.0, "all of 1"),
        Rated(0.0, "test 2 of 3: tests.py line 1: AssertionError"),
        Rated(1.0, "all of 2"),
        Rated(0.0, "test 3 of 3: it printed '2\\n'"),
        Rated(0.0, "no code block"),
    ]
    shares = UnitTests(runner, share=True).rate(attempts)
    assert [one.value for one in shares] == [1.0, 2 / 3, 1.0, 2 / 3, 0.0]
    assert UnitTests(runner, seconds=1e-9).rate(attempts[:1]) == [
        Rated(0.0, "test 1 of 1: out of time")
    ]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os\nos._exit(0)", "it ended before the tests did"),
        ("raise SystemExit", "it ended before the tests did"),
        ("exit()", "it ended before the tests did"),
        (TELLS, "it ended before the tests did"),
        ("def double(x): return", "tests.py line 1: AssertionError"),
        ("def double(x) return", "solution.py line 1: SyntaxError"),
        ("(" * 5000, "solution.py line 1: SyntaxError: too many nested parentheses"),
        ("-" * 500_000 + "1", "MemoryError"),
    ],
)
def test_code_that_only_seems_to_pass_does_not(runner: Runner, code: str, why: str):
    (rated,) = UnitTests(runner).rate([attempt(code + "\n", tests="assert double(2) == 4")])
    assert (rated.value, rated.failed) == (0.0, False)
    assert why in rated.reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the prompt has no tests; allowed: tests, cases"),
        ({"tests": 1}, "tests is 1; allowed: a text, or a list of texts"),
        ({"tests": [1]}, "allowed: a text, or a list of texts"),
        ({"cases": {"input": ""}}, "allowed: a list of objects of input and output"),
        ({"cases": [{"input": "1"}]}, "allowed: a list of objects of input and output"),
        ({"cases": [{"input": "1", "output": 2}]}, "allowed: a list of objects"),
    ],
)
def test_tests_that_cannot_be_read_are_a_failure(runner: Runner, fields: dict, message: str):
    (rated,) = UnitTests(runner).rate([attempt(DOUBLE, **fields)])
    assert rated.failed
    assert message in rated.reason


def test_a_program_that_cannot_be_started_is_a_failure_and_the_work_goes_on():
    class Broken(Runner):
        def run(self, program: Program) -> Ran:
            raise OSError("no more processes")

    one = attempt(DOUBLE, tests="assert True")
    with rewards(["tests*2", "format:code-block"], Means(Broken(None)), failed=-1.0) as made:
        (total,) = made.rate([one])
    assert total.value == -1.0
    assert total.parts["tests"] == Rated(-1.0, "OSError: no more processes", True)


def test_tests_are_a_reward_by_name(runner: Runner):
    one = attempt(DOUBLE, tests=["assert double(2) == 4", "assert double(2) == 5"])
    with rewards(["tests", "tests:share*4"], Means(runner)) as made:
        assert [total.value for total in made.rate([one])] == [2.0]
