"""Compiled regions: the compiler must find a program as it is without a ledger, so nobody sees inside a region.

torch.compile traces the Python code it meets, hooks and patches included, and guards on it. So all instruments are
removed while it inspects a program's frames. The region is one operator to the log: memory that it allocates and
frees inside is `kernel`. Memory that it leaves has the category of its phase, and is named by its results, by
autograd and by owners.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from time import time_ns
from typing import Any

import torch
import torch._dynamo.eval_frame as dynamo
from torch._C._dynamo import eval_frame as frames

from harness.ledger.collectives import release_default_group
from harness.ledger.events import Operator
from harness.ledger.log import Log
from harness.ledger.modules import Mark, Modules, in_backward
from harness.ledger.patch import patched
from harness.ledger.patch_table import PATCHES
from harness.ledger.phases import Phases
from harness.ledger.roster import Roster
from harness.ledger.saving import (
    NOT_SAVED,
    Hooks,
    belong_to_checkpointing,
    next_node_number,
    saved_by,
    top_hooks,
    unpack,
)
from harness.ledger.tensors import tensors_in, without_torch_function

release_default_group()

NAME = "compiled"
"""The operator name of such a region."""

WRAPPER = "compile_wrapper"
"""The name of the function that torch.compile returns."""

RESULT = "result"
"""The wrapper's local variable that holds the result of the region."""

_CALLBACK_SETTERS = ("set_eval_frame", "_maybe_set_eval_frame", "_callback_from_stance")
"""The functions through which the wrapper sets Dynamo's frame callback, and the names of our stand-ins for them."""

_RUNTIME = "torch._functorch._aot_autograd.runtime_wrappers"

NOT_SEEN = (
    "its operators are not seen one by one. What it allocates and frees inside is kernel where the "
    "allocator is recorded, and elsewhere in no figure; its work is not counted, nor what "
    "its backward computes again"
)
"""The note about a compiled program."""


