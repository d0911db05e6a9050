"""Patches: what this project replaces in other packages while it runs, each with its reason.

Only this module sets attributes of other packages' modules and classes. `patched` replaces inside a context, `install`
for as long as the object lives. Both first check that the original is there and takes the arguments of what replaces
it. `rehearsal/every_patch.py` lists all patches.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from inspect import CO_VARARGS, CO_VARKEYWORDS, isclass, isfunction, ismethod
from threading import RLock
from types import CodeType
from typing import Any, NamedTuple

Replacement = Callable[[Any], Any]
"""From the original to what replaces it. It may return the original, which then stays."""

TORCH, DEEPSPEED, TRANSFORMERS = ("2.11", "2.13"), ("0.19.8",), ("5.23",)
ACCELERATE, BITSANDBYTES, PYTHON = ("1.15",), ("0.50",), ("3.11",)

BUILTIN = "it is compiled code, which has no signature"
DATA = "it is data, and takes no arguments"


@dataclass(frozen=True)
class Patch:
    """`attribute` of `owner` is replaced by the result of `replacement(original)`, which takes the same arguments.

    `owner` is the path of a module, a class, a function or a dict. `checked` are the releases of its package on which
    the patch was checked. `unchecked` says why its arguments cannot be compared, and `stays` until when it stays where
    it is not undone. `optional`: some of the releases, or some devices, have no such attribute, and then nothing is
    replaced.
    """

    owner: str
    attribute: str
    reason: str
    checked: tuple[str, ...]
    replacement: Replacement | None = None
    unchecked: str = ""
    stays: str = ""
    optional: bool = False

    @property
    def name(self) -> str:
        """The path of what is replaced."""
        return f"{self.owner}.{self.attribute}"

    @property
    def package(self) -> str:
        """The package that has the original; `python` for its standard library."""
        package = self.owner.partition(".")[0]
        return package if package in _VERSIONED else "python"

    def by(self, replacement: Replacement, instance: Any = None) -> "Use":
        """This patch with what replaces the original; with `instance`, only in that object."""
        return Use(self, replacement, instance)

    def place(self) -> Any:
        """The module, class, function or dict of which `attribute` is one. None if it is not there."""
        try:
            return _at(self.owner)
        except (ImportError, AttributeError):
            return None


class Use(NamedTuple):
    """A patch, what replaces the original, and the object in which alone it does so, if there is one."""

    patch: Patch
    replacement: Replacement | None
    instance: Any = None


_VERSIONED = frozenset({"torch", "deepspeed", "transformers", "accelerate", "bitsandbytes"})


class DoesNotFit(RuntimeError):
    """A patch does not fit the installed package. The message names the patch, the package and its version."""

    patch = ""
    """The name of the patch."""


def _misfit(patch: Patch, problem: str) -> DoesNotFit:
    package = patch.package
    installed = platform.python_version() if package == "python" else version(package)
    error = DoesNotFit(
        f"{patch.name} is replaced because {patch.reason}; in {package} {installed} {problem}, "
        f"and this was checked with {' and '.join(patch.checked)}"
    )
    error.patch = patch.name
    return error


def table(*patches: Patch) -> dict[str, Patch]:
    """These patches by name."""
    return {patch.name: patch for patch in patches}


@contextmanager
def patched(*uses: Use | Patch) -> Iterator[None]:
    """Replace all of these inside this context.

    Contexts may be nested, and may end in another order than they began. Raises DoesNotFit, with nothing replaced.
    """
    layers: list[_Layer] = []
    try:
        for use in uses:
            place, attribute, stand_in = _checked(use)
            if place is not None:
                layers.append(_replace(place, attribute, stand_in))
        yield
    finally:
        for layer in reversed(layers):
            _undo(layer)


def install(use: Use) -> None:
    """Replace for as long as `stays` of the patch says. Raises DoesNotFit, with nothing replaced."""
    assert use.patch.stays, use.patch.name
    place, attribute, stand_in = _checked(use)
    if place is not None:
        _set(place, attribute, stand_in)


def _checked(use: Use | Patch) -> tuple[Any, str, Any]:
    """Where to set which attribute, and to what. The place is None where there is nothing to replace."""
    patch, replacement, instance = use if isinstance(use, Use) else (use, use.replacement, None)
    assert replacement is not None, patch.name
    place = patch.place() if instance is None else instance
    original = _get(place, patch.attribute)
    if original is _ABSENT:
        if patch.optional:
            return None, "", None
        raise _misfit(patch, "it is not there")
    stand_in = replacement(original)
    if not patch.unchecked:
        _check(patch, original, stand_in)
    return place, patch.attribute, stand_in


def _check(patch: Patch, original: Any, stand_in: Any) -> None:
    """Raise DoesNotFit where the names of the arguments differ.

    A replacement may take the rest as `*args` or `**kwargs`; an original that takes anything fits.
    """
    actual, wanted = arguments(original), arguments(stand_in)
    if actual is None or wanted is None or actual.takes_anything:
        return
    names = actual.names[: len(wanted.names)] if wanted.takes_more else actual.names
    if names != wanted.names:
        raise _misfit(patch, f"it takes {actual.names}, not {wanted.names}")


class Arguments(NamedTuple):
    """The names of a function's arguments, and whether it takes more: positional ones, and ones by name."""

    names: tuple[str, ...]
    positional: bool
    by_name: bool

    @property
    def takes_more(self) -> bool:
        """Whether it also takes arguments without a name of their own."""
        return self.positional or self.by_name

    @property
    def takes_anything(self) -> bool:
        """Whether it takes any arguments, as a decorator does."""
        return self.positional and self.by_name


