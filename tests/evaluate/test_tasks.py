"""lm-eval's tasks through the command: four local ones of known shapes, and the protocol's runs."""

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from dsv3_jax.evaluate.__main__ import main
from dsv3_jax.evaluate.protocol import runs_of
from tests.checkpoint.run_folders import write_run
from tests.commands import mistake_of
from tests.evaluate.subjects import make_subject
from tests.inference.conftest import _quick  # noqa: F401
from tests.inference.engines import programs_compiled_once

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # lm-eval's and its many requirements' own
]
TASKS = Path(__file__).parent / "tasks"
FIFTY = """task: fifty
custom_dataset: !function fifty.rows
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
metric_list:
  - metric: !function fifty.vowels
    aggregation: mean
    higher_is_better: true
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
metadata: {version: 2.0}
"""
FIFTY_PY = '''"""Fifty samples whose score is what was written."""

from datasets import Dataset


def rows(**metadata):
    rows = [{"text": f"sample {i}", "target": ""} for i in range(50)]
    return {"test": Dataset.from_list(rows)}


def vowels(references, predictions):
    return sum(letter in "aeiou" for letter in predictions[0])
'''


@pytest.fixture(scope="module", autouse=True)
def _lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once() -> Iterator[None]:
    with programs_compiled_once():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", 5)


def evaluate(run: Path, out: Path, *args: object) -> tuple[dict, dict[str, list[dict]]]:
    """What results.json holds, and the samples of each task."""
    sizes = ("--rows", 8, "--page-slots", 64, "--pages", 8, "--batch", 8, "--dtype", "float32")
    assert not main(["--checkpoint", str(run), "--out", str(out), *map(str, (*sizes, *args))])
    samples = {
        file.stem.removeprefix("samples_"): [json.loads(line) for line in file.open()]
        for file in out.glob("samples_*.jsonl")
    }
    return json.loads((out / "results.json").read_text()), samples


def test_four_local_tasks_run_from_end_to_end(run, tmp_path, capsys):
    names = ["local_mmlu", "local_gsm8k", "local_humaneval", "local_ceval"]
    content, samples = evaluate(
        run,
        tmp_path / "out",
        *("--tasks", ",".join(names), "--include-path", TASKS),
        *("--confirm-run-unsafe-code", "--max-tokens", 8, "--num-fewshot", 1),
    )
    page = capsys.readouterr().out
    assert (tmp_path / "out" / "results.md").read_text() == page
    scores = {(task["task"], task["metric"], task["filter"]): task for task in content["tasks"]}
    expected = {
        ("local_mmlu", "acc", "none"): (1, 10),
        ("local_ceval", "acc", "none"): (1, 8),
        ("local_ceval", "acc_norm", "none"): (1, 8),
        ("local_gsm8k", "exact_match", "strict-match"): (1, 8),
        ("local_gsm8k", "exact_match", "flexible-extract"): (1, 8),
        ("local_humaneval", "pass_at_1", "create_test"): (0, 6),  # defined without examples
    }
    assert {key: (task["shots"], task["samples"]) for key, task in scores.items()} == expected
    for (name, metric, _), task in scores.items():
        assert len(task["runs"]) == 1
        assert task["version"] == "1.0"
        assert f"| {name} | 1.0 |" in page
        assert 0 <= task["mean"] <= 1, metric
    assert set(samples) == set(names)
    # The likeliest of four letters, by the log-likelihoods that were told.
    for name in ("local_mmlu", "local_ceval"):
        right = []
        for sample in samples[name]:
            logprobs = [float(choice[0]) for choice in sample["filtered_resps"]]
            right.append(int(np.argmax(logprobs)) == int(sample["target"]))
        assert scores[name, "acc", "none"]["mean"] == pytest.approx(np.mean(right))
    assert content["made"]["versions"]["lm_eval"]
    assert content["counts"]["written"] == 14


def test_a_set_of_fifty_runs_at_every_temperature_with_mean_and_spread(run, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "fifty.yaml").write_text(FIFTY)
    (tmp_path / "tasks" / "fifty.py").write_text(FIFTY_PY)
    content, samples = evaluate(
        run,
        tmp_path / "out",
        *("--tasks", "fifty", "--include-path", tmp_path / "tasks"),
        *("--temperatures", 0.5, 1.5, "--repeats", 2, "--seed", 3),
    )
    (task,) = content["tasks"]
    runs = [(one["temperature"], one["seed"]) for one in task["runs"]]
    assert [temperature for temperature, _ in runs] == [0.5, 0.5, 1.5, 1.5]
    assert len({seed for _, seed in runs}) == 4
    assert (task["samples"], task["of"]) == (50, 50)
    assert task["version"] == "2.0"
    # Out of the samples themselves.
    texts: dict[tuple, list[str]] = {}
    for sample in samples["fifty"]:
        key = sample["temperature"], sample["seed"]
        texts.setdefault(key, []).append(sample["filtered_resps"][0])
    assert [len(texts[run_]) for run_ in runs] == [50] * 4
    means = [np.mean([sum(c in "aeiou" for c in text) for text in texts[key]]) for key in runs]
    assert [one["value"] for one in task["runs"]] == pytest.approx(means)
    assert task["mean"] == pytest.approx(np.mean(means))
    assert task["spread"] == pytest.approx(np.std(means, ddof=1))
    assert len({tuple(texts[key]) for key in runs}) == 4
    assert task["spread"] > 0


