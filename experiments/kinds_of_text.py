"""Three kinds of text that come with Python and that no run on the standard library has seen."""

import sysconfig
from pathlib import Path

from routing import Trained

from dsv3_jax.data.documents import Document
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.tokenised import tokenize

# None is trained on: the corpus is .py without tests and IDLE. Tests in Python; change logs and
# notes in English; operands and results of arithmetic.
KINDS = {
    "source": "test/test_[ab]*.py",
    "prose": "idlelib/*.txt",
    "numbers": "test/decimaltestdata/dd*.decTest",
}


def rows_of(pattern: str, of: Trained) -> Rows:
    """Files below the standard library as rows of a run's tokens.

    ValueError if there are none: some distributions leave them out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = [
        Document(path.relative_to(root).as_posix(), path.read_text("utf-8", "replace"))
        for path in sorted(root.glob(pattern))
    ]
    if not documents:
        raise ValueError(f"no {pattern} in {root}; allowed: a Python with its whole library")
    corpus = tokenize(documents, of.tokenizer, of.cfg.model.vocab_size)
    return Rows(corpus, of.cfg.data.length)