class Compiled:
    """Hides the ledger from the compiler, and reports to the log what the compiled program leaves in memory.

    A region is a call of `compile_wrapper`, the function that torch.compile returns. The wrapper sets Dynamo's frame
    callback four times: when it is called, before and after the program runs, and when it returns.
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
        self._hide_instruments = hidden
        self._caller: Any = None  # the outermost frame that runs something compiled
        self._callbacks_left = 0  # how many times the wrapper will still set the callback
        self._program_runs = False
        self._region = ExitStack()
        self._began = self._number = self._versions = 0
        self._owner: Any = None
        self._name = ""
        self._hooks: Hooks | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Find the regions inside this context, also those of programs compiled before it. Raises DoesNotFit."""
        entries = (
            unpack,
            Log._storage_freed,
            Roster._gradient_created,
            Mark.__call__,
            _caller,
            Compiled._guarded,
        )
        for entry in entries:  # they are called also while Dynamo inspects frames
            pass_over(entry, with_callees=True)
        set_eval_frame: Any = getattr(dynamo, "set_eval_frame", None)
        stand_in = self._stand_in_for_set_eval_frame(set_eval_frame)
        replacements: dict[str, Callable[[Any], Any]] = {
            "torch._dynamo.eval_frame.set_eval_frame": lambda _: stand_in,
            "torch._dynamo.eval_frame._maybe_set_eval_frame": lambda real: (
                stand_in if real is set_eval_frame else real
            ),
            "torch._dynamo.eval_frame._callback_from_stance": self._stand_in_for_stance,
            f"{_RUNTIME}.call_func_at_runtime_with_args": self._stand_in_for_graph_call,
            "torch._C._dynamo.compiled_autograd.set_autograd_compiler": self._stand_in_for_autograd_compiler,
            "torch._dynamo.convert_frame.fullgraph_capture": self._stand_in_for_capture,
            "torch.export._trace._export": self._stand_in_for_capture,
        }
        with ExitStack() as undo:
            undo.callback(self._forget)
            undo.enter_context(patched(*(PATCHES[name].by(to) for name, to in replacements.items())))
            yield

    def _forget(self) -> None:
        self._region.close()
        self._caller = self._owner = None

    def _stand_in_for_set_eval_frame(self, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Dynamo's `set_eval_frame`: after it Dynamo inspects each frame, or with None no frame."""

        def set_eval_frame(callback: Any) -> Any:
            caller = _caller()
            if self._caller is None:
                begins = callback is not None or caller.f_code.co_name == WRAPPER
                if begins and not self._log.hidden and self._log.here():
                    self._guarded(self._begin, caller)
                return real(callback)
            prior = real(callback)
            if caller is self._caller:
                self._callbacks_left -= 1
                if not self._callbacks_left:
                    self._guarded(self._end, caller)
            return prior

        pass_over(set_eval_frame)
        return set_eval_frame

    def _stand_in_for_stance(self, real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Dynamo's choice of the callback, just before a compiled program runs."""

        def _callback_from_stance(callback: Any) -> Any:
            if self._caller is not None and _caller() is self._caller:
                # three more: before the program runs, after it, and when the wrapper returns
                self._callbacks_left, self._program_runs = 3, True
                self._hooks = top_hooks()  # the program's own hooks would unpack what we read
            return real(callback)

        pass_over(_callback_from_stance)
        return _callback_from_stance

    def _stand_in_for_graph_call(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The call of a compiled graph: in a backward that is not itself compiled, it is a region of its own."""

        def call_func_at_runtime_with_args(*args: Any, **kwargs: Any) -> Any:
            if self._log.hidden or not in_backward() or not self._log.here():
                return real(*args, **kwargs)
            if self._log.follow is not None:
                self._log.follow()
            with self._log.opaque(NAME):
                output = real(*args, **kwargs)
            self._log.work.add(self._log.where, None)
            self._log.recomputes_unseen = True
            self._see_results(output)
            return output

        pass_over(call_func_at_runtime_with_args)
        return call_func_at_runtime_with_args

    def _stand_in_for_capture(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The trace of a program that does not run, as in torch.export."""

        def captured(*args: Any, **kwargs: Any) -> Any:
            if self._log.hidden or not self._log.here():
                return real(*args, **kwargs)
            with self._hide_instruments(), self._log.opaque("capture"):
                return real(*args, **kwargs)

        return captured

    def _stand_in_for_autograd_compiler(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The setter of a compiler for backward: with our hooks present, it would compile them too."""

        def set_autograd_compiler(compiler: Any, *others: Any) -> Any:
            if self._log.here():
                self._roster.hook(compiler is None)
                self._modules.mark(compiler is None)
            return real(compiler, *others)

        pass_over(set_autograd_compiler)
        return set_autograd_compiler

    def _guarded(self, act: Callable[[Any], None], caller: Any) -> None:
        """Run `act`. An error of the ledger in it must not stop the program."""
        try:
            act(caller)
        except Exception as error:
            self._log.report_failure(NAME, error)

    def _begin(self, caller: Any) -> None:
        self._caller, self._callbacks_left, self._program_runs = caller, 1, caller.f_code.co_name != WRAPPER
        program, arguments = caller.f_locals.get("fn"), caller.f_locals.get("args")
        self._owner = getattr(program, "__self__", None)
        if self._owner is None and arguments and isinstance(arguments[0], torch.nn.Module):
            self._owner = arguments[0]  # a method of a class was compiled
        self._name = self._log.module if self._modules.within else _name(program, self._owner)
        if not self._modules.within:
            self._phases.program_begins(self._owner)
        self._versions, self._number, self._began = self._roster.versions(), next_node_number(), time_ns()
        self._region.enter_context(self._hide_instruments())

    @without_torch_function
    def _end(self, caller: Any) -> None:
        log = self._log
        self._caller, owner, self._owner = None, self._owner, None
        self._region.close()
        if not self._program_runs:
            return
        log.operators.append(
            Operator(self._began, log.where, log.module, NAME, time_ns(), log.makes, log.recomputing)
        )
        log.work.add(log.where, None)
        log.unseen.note(f"{NAME} {self._name}", "storages", f"{self._name} is compiled: {NOT_SEEN}")
        results = self._see_results(caller.f_locals.get(RESULT))
        if RESULT not in caller.f_locals and sys.exc_info()[0] is None:  # torch 2.11 has no such variable
            log.unseen.note(
                "saved", "saved", f"what {self._name} saves for backward is not counted: it is compiled"
            )
        for tensor in saved_by(results, self._number) if self._hooks is None else ():
            log.save(tensor)
        # the hooks of checkpointing save nothing here
        if self._hooks is not None and not belong_to_checkpointing(self._hooks):
            log.unseen.note("saved", "saved", NOT_SAVED)
        if self._roster.versions() != self._versions or isinstance(owner, torch.optim.Optimizer):
            self._phases.stepped(owner if isinstance(owner, torch.optim.Optimizer) else None)
        else:
            self._roster.walk()

    @without_torch_function
    def _see_results(self, output: Any) -> list[torch.Tensor]:
        """Show the log all tensors in the output of a region, and return them."""
        results = list(tensors_in((output,)))
        for tensor in results:
            self._log.see(tensor, NAME)
        return results


def _caller() -> Any:
    """The frame that called one of the callback setters."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name in _CALLBACK_SETTERS:
        frame = frame.f_back
    return frame


def _name(program: Any, owner: Any) -> str:
    """The name of the program for a reader."""
    if isinstance(owner, torch.nn.Module | torch.optim.Optimizer):
        return type(owner).__name__
    return str(getattr(program, "__qualname__", None) or type(program).__name__)


def pass_over(function: Any, with_callees: bool = False) -> None:
    """Let Dynamo run the frames of `function` without inspecting them."""
    skip, go_on = frames._FrameAction.SKIP, frames._FrameAction.DEFAULT
    strategy = frames._FrameExecStrategy(skip, skip if with_callees else go_on)
    frames.set_code_exec_strategy(function.__code__, strategy)