def test_a_chat_model_is_asked_through_its_template(run, tmp_path):
    (tmp_path / "chat.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    content, samples = evaluate(
        run,
        tmp_path / "out",
        *("--tasks", "local_mmlu,local_gsm8k", "--include-path", TASKS, "--limit", 2),
        *("--chat", "--chat-template", tmp_path / "chat.jinja", "--max-tokens", 4),
    )
    runs = {
        task["task"]: [run_["temperature"] for run_ in task["runs"]] for task in content["tasks"]
    }
    assert runs == {"local_mmlu": [None], "local_gsm8k": [0.3, 0.6, 0.9]}
    assert content["made"]["protocol"] == "chat (report 5.3.1)"
    for name in runs:
        for sample in samples[name]:
            context = sample["arguments"][0][0]
            assert context.startswith("<｜begin▁of▁sentence｜><user>")
            assert context.endswith("<answer>")


def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch):
    from dsv3_jax.evaluate import tasks

    # lm-eval's own tasks take ten seconds to list.
    local = partial(tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        tasks, "TaskManager", lambda **how: local(**how | {"include_defaults": False})
    )
    (tmp_path / "broken").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.yaml").write_text("task: own\n- [\n")
    (tmp_path / "broken" / "a.yaml").write_text("task: own\ncustom_dataset: !function gone.rows\n")
    here = ["--checkpoint", run, "--include-path", TASKS, "--tasks"]
    for args, said in (
        ([*here, "local_mmul"], "no task 'local_mmul'; perhaps you meant local_mmlu"),
        ([*here, "local_mmlu,zzzz"], "no task 'zzzz'; lm-eval ls tasks lists its own"),
        ([*here, "local_humaneval"], "local_humaneval runs what the model writes, as you"),
        (
            ["--checkpoint", run, "--include-path", tmp_path / "no", "--tasks", "x"],
            "no such folder",
        ),
        (
            ["--checkpoint", run, "--include-path", tmp_path / "broken", "--tasks", "own"],
            "--tasks own: ",
        ),
        (
            ["--checkpoint", run, "--include-path", tmp_path / "torn", "--tasks", "own"],
            "a.yaml: ParserError: ",
        ),
    ):
        assert said in mistake_of(main, [*map(str, args)], capsys)


def test_what_goes_wrong_in_a_task_while_it_runs_is_one_line(run, tmp_path, capsys):
    """Metrics are the task's own code; a line of its data is no JSON."""
    (tmp_path / "own.py").write_text(
        "def rate(doc, results):\n    raise LookupError('no\\nmark')\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "torn.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question":\n')
    for name, rows in (("fails", "rows"), ("reads", "torn")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / rows}.jsonl\n"
            "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
            "process_results: !function own.rate\n"
        )
    here = ["--checkpoint", run, "--include-path", tmp_path, "--tasks"]
    for name, said in (
        ("fails", "error: --tasks fails: LookupError: no mark"),
        ("reads", "error: --tasks reads: DatasetGenerationError: An error occurred.*: .*JSON"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, [*here, name])])
        assert stopped.value.code == 2
        assert re.match(said, capsys.readouterr().err.splitlines()[-1])


def test_a_template_that_refuses_the_questions_is_named(run, tmp_path, capsys):
    (tmp_path / "chat.jinja").write_text("{{ raise_exception('nobody asks') }}")
    args = ["--checkpoint", run, "--tasks", "local_mmlu", "--include-path", TASKS]
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, [*args, "--chat", "--chat-template", tmp_path / "chat.jinja"])])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1] == f"error: {tmp_path / 'chat.jinja'}: nobody asks"


def test_contexts_are_conversations_where_there_is_a_template():
    from dsv3_jax.data.chat import ChatTemplate
    from dsv3_jax.evaluate.conversations import Conversations
    from dsv3_jax.evaluate.harness import Harness

    subject = make_subject()[1]
    plain, chat = Harness(subject), Harness(subject, Conversations(subject.tokenizer))
    messages = [{"role": "user", "content": f"what is {subject.tokenizer.spelling_of(0)}?"}]
    expected = ChatTemplate(subject.tokenizer).encode(messages)
    assert chat.tok_encode(chat.apply_chat_template(messages)) == expected
    assert plain.tok_encode("text") == [subject.bos_id, *subject.encode("text")]
    assert chat.tok_encode("text", add_special_tokens=False) == subject.encode("text")
    assert plain.tokenizer_name != chat.tokenizer_name
    with pytest.raises(ValueError, match="a conversation is asked for; allowed: with --chat"):
        plain.apply_chat_template(messages)


