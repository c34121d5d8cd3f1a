"""Calls functions in a child process, so that the parent survives a call that hangs or crashes.

A child imports torch and opens the GPU once, then serves one call after the other. If a call
crashes the child, exceeds its time limit or raises an error of the GPU, the child is killed, and
the next call starts a new child. The parent never uses the GPU.
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

# A child must start within this many seconds. The first one is slow: it reads torch from disk.
START_LIMIT = 180.0
# A child that exceeded its time limit gets this many seconds to print its traceback.
DUMP_SECONDS = 1.0
# A killed child gets this many seconds to exit.
STOP_SECONDS = 30.0
# A stored error message has at most this many characters. A compiler's message can be very long.
REASON_LENGTH = 500
TRACE = "(most recent call first)"
PR_SET_PDEATHSIG = 1  # option of Linux's prctl: the signal that a process gets if its parent ends
# Matches the messages of errors after which a process may be unable to use its GPU, such as a
# failed kernel or a failed graph capture.
GPU_ERROR = re.compile(r"cuda|cudnn|cublas|captur|hip error", re.IGNORECASE)


class Answer(NamedTuple):
    """The outcome of a call.

    Attributes:
        status: ``measured``, ``skipped`` (the provider is not available), ``refused`` (the
            provider's result is wrong) or ``failed``.
        value: the function's return value if the status is ``measured``, otherwise None.
        reason: why the status is not ``measured``. Tables only show the first line.
        usable: whether the child can serve another call.
        timed_out: whether the call exceeded its time limit.
    """

    status: str
    value: Any = None
    reason: str = ""
    usable: bool = True
    timed_out: bool = False


class ChildFailed(Exception):
    """Raised if no child can be started, or if a child can't describe or measure the device."""


class Child:
    """A process that serves calls, and is replaced by a new one when it can't serve further calls.

    At the end of a ``with`` block, the process and the processes that it started are killed.
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
        """The id of the process, or None if no process is running."""
        return self._process.pid if self._process else None

    def call(self, function: str, *arguments: Any, limit: float) -> Answer:
        """Calls a function in the child. The answer reports errors, crashes and timeouts.

        Args:
            function: import path of the function, ``module:name``.
            arguments: arguments of the function. The arguments and the result are pickled.
            limit: time limit of the call in seconds, not including the start of the child. A child
                whose call exceeds the limit is killed.

        Raises:
            ChildFailed: if no child can be started.
        """
        connection = self._started()
        with suppress(ConnectionError):  # if the child has died since its last answer
            connection.send((function, arguments))
        answer = self._received(connection, limit)
        if not answer.usable:
            self.stop()
        return answer

    def stop(self) -> None:
        """Kills the child, if one is running, and the processes that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # if the processes have already exited
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the child can't exit while the driver hangs
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
            process_group=0,  # a new group, which stop() kills as a whole and Ctrl-C does not reach
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
        """Appends the child's traceback, or else the end of its output, to an error message."""
        assert self._output is not None
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        text = text.partition("\nExtension modules:")[0].strip()
        # faulthandler prints the innermost call first, so the start of its traceback is kept.
        trace = text.rfind(TRACE)
        end = text[-REASON_LENGTH:] if trace < 0 else text[max(trace - REASON_LENGTH // 2, 0) :]
        return f"{reason}\n{end[:REASON_LENGTH]}".strip()


def serve(descriptor: int) -> None:
    """Answers calls until the parent closes the connection. This function runs in the child."""
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
    except Exception as error:  # the failure of an implementation is recorded as a result
        reason = f"{type(error).__name__}: {error}"[:REASON_LENGTH]
        answer = Answer("failed", reason=reason, usable=not _spoils_gpu(error))
    if not answer.usable:
        return answer
    try:
        _release()
    except RuntimeError as error:  # a kernel of the call failed after the call had returned
        reason = f"{type(error).__name__}: {error}"[:REASON_LENGTH]
        return Answer("failed", reason=reason, usable=False)
    return answer


def _spoils_gpu(error: BaseException) -> bool:
    """Returns whether an error, or one that caused it, may have made the GPU unusable."""
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
