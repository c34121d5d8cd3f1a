"""Runs functions one after another in a child process, which may hang or die without the parent.

A child imports torch and opens the GPU once, and serves calls until it dies, takes too long or has
met an error after which its GPU can't be trusted; the next call then starts another child. The parent
never uses the GPU.
"""

import ctypes
import faulthandler
import gc
import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any, NamedTuple

# Seconds until a child has to be ready; its imports are read from a cold disk the first time.
START_LIMIT = 180.0
# Seconds for a child that takes too long to write where it is.
DUMP_SECONDS = 1.0
# Seconds for a killed child to end.
STOP_SECONDS = 30.0
# A reason longer than this is a compiler's trace.
REASON_LENGTH = 500
TRACE = "(most recent call first)"
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Messages after which the GPU is not used again: a failed kernel, or a failed capture of a graph.
GPU_ERROR = re.compile(r"cuda|cudnn|cublas|captur|hip error", re.IGNORECASE)


class Answer(NamedTuple):
    """What became of a call.

    Attributes:
        status: ``measured``, ``skipped`` (the provider is missing here), ``refused`` (it computes
            something else) or ``failed``.
        value: what the function returned.
        reason: why it was not measured; the first line is short.
        usable: whether the child can serve another call.
        timed_out: whether the call took longer than its limit.
    """

    status: str
    value: Any = None
    reason: str = ""
    usable: bool = True
    timed_out: bool = False


class ChildFailed(Exception):
    """A child did not start, or a call that nothing works without has failed."""


class Child:
    """A process that serves calls, replaced when it can't serve another.

    Use it as a context: leaving it kills the process and all that it started.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._output: IO[bytes] | None = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The process's id, if one is running."""
        return self._process.pid if self._process else None

    def call(self, function: str, *arguments: Any, limit: float) -> Answer:
        """Calls a function in the child; whatever happens there is in the answer.

        Args:
            function: its import path, ``module:name``.
            arguments: for it; they and its result are pickled.
            limit: seconds after which the child is killed; starting it does not count.

        Raises:
            ChildFailed: if no child can be started.
        """
        connection = self._started()
        with suppress(ConnectionError):  # it has died since its last answer
            connection.send((function, arguments))
        answer = self._received(connection, limit)
        if not answer.usable:
            self.stop()
        return answer

    def stop(self) -> None:
        """Kills the child and all that it started, if there is one."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # all of them are gone
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs can keep it from ending
            self._process.wait(STOP_SECONDS)
        for end in (self._connection, self._output):
            if end is not None:
                end.close()
        self._process = self._connection = self._output = None

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        ours, theirs = Pipe()
        self._connection, self._output = ours, tempfile.TemporaryFile()  # noqa: SIM115  # stop() closes it
        command = f"from benchmarks.child import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            process_group=0,  # a group to kill, which Ctrl-C does not reach
        )
        theirs.close()
        answer = self._received(ours, START_LIMIT)
        if answer.status == "failed":
            self.stop()
            raise ChildFailed(f"a child could not start: {answer.reason}")
        return ours

    def _received(self, connection: Connection, limit: float) -> Answer:
        assert self._process is not None
        try:
            if connection.poll(limit):
                answer: Answer = connection.recv()
                return answer
        except (EOFError, ConnectionError):
            code = self._process.wait()
            name = (
                f"killed by signal {signal.Signals(-code).name}"
                if code < 0
                else f"exited with code {code}"
            )
            return Answer("failed", reason=self._with_output(name), usable=False)
        os.kill(self._process.pid, signal.SIGUSR1)  # it writes the lines that it is at
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DUMP_SECONDS)
        reason = self._with_output(f"timed out after {limit:.0f} s")
        return Answer("failed", reason=reason, usable=False, timed_out=True)

    def _with_output(self, reason: str) -> str:
        """A reason, followed by the end of what the child wrote."""
        assert self._output is not None
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        text = text.partition("\nExtension modules:")[0].strip()
        # faulthandler's trace begins with the innermost call.
        trace = text.rfind(TRACE)
        end = text[-REASON_LENGTH:] if trace < 0 else text[max(trace - REASON_LENGTH // 2, 0) :]
        return f"{reason}\n{end[:REASON_LENGTH]}".strip()


def serve(descriptor: int) -> None:
    """The child: answers calls until the parent has closed the connection."""
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the GPU's memory would be in the dump
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even if the parent is killed
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    import benchmarks.measure  # noqa: F401  # before a limit begins

    connection.send(Answer("measured"))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(attempt(function, arguments))


def attempt(function: str, arguments: tuple[Any, ...]) -> Answer:
    """Calls a function of this process, and frees the memory that it leaves."""
    from benchmarks.check import WrongResult
    from benchmarks.providers.base import Unavailable

    try:
        module, _, name = function.partition(":")
        answer = Answer("measured", getattr(importlib.import_module(module), name)(*arguments))
    except Unavailable as error:
        answer = Answer("skipped", reason=str(error))
    except WrongResult as error:
        answer = Answer("refused", reason=str(error))
    except Exception as error:  # a provider's failure is a result, and no reason to stop
        reason = f"{type(error).__name__}: {error}"[:REASON_LENGTH]
        answer = Answer("failed", reason=reason, usable=not _spoils_gpu(error))
    if not answer.usable:
        return answer
    try:
        _release()
    except RuntimeError as error:  # the call's last kernel has failed
        reason = f"{type(error).__name__}: {error}"[:REASON_LENGTH]
        return Answer("failed", reason=reason, usable=False)
    return answer


def _spoils_gpu(error: BaseException) -> bool:
    """Whether an error, or one that led to it, may leave the GPU unusable in this process."""
    import torch

    kinds = (torch.OutOfMemoryError, torch.AcceleratorError)
    return any(isinstance(e, kinds) or GPU_ERROR.search(str(e)) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
