"""What all processes of a run agree on before it begins: devices, configuration, text, folder."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Corpus, build_corpus
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.parallel import processes
from dsv3_jax.train.folder import RunFolder, new_run


def check_processes(cfg: RunConfig, resume: RunFolder | None, init_from: RunFolder | None) -> None:
    """ValueError if processes have nothing to do, or not the same."""
    if processes.count() == 1:
        return
    if cfg.mesh.size != jax.device_count():
        raise ValueError(
            f"the axes of mesh multiply to {cfg.mesh.size}, and {processes.count()} processes have "
            f"{jax.device_count()} devices; allowed: the same number"
        )
    folders = (str((folder and folder.path) or "") for folder in (resume, init_from))
    processes.check_same("configuration", "configuration", " ".join((cfg.to_json(), *folders)))


def joint_corpus(cfg: RunConfig, kept: Tokenizer | None, say: Callable[[str], None]) -> Corpus:
    """The run's text. The first process makes what the others then find in the cache."""
    built = []

    def build() -> str:
        seed, size = cfg.train.seed, cfg.model.vocab_size
        built.append(build_corpus(cfg.data, size, seed, say, kept))
        return ""

    processes.of_first("text", build)
    if not built:
        build()
    (corpus,) = built
    contents = f"{corpus.tokenizer.content_hash} {corpus.content_hash}"
    processes.check_same("contents", "text or tokenizer", contents)
    return corpus


@contextlib.contextmanager
def joint_folder(cfg: RunConfig, resume: RunFolder | None) -> Iterator[RunFolder]:
    """The resumed run's, or a new one, which the first process makes for all."""
    if resume:
        yield resume
        return
    with contextlib.ExitStack() as stack:

        def make() -> str:
            return str(stack.enter_context(new_run(cfg.output)).path)

        yield RunFolder(Path(processes.of_first("folder", make)))