def arguments(function: Any) -> Arguments | None:
    """The arguments with which a function, method or class is called. None for compiled code and for data.

    Read off the code, as `inspect.signature` takes longer than all the rest of a patch.
    """
    bound = ismethod(function) or isinstance(function, classmethod) or isclass(function)
    function = function.__init__ if isclass(function) else getattr(function, "__func__", function)
    while isfunction(function) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isfunction(function):
        return None
    read = _of_code(function.__code__, bound)
    inner = _decorated(function) if read.takes_anything and not read.names else None
    return read if inner is None else arguments(inner)


@cache
def _of_code(code: CodeType, bound: bool) -> Arguments:
    all_names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    # what is passed by position alone has a name that nobody uses
    names = ("/",) * code.co_posonlyargcount + all_names[code.co_posonlyargcount :]
    names = names[bound:]
    return Arguments(names, bool(code.co_flags & CO_VARARGS), bool(code.co_flags & CO_VARKEYWORDS))


def _decorated(function: Any) -> Any:
    """The function inside DeepSpeed's tracing decorator, which accepts anything. None if there is none."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            if isfunction(cell.cell_contents):
                return cell.cell_contents
    return None


class _Layer:
    """What `attribute` of `place` itself was before it was replaced; _ABSENT if it was inherited."""

    def __init__(self, place: Any, attribute: str, before: Any) -> None:
        self.place, self.attribute, self.before = place, attribute, before


_ABSENT = object()
_layers: dict[tuple[int, str], list[_Layer]] = {}
_lock = RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _replace(place: Any, attribute: str, stand_in: Any) -> _Layer:
    with _lock:
        layer = _Layer(place, attribute, _own(place, attribute))
        _layers.setdefault((id(place), attribute), []).append(layer)
        _set(place, attribute, stand_in)
    return layer


def _undo(layer: _Layer) -> None:
    """Put back what was there. Where another layer lies on top, that one will put it back."""
    with _lock:
        layers = _layers[id(layer.place), layer.attribute]
        index = layers.index(layer)
        del layers[index]
        if index < len(layers):
            layers[index].before = layer.before
            return
        if not layers:
            del _layers[id(layer.place), layer.attribute]
        if layer.before is not _ABSENT:
            _set(layer.place, layer.attribute, layer.before)
        elif _own(layer.place, layer.attribute) is not _ABSENT:  # the program may have deleted it
            delattr(layer.place, layer.attribute)


def _get(place: Any, attribute: str) -> Any:
    if isinstance(place, dict):
        return place.get(attribute, _ABSENT)
    return _ABSENT if place is None else getattr(place, attribute, _ABSENT)


def _own(place: Any, attribute: str) -> Any:
    """The attribute without what is inherited."""
    return (place if isinstance(place, dict) else vars(place)).get(attribute, _ABSENT)


def _set(place: Any, attribute: str, value: Any) -> None:
    if isinstance(place, dict):
        place[attribute] = value
    else:
        setattr(place, attribute, value)


def _at(path: str) -> Any:
    """What is at `path`, imported if need be. Raises ImportError or AttributeError."""
    if path in sys.modules:
        return sys.modules[path]
    parent, _, name = path.rpartition(".")
    if not parent:
        return import_module(path)
    place = _at(parent)
    return getattr(place, name) if hasattr(place, name) else import_module(path)
