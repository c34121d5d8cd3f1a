"""Calls functions in a child process, so that the parent survives a call that hangs or crashes.

A child imports torch and opens the GPU once. It serves calls until one crashes it, exceeds its time
limit or raises an error after which its GPU can't be trusted; the next call starts a new child. The
parent never uses the GPU.
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

# Seconds for a child to start; the first time it reads its imports from a cold disk.
START_LIMIT = 180.0
# Seconds for a child that exceeded its time limit to print its traceback.
DUMP_SECONDS = 1.0
# Seconds to wait for a killed child to exit.
STOP_SECONDS = 30.0
# Reasons are cut to this many characters; a compiler's can be much longer.
REASON_LENGTH = 500
TRACE = "(most recent call first)"
PR_SET_PDEATHSIG = 1  # an operation of Linux's prctl
# Error messages of a failed kernel or graph capture, after which the process can't use its GPU.
GPU_ERROR = re.compile(r"cuda|cudnn|cublas|captur|hip error", re.IGNORECASE)


class Answer(NamedTuple):
    """The outcome of a call.

    Attributes:
        status: ``measured``, ``skipped`` (the provider is not available), ``refused`` (its result
            is wrong) or ``failed``.
        value: the function's return value.
        reason: why the call was not measured; the first line is short.
        usable: whether the child can serve another call.
        timed_out: whether the call exceeded its time limit.
    """

    status: str
    value: Any = None
    reason: str = ""
    usable: bool = True
    timed_out: bool = False


class ChildFailed(Exception):
    """A child did not start, or a call that the campaign needs has failed."""


class Child:
    """A process that serves calls, and is replaced once it can't serve another.

    Leaving it as a context manager kills the process and the processes that it started.
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
        """The id of the process, or None if none is running."""
        return self._process.pid if self._process else None

    def call(self, function: str, *arguments: Any, limit: float) -> Answer:
        """Calls a function in the child; errors, crashes and timeouts are reported in the answer.

        Args:
            function: import path of the function, ``module:name``.
            arguments: arguments of the function; they and its result are pickled.
            limit: time limit of the call in seconds, which does not include the start of the child.
                A child that exceeds it is killed.

        Raises:
            ChildFailed: if no child can be started.
        """
        connection = self._started()
        with suppress(ConnectionError):  # the child has died since its last answer
            connection.send((function, arguments))
        answer = self._received(connection, limit)
        if not answer.usable:
            self.stop()
        return answer

    def stop(self) -> None:
        """Kills the child, if one is running, and the processes that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # all of them have exited
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs can keep it from exiting
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
            process_group=0,  # stop() kills the group; Ctrl-C does not reach it
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
        os.kill(self._process.pid, signal.SIGUSR1)  # faulthandler prints the child's traceback
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DUMP_SECONDS)
        reason = self._with_output(f"timed out after {limit:.0f} s")
        return Answer("failed", reason=reason, usable=False, timed_out=True)

    def _with_output(self, reason: str) -> str:
        """Appends the end of the child's output to a reason."""
        assert self._output is not None
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        text = text.partition("\nExtension modules:")[0].strip()
        # faulthandler prints the innermost call first.
        trace = text.rfind(TRACE)
        end = text[-REASON_LENGTH:] if trace < 0 else text[max(trace - REASON_LENGTH // 2, 0) :]
        return f"{reason}\n{end[:REASON_LENGTH]}".strip()


def serve(descriptor: int) -> None:
    """Runs in the child: answers calls until the parent closes the connection."""
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain the GPU's memory
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the child ends when the parent does
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    import benchmarks.measure  # noqa: F401  # so that no call's time limit includes the import

    connection.send(Answer("measured"))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(attempt(function, arguments))


def attempt(function: str, arguments: tuple[Any, ...]) -> Answer:
    """Calls a function in this process, then frees the memory that torch caches."""
    from benchmarks.check import WrongResult
    from benchmarks.providers.base import Unavailable

    try:
        module, _, name = function.partition(":")
        answer = Answer("measured", getattr(importlib.import_module(module), name)(*arguments))
    except Unavailable as error:
        answer = Answer("skipped", reason=str(error))
    except WrongResult as error:
        answer = Answer("refused", reason=str(error))
    except Exception as error:  # a provider's failure is a result
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
    """Whether an error, or one that caused it, may make the GPU unusable in this process."""
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
