"""standins: within it, packages that need a GPU are this project's own."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ..machine import require_torch
from .registry import MODULES, VERSIONS, parents

__all__ = ["standins"]

_held = threading.RLock()
"""By the thread that is within: modules are the whole process's."""

_within = False


@contextlib.contextmanager
def standins() -> Iterator[None]:
    """Within the block mamba_ssm and causal_conv1d can be imported where they are missing or there is no GPU for them.

    What is imported from them has the originals' arguments, defaults and results, is made of this project's ops, trains
    and is exported on a CPU. What is not stood for is an ImportError that says what is. A package that loads and
    finds a GPU is left alone. At the end these modules are what they were before; code that was loaded within keeps
    what it has imported.

    A block within a block changes nothing. Another thread waits at its own until this one is left; what it imports
    meanwhile without one is found here as well, whole.

    Raises:
        RequestError: torch can't be imported.
    """
    require_torch()
    global _within
    with _held:
        if _within:
            yield
            return
        before = _modules_of(VERSIONS)
        stood = [package for package in VERSIONS if not _is_usable(package)]
        refusal = _Refusal(stood)
        made = _made(stood)
        _within = True
        try:
            # At once: no other thread ever finds a part of them.
            sys.modules.update(made)
            for name in _modules_of(stood).keys() - made.keys():
                sys.modules.pop(name, None)
            sys.meta_path.insert(0, refusal)
            yield
        finally:
            _within = False
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(refusal)
            own = {name: module for name, module in before.items() if name.partition(".")[0] in stood}
            for name in _modules_of(stood).keys() - own.keys():
                sys.modules.pop(name, None)
            sys.modules.update(own)


class _Standin(ModuleType):
    """A module of a package that is stood for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        raise ImportError(_no_standin(f"{self.__name__}.{name}", self.__name__), name=self.__name__)


class _Refusal(MetaPathFinder):
    """Refuses modules of these packages that there are no stand-ins for."""

    def __init__(self, stood: Collection[str]) -> None:
        self._stood = stood

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """See importlib.abc.MetaPathFinder."""
        del path, target
        if fullname.partition(".")[0] in self._stood:
            raise ModuleNotFoundError(_no_standin(fullname, fullname.rpartition(".")[0]), name=fullname)


def _no_standin(name: str, place: str) -> str:
    modules = [module.removeprefix(f"{place}.") for module in MODULES if module.startswith(f"{place}.")]
    there = [*MODULES.get(place, {}), *modules]
    return (
        f"there is no stand-in for {name}; of {place} there are {', '.join(there) or 'none'}. Call an op of "
        "edifice_reference.ops in its place, or run on a machine whose GPU the real package can use"
    )


def _is_usable(package: str) -> bool:
    """Whether a package loads and has a GPU."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        importlib.import_module(package)
    except (ImportError, OSError):  # it, or a library that it needs, is missing
        return False
    return True


def _modules_of(packages: Collection[str]) -> dict[str, ModuleType]:
    """What has been imported of packages, by name."""
    return {name: module for name, module in list(sys.modules.items()) if name.partition(".")[0] in packages}


def _made(packages: Collection[str]) -> dict[str, ModuleType]:
    """The stand-ins of packages, whole."""
    made: dict[str, ModuleType] = {}
    for name, contents in MODULES.items():
        if name.partition(".")[0] not in packages:
            continue
        for each in (*parents(name), name):
            made.setdefault(each, _empty(each))
        for attribute, home in contents.items():
            found = getattr(importlib.import_module(f".{home}", __package__), attribute)
            setattr(made[name], attribute, found)
    for name, module in made.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, module)
        else:
            module.__version__ = VERSIONS[name]  # type: ignore[attr-defined]
    return made


def _empty(name: str) -> ModuleType:
    module = _Standin(name, "A stand-in of edifice_export: see edifice_export.standing_in.")
    module.__spec__ = ModuleSpec(name, None, origin=__name__, is_package=True)
    module.__path__ = []
    return module
