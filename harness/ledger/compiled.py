"""What a compiler runs of a program: regions that it must find as it would without a ledger, so nobody sees inside.

torch.compile traces the Python it comes across, hooks and patches included, and guards on them. So while it looks at a
program's frames, all that watches is gone, and the region is one operator to the log: what it makes and lets go of is
`kernel`; what it leaves is what its phase makes, named by its results, by autograd and by owners.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from time import time_ns
from typing import Any

import torch
import torch._dynamo.eval_frame as dynamo
import torch._functorch._aot_autograd.runtime_wrappers as aot
import torch.export._trace as export
from torch._C._dynamo import eval_frame as frames
from torch._dynamo import convert_frame

from harness.ledger.collectives import release_default_group
from harness.ledger.events import Operator
from harness.ledger.log import Log
from harness.ledger.modules import Mark, Modules, in_backward
from harness.ledger.phases import Phases
from harness.ledger.replaced import replaced
from harness.ledger.roster import Roster
from harness.ledger.saving import NOT_SAVED, Hooks, checkpoints, number, saved_by, top, unpack
from harness.ledger.tensors import tensors_in, unnoticed

release_default_group()

NAME = "compiled"
"""What such a region is called among operators."""

WRAPPER = "compile_wrapper"
"""What torch.compile makes of a function."""

RESULT = "result"
"""The variable there that has what the region made."""

_SAYS = ("set_eval_frame", "_maybe_set_eval_frame", "_callback_from_stance")
"""What it calls to say where to look, and our stand-ins for those."""

NOT_SEEN = (
    "its operators are not seen one by one. What it makes and lets go of is kernel where the allocator is heard, and "
    "elsewhere in no figure; its work is not counted"
)
"""Of what is compiled."""


class Compiled:
    """Takes the ledger out of a compiler's sight, and tells the log what the compiled program left.

    A region is a call of `compile_wrapper`, which is what torch.compile makes of a function. It says four times at
    which frames Dynamo is to look: when it is called, before and after it runs, and when it returns.
    """

    def __init__(
        self,
        log: Log,
        modules: Modules,
        roster: Roster,
        phases: Phases,
        hidden: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._log, self._modules, self._roster, self._phases = log, modules, roster, phases
        self._hidden = hidden
        self._caller: Any = None  # the outermost frame that runs something compiled
        self._said = 0  # how often it will yet say where to look
        self._runs = False
        self._region = ExitStack()
        self._began = self._number = self._versions = 0
        self._owner: Any = None
        self._name = ""
        self._hooks: Hooks | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it regions are found, of what was compiled before it too."""
        entries = unpack, Log._gone, Roster._gradient_made, Mark.__call__, _caller, Compiled._guarded
        for entry in entries:  # they are called whoever looks
            pass_over(entry, with_callees=True)
        look: Any = dynamo.set_eval_frame  # type: ignore[attr-defined]
        autograd, looking = torch._C._dynamo.compiled_autograd, self._looking(look)
        with ExitStack() as undo:
            undo.callback(self._forget)
            undo.enter_context(replaced(dynamo, "set_eval_frame", looking))
            if dynamo._maybe_set_eval_frame is look:
                undo.enter_context(replaced(dynamo, "_maybe_set_eval_frame", looking))
            for owner, name, watched in (
                (dynamo, "_callback_from_stance", self._choosing),
                (aot, "call_func_at_runtime_with_args", self._running),
                (autograd, "set_autograd_compiler", self._compiling_autograd),
                (convert_frame, "fullgraph_capture", self._capturing),
                (export, "_export", self._capturing),
            ):
                if hasattr(owner, name):
                    undo.enter_context(replaced(owner, name, watched(getattr(owner, name))))
            yield

    def _forget(self) -> None:
        self._region.close()
        self._caller = self._owner = None

    def _looking(self, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Dynamo's `set_eval_frame`: from here on it looks at each frame, or (None) at none."""

        def set_eval_frame(callback: Any) -> Any:
            caller = _caller()
            if self._caller is None:
                begins = callback is not None or caller.f_code.co_name == WRAPPER
                if begins and not self._log.hidden and self._log.here():
                    self._guarded(self._begin, caller)
                return real(callback)
            prior = real(callback)
            if caller is self._caller:
                self._said -= 1
                if not self._said:
                    self._guarded(self._end, caller)
            return prior

        pass_over(set_eval_frame)
        return set_eval_frame

    def _choosing(self, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Dynamo's choice whether to look at all, just before something compiled runs."""

        def _callback_from_stance(callback: Any) -> Any:
            if self._caller is not None and _caller() is self._caller:
                self._said, self._runs = 3, True  # before it runs, after it, and when it returns
                self._hooks = top()  # the program's own, which would be asked to unpack what we look at
            return real(callback)

        pass_over(_callback_from_stance)
        return _callback_from_stance

    def _running(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """How a compiled graph is run: in a backward that is not itself compiled, it is a region of its own."""

        def call_func_at_runtime_with_args(*args: Any, **kwargs: Any) -> Any:
            if self._log.hidden or not in_backward() or not self._log.here():
                return real(*args, **kwargs)
            if self._log.follow is not None:
                self._log.follow()
            with self._log.opaque(NAME):
                made = real(*args, **kwargs)
            self._log.work.add(self._log.where, None)
            self._left(made)
            return made

        pass_over(call_func_at_runtime_with_args)
        return call_func_at_runtime_with_args

    def _capturing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """How a program is traced that does not run, as torch.export does."""

        def captured(*args: Any, **kwargs: Any) -> Any:
            if self._log.hidden or not self._log.here():
                return real(*args, **kwargs)
            with self._hidden(), self._log.opaque("capture"):
                return real(*args, **kwargs)

        return captured

    def _compiling_autograd(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """How backward is given a compiler: it would make our hooks part of its program."""

        def set_autograd_compiler(compiler: Any, *others: Any) -> Any:
            if self._log.here():
                self._roster.hook(compiler is None)
                self._modules.mark(compiler is None)
            return real(compiler, *others)

        pass_over(set_autograd_compiler)
        return set_autograd_compiler

    def _guarded(self, act: Callable[[Any], None], caller: Any) -> None:
        """Do what a mistake of ours in must not stop the program."""
        try:
            act(caller)
        except Exception as error:
            self._log.missed(NAME, error)

    def _begin(self, caller: Any) -> None:
        self._caller, self._said, self._runs = caller, 1, caller.f_code.co_name != WRAPPER
        program, given = caller.f_locals.get("fn"), caller.f_locals.get("args")
        self._owner = getattr(program, "__self__", None)
        if self._owner is None and given and isinstance(given[0], torch.nn.Module):
            self._owner = given[0]  # a class was compiled, and this is its method
        self._name = self._log.module if self._modules.within else _name(program, self._owner)
        if not self._modules.within:
            self._phases.program_begins(self._owner)
        self._versions, self._number, self._began = self._roster.versions(), number(), time_ns()
        self._region.enter_context(self._hidden())

    @unnoticed
    def _end(self, caller: Any) -> None:
        log = self._log
        self._caller, owner, self._owner = None, self._owner, None
        self._region.close()
        if not self._runs:
            return
        log.operators.append(
            Operator(self._began, time_ns(), log.where, log.module, NAME, log.makes, log.recomputing)
        )
        log.work.add(log.where, None)
        log.unseen.note(f"{NAME} {self._name}", "storages", f"{self._name} is compiled: {NOT_SEEN}")
        left = self._left(caller.f_locals.get(RESULT))
        if RESULT not in caller.f_locals and sys.exc_info()[0] is None:  # torch 2.11 does not keep it
            log.unseen.note(
                "saved", "saved", f"what {self._name} saves for backward is not counted: it is compiled"
            )
        for tensor in saved_by(left, self._number) if self._hooks is None else ():
            log.save(tensor)
        if self._hooks is not None and not checkpoints(self._hooks):  # those keep nothing
            log.unseen.note("saved", "saved", NOT_SAVED)
        if self._roster.versions() != self._versions or isinstance(owner, torch.optim.Optimizer):
            self._phases.stepped(owner if isinstance(owner, torch.optim.Optimizer) else None)
        else:
            self._roster.walk()

    @unnoticed
    def _left(self, made: Any) -> list[torch.Tensor]:
        """The tensors in what a region made, which are now known."""
        left = list(tensors_in((made,)))
        for tensor in left:
            self._log.see(tensor, NAME, time_ns())
        return left


def _caller() -> Any:
    """The frame that called for a compiler to look, or not to."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name in _SAYS:
        frame = frame.f_back
    return frame


def _name(program: Any, owner: Any) -> str:
    """What a person calls it."""
    if isinstance(owner, torch.nn.Module | torch.optim.Optimizer):
        return type(owner).__name__
    return str(getattr(program, "__qualname__", None) or type(program).__name__)


def pass_over(function: Any, with_callees: bool = False) -> None:
    """Let a compiler that looks at frames run those of `function` as they are."""
    skip, go_on = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
    strategy = frames._FrameExecStrategy(skip, skip if with_callees else go_on)
    frames.set_code_exec_strategy(function.__code__, strategy)
