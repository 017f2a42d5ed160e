"""Keeps out of the trainer's process what importing transformers would load and training never calls.

For a process of our own alone: an app that trains inside itself may want them. MiniLM loaded and trained
for a step takes 478 MB without this; what it leaves out, in the order of its size: torch.distributed, the
compiler, symbolic mathematics, accelerate.

transformers reaches for torch.distributed where torch was built with it; builds without are common on
boards, so transformers does without. The compiler is asked for by decorators that say what not to compile,
symbolic shapes by every gradient that begins with a given one: these few questions have plain answers where
nothing is compiled. Whatever else is asked of a module that stands aside, the real one answers.
"""

from __future__ import annotations

import operator
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["keep_lean"]


def keep_lean() -> None:
    """To be called before transformers is imported. Imports torch."""
    import torch

    if "torch._dynamo" in sys.modules or "transformers" in sys.modules:
        return
    torch.distributed.is_available = lambda: False
    torch.compile = _unchanged  # bitsandbytes compiles what its kernels lack, where it can
    sys.modules.setdefault("accelerate", None)  # type: ignore[arg-type]
    torch._dynamo = _Aside(
        "torch._dynamo", ("_trace_wrapped_higher_order_op",), disable=_unchanged, allow_in_graph=_unchanged,
        assume_constant_result=_unchanged,
        graph_break=_nothing, is_compiling=_no,
    )  # fmt: skip
    _Aside(
        "torch.fx.experimental.symbolic_shapes", expect_true=bool, sym_eq=operator.eq, guard_or_false=bool,
        guard_or_true=bool,
    )  # fmt: skip


class _Aside(ModuleType):
    """A module that answers what it is given, and has the real one take its place when asked for more.

    An import of something below it loads the real one first, save for the modules ``apart``, which need
    nothing of it.
    """

    def __init__(self, name: str, apart: tuple[str, ...] = (), **answers: Any) -> None:
        super().__init__(name)
        self.__spec__ = find_spec(name)
        self.__path__ = list((self.__spec__ and self.__spec__.submodule_search_locations) or ())
        self.__dict__.update(answers)
        sys.modules[name] = self
        sys.meta_path.insert(0, _Below(self, apart))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


class _Below(MetaPathFinder):
    def __init__(self, aside: _Aside, apart: tuple[str, ...]) -> None:
        self.name, self.aside = aside.__name__, aside
        self.apart = tuple(f"{self.name}.{each}" for each in apart)

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> ModuleSpec | None:
        if not name.startswith(self.name + ".") or name in self.apart:
            return None
        if sys.modules.get(self.name) is self.aside:
            del sys.modules[self.name]
            import_module(self.name)
            return ModuleSpec(name, _Loaded()) if name in sys.modules else None
        return None


class _Loaded(Loader):
    """Loads what was loaded on the way here."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, _: ModuleType) -> None:
        pass


def _unchanged(fn: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that only marks."""
    return fn if fn is not None else _unchanged


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _no() -> bool:
    return False
