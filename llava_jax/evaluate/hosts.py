"""Several processes that answer one benchmark: each a share of the questions, or all of them every question.

A model that fits the devices of each process is replicated, and the shards are merged at the end. A larger one is
sharded over the devices of all processes, which then compute each answer together; process 0 writes it.
"""

import traceback
import types
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from llava_jax import distributed, errors, files
from llava_jax.errors import UsageError
from llava_jax.evaluate import answer, answers
from llava_jax.evaluate.answer import Job, Responder, Response
from llava_jax.evaluate.answers import Answer
from llava_jax.evaluate.questions import Question

RunFunction = Callable[[Responder, int, int], tuple[Answer, ...]]  # (responder, host, hosts): `answer.run`


def run_all(
    run: RunFunction, questions: Sequence[Question], respond: Responder, out: epath.PathLike, run_id: str,
    spans_processes: bool,
) -> tuple[Answer, ...]:  # fmt: skip
    """The answers to all questions, on process 0; on the others those of their own share, if they have one.

    Args:
      spans_processes: the model lies on the devices of all processes.

    Raises:
      UsageError: the processes have not the same command, checkpoint or `out`.
    """
    distributed.agree({"--out": str(out), "the run (questions, settings and checkpoint)": run_id})
    if spans_processes:
        return _answer_together(run, questions, respond)
    index, count = distributed.index(), distributed.count()
    shards = [answer.shard(out, number, count) for number in range(count)]
    answers.write(shards[index], answer.resume(shards[index], run_id).values())
    _check_shared(out, shards)
    share = run(respond, index, count)
    distributed.exchange("answered", True)
    if index:
        return share
    merged = answers.merge(questions, shards)
    answers.write(out, merged)
    return merged


def _answer_together(run: RunFunction, questions: Sequence[Question], respond: Responder) -> tuple[Answer, ...]:
    """Process 0 sends the jobs that are not answered yet; the others compute the same."""

    def lead(jobs: Sequence[Job]) -> Iterator[tuple[int, Response]]:
        distributed.exchange("jobs", [[job.question.id, job.repeat] for job in jobs])
        yield from respond(jobs)

    if distributed.index() == 0:
        return run(lead, 0, 1)
    by_id = {question.id: question for question in questions}
    for _ in respond([Job(by_id[name], repeat) for name, repeat in distributed.exchange("jobs", [])[0]]):
        pass
    return ()


def _check_shared(out: epath.PathLike, shards: Sequence[epath.Path]) -> None:
    """Raises UsageError where process 0, which merges the shards, does not see those of the others."""
    distributed.exchange("shards are there", True)
    unseen = [number for number, shard in enumerate(shards) if not files.exists(shard)]
    unseen = distributed.exchange("shards that are not seen", unseen)[0]
    if unseen:
        raise UsageError(
            f"--out {out}: process 0 does not see what process {unseen[0]} of {len(shards)} writes next to it: want a "
            "place that all hosts share; or start each with --host I --hosts N, and `merge` their files"
        )


def end_together(
    kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
) -> bool:
    """Where this process fails it ends the others, which would wait for it, with its exit code (for an ExitStack)."""
    if distributed.count() > 1 and error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        code = errors.exit_code(error)
        if code is None and not distributed.is_ending():
            traceback.print_exception(kind, error, trace)
        distributed.leave(errors.CRASHED if code is None else code, f"evaluate: {error}")
    return False
