"""Makes triton's interpreter patch ``triton.language`` once per launch for each module of kernels.

By default, every call of a device function patches ``triton.language`` again. This takes about half
of the tests' time.
"""

from typing import Any

from triton.runtime import interpreter

_patched: set[int] = set()


def patch_once() -> None:
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_lang(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in _patched:
            return None
        _patched.add(module)
        return patch(fn)

    def call(self: Any, *arguments: Any, **named: Any) -> None:
        _patched.clear()
        launch(self, *arguments, **named)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = call
