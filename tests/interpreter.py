"""Triton's interpreter, faster: it prepares the language once a launch.

When a kernel is launched, and again at each call of a device function, it puts its own functions in the place of
those of ``triton.language``, which it searches for them: half of the time of an interpreted kernel. What the launch
has put there still stands when a device function is called.
"""

import inspect
from functools import lru_cache
from typing import Any


def prepare_once_a_launch() -> None:
    """Leave out what a device function's call would put in place again, and search each module once."""
    import triton.language as tl
    from triton.runtime import interpreter

    prepare_anew, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = {id(tl), id(tl.core)}
    prepared: set[int] = set()

    @lru_cache(None)
    def builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def replace(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins(package):
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    def prepare(fn: Any) -> Any:
        named = languages.intersection(map(id, fn.__globals__.values()))
        if named and named <= prepared:
            return None  # a device function's call does nothing with it
        prepared.update(named)
        return prepare_anew(fn)

    def launch(self: Any, *args_dev: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return run(self, *args_dev, **kwargs)

    interpreter._patch_builtin, interpreter._patch_lang = replace, prepare
    interpreter.GridExecutor.__call__ = launch