@pytest.fixture(scope="module")
def programs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("programs", TASKS / "programs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_programs_pass_if_they_do_what_their_tests_say(programs, monkeypatch):
    monkeypatch.setattr(programs, "SECONDS", 3)
    lines = (TASKS / "local_humaneval.jsonl").read_text().splitlines()
    for doc in map(json.loads, lines):
        tests = f"{doc['test']}\ncheck({doc['entry_point']})"
        ((good, empty),) = programs.with_prompts([[doc["canonical_solution"], "    pass\n"]], [doc])
        assert programs.pass_at_1([tests], [[good]]) == 1
        assert programs.pass_at_1([tests], [[good, empty]]) == 0.5
    for body in ("while True: pass", "raise SystemExit(1)", "def", "\0"):
        assert not programs.passes(body, "")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (256, 0.0, 1.0, ())),
        ({"until": "\n", "max_gen_toks": 5}, (5, 0.0, 1.0, ("\n",))),
        ({"until": ["a", ""], "max_new_tokens": 6, "temperature": 0.5}, (6, 0.5, 1.0, ("a",))),
        ({"do_sample": False, "temperature": 0.5}, (256, 0.0, 1.0, ())),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, (256, 0.5, 0.9, ())),
        ({"top_k": -1, "num_beams": 1}, (256, 0.0, 1.0, ())),
    ],
)
def test_generation_is_asked_for_as_lm_eval_means_it(asked, expected):
    from lm_eval.models.utils import normalize_gen_kwargs

    from dsv3_jax.evaluate.harness import Harness

    harness = Harness(make_subject()[1])
    wish = harness._wishes(asked, 0)
    assert (wish.max_tokens, wish.temperature, wish.top_p, wish.stop) == expected
    theirs = normalize_gen_kwargs(asked)
    assert wish.max_tokens == theirs["max_gen_toks"]
    assert wish.temperature == theirs.get("temperature", 0.0)
    harness.seed, harness.temperature = 2**32 - 1, 0.7
    wish = harness._wishes(asked, 3)
    assert 0 <= wish.seed < 2**32
    assert wish.temperature == 0.7


def test_runs_of_a_task_that_repeats_its_requests_share_no_seed():
    """Its 64 requests of one sample would be those of the run before, shifted by one."""
    from dsv3_jax.evaluate.harness import Harness

    harness, seeds = Harness(make_subject()[1]), set()
    for run_ in runs_of(164, True, (0.7,), repeats=3):
        harness.seed = run_.seed
        seeds |= {harness._wishes({}, place).seed for place in range(64)}
    assert len(seeds) == 3 * 64


def test_generation_that_is_not_here_is_refused():
    from dsv3_jax.evaluate.harness import wishes_of

    for asked, said in (
        ({"top_k": 5}, "5; allowed: 0 or -1 or null"),
        ({"num_beams": 4}, "4; allowed: 1 or null"),
        ({"repetition_penalty": 1.1}, "1.1; allowed: until, do_sample, .*; and at .* top_k (0 or"),
        ({"until": [5]}, "[5]; allowed: a text or a list of them"),
        ({"until": {"a": 1}}, "{'a': 1}; allowed: a text or a list of them"),
        ({"temperature": "hot"}, "'hot'; allowed: a number"),
        ({"max_gen_toks": "many"}, "'many'; allowed: a number"),
        ({"top_p": [1]}, "[1]; allowed: a number"),
    ):
        line = f"generation_kwargs: {next(iter(asked))} {said}"
        with pytest.raises(ValueError, match=re.escape(line).replace(r"\.\*", ".*")):
            wishes_of(asked)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("{top_k: 5}", "generation_kwargs: top_k 5; allowed: 0 or -1 or null"),
        ("{temperature: -1}", "temperature is -1.0; allowed: from 0 to below 1e38"),
    ],
)
def test_generation_that_is_not_here_is_told_before_a_model_is_opened(
    tmp_path, capsys, asked, said
):
    """With its task's name, whatever other tasks there are."""
    (tmp_path / "fifty.py").write_text(FIFTY_PY)
    for name, kwargs in (("fifty", "{until: []}"), ("other", asked)):
        text = FIFTY.replace("task: fifty", f"task: {name}")
        text = re.sub("generation_kwargs: .*", f"generation_kwargs: {kwargs}", text)
        (tmp_path / f"{name}.yaml").write_text(text)
    args = ["--checkpoint", tmp_path / "none", "--include-path", tmp_path, "--tasks", "fifty,other"]
    line = mistake_of(main, [*map(str, args)], capsys)
    assert f"--tasks other: {said}" in line
