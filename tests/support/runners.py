"""The same test on both of vLLM's model runners.

A test opens an engine and calls functions with it::

    with runner.open(model, max_num_seqs=8) as call:
        answers = call(exactness.generate, jobs, dict(temperature=0))

``v1`` does so in this process.  ``v2`` needs Triton in another state than V1 finds it in (see
`tests.support.interpreter`), which a process chooses once: its engines live in a child process, to
which functions go by name, arguments and results by pickle.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.support import engines, interpreter

ANSWER_SECONDS = 600
V2_NEEDS = "needs triton, in whose interpreter the V2 model runner's kernels run on a CPU"

Call = Callable[..., Any]


def has_v2() -> bool:
    return importlib.util.find_spec("triton") is not None


@contextmanager
def start(name: str) -> Iterator[Here | There]:
    """The runner ``v1`` or ``v2``; the test is skipped where it cannot be had."""
    if name == "v1":
        yield Here()
        return
    if not has_v2():
        pytest.skip(V2_NEEDS)
    there = There()
    try:
        yield there
    finally:
        there.stop()


class Here:
    """Engines in this process, on the runner that this process's environment chooses."""

    @contextmanager
    def open(self, model: Any, *, asynchronous: bool = False, **options: Any) -> Iterator[Call]:
        """An engine as `engines.engine` makes it; asynchronous: with asynchronous scheduling."""
        from tests.support import asynchronous as asynchronous_scheduling

        with pytest.MonkeyPatch.context() as patch:
            if asynchronous:
                asynchronous_scheduling.force(patch)
            with engines.engine(model, **options) as llm:
                yield lambda function, *args, **kwargs: function(llm, *args, **kwargs)


class There:
    """Engines on the V2 runner, in a child process that lives until `stop`."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    @contextmanager
    def open(self, model: Any, *, asynchronous: bool = False, **options: Any) -> Iterator[Call]:
        self._ask("open", model, {"asynchronous": asynchronous, **options})
        try:
            yield lambda function, *args, **kwargs: self._ask("call", function, args, kwargs)
        finally:
            self._ask("close")

    def stop(self) -> None:
        self._connection.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, *message: Any) -> Any:
        self._connection.send(message)
        if not self._connection.poll(ANSWER_SECONDS):
            self._process.kill()
            raise TimeoutError(f"no answer within {ANSWER_SECONDS} s to {message[:2]}")
        succeeded, answer = self._connection.recv()
        if not succeeded:
            raise AssertionError(f"in the process of the V2 model runner:\n{answer}")
        return answer


def _serve(connection: Connection) -> None:
    engines.prepare_environment()
    interpreter.prepare()
    here, opened = Here(), ExitStack()
    call: Call | None = None
    while True:
        try:
            kind, *arguments = connection.recv()
        except EOFError:
            return
        answer = None
        try:
            if kind == "open":
                assert call is None, "one engine at a time"
                model, options = arguments
                engine: AbstractContextManager[Call] = here.open(model, **options)
                call = opened.enter_context(engine)
            elif kind == "close":
                call = None
                opened.close()
            else:
                function, args, kwargs = arguments
                assert call is not None
                answer = call(function, *args, **kwargs)
        except Exception:
            connection.send((False, traceback.format_exc()))
        else:
            connection.send((True, answer))
