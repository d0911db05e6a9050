"""All that the ledger replaces in torch, transformers and Python. Most of it is replaced only while the ledger is exact
and no compiler runs.
"""

from harness.ledger.collective_kinds import BARRIERS, METHODS
from harness.ledger.patch import BUILTIN, DATA, PYTHON, TORCH, TRANSFORMERS, Patch, table

_DYNAMO = "torch._dynamo.eval_frame"
_CALLBACK = "a compiler must find the program without the ledger's instruments"
_RESET = "the most since the ledger began is read before the program resets it"
_PROFILER = "the program's own profiler must find none that runs already"

GROUP = "torch._C._distributed_c10d.ProcessGroup"

PATCHES = table(
    *(
        Patch(
            GROUP,
            name,
            "what ranks send is counted where it is given to their group",
            TORCH,
            unchecked=BUILTIN,
            optional=True,  # torch 2.13 has other names for some
        )
        for name in (*METHODS, *BARRIERS)
    ),
    Patch(_DYNAMO, "set_eval_frame", _CALLBACK, TORCH, unchecked=BUILTIN),
    Patch(_DYNAMO, "_maybe_set_eval_frame", _CALLBACK, TORCH, unchecked=BUILTIN, optional=True),
    Patch(
        _DYNAMO,
        "_callback_from_stance",
        "it is called just before a compiled program runs",
        TORCH,
        optional=True,
    ),
    Patch(
        "torch._functorch._aot_autograd.runtime_wrappers",
        "call_func_at_runtime_with_args",
        "it calls the compiled graph of a backward",
        TORCH,
        optional=True,
    ),
    Patch(
        "torch._C._dynamo.compiled_autograd",
        "set_autograd_compiler",
        "a compiler of backward would compile the ledger's hooks too",
        TORCH,
        unchecked=BUILTIN,
        optional=True,
    ),
    Patch("torch._dynamo.convert_frame", "fullgraph_capture", _CALLBACK, TORCH, optional=True),
    Patch("torch.export._trace", "_export", _CALLBACK, TORCH, optional=True),
    Patch(
        "torch.autograd.graph.saved_tensors_hooks",
        "__enter__",
        "what the program's own hooks return is what autograd saves",
        TORCH,
    ),
    Patch(
        "torch.autograd.graph",
        "disable_saved_tensors_hooks",
        "it would fail where the ledger's hooks are",
        TORCH,
    ),
    Patch(
        "torch.autograd.function.BackwardCFunction",
        "saved_tensors",
        "with hooks, a Python autograd function would read aliases of what it saved",
        TORCH,
        unchecked="it is a property",
    ),
    Patch(
        "torch.nn.modules.module",
        "_has_any_global_hook",
        "a compiled module would warn of the ledger's hooks",
        TORCH,
    ),
    Patch("torch", "get_rng_state", "checkpointing keeps this state, which no operator returns", TORCH),
    Patch(
        "torch.utils.checkpoint",
        "_VersionWrapper",
        "selective checkpointing keeps tensors in it, beside autograd",
        TORCH,
    ),
    Patch(
        "torch.utils.checkpoint",
        "_recomputation_hook",
        "checkpointing recomputes inside of it",
        TORCH,
    ),
    Patch(
        "torch.UntypedStorage",
        "resize_",
        "it changes the size of a storage without an operator",
        TORCH,
        unchecked=BUILTIN,
    ),
    Patch(
        "torch.distributed.tensor._sharding_prop.ShardingPropagator",
        "_propagate_tensor_meta_non_cached",
        "it runs operators on fake tensors, only to learn a shape",
        TORCH,
    ),
    Patch("torch.cuda", "reset_peak_memory_stats", _RESET, TORCH),
    Patch("torch.cuda.memory", "reset_peak_memory_stats", _RESET, TORCH),
    Patch("torch.autograd.profiler", "_prepare_profiler", _PROFILER, TORCH, unchecked=BUILTIN),
    Patch("torch.autograd.profiler", "_enable_profiler", _PROFILER, TORCH, unchecked=BUILTIN),
    Patch(
        "torch.autograd.profiler",
        "_enable_profiler_legacy",
        _PROFILER,
        TORCH,
        unchecked=BUILTIN,
        optional=True,
    ),
    Patch(
        "torch.cuda.memory",
        "_record_memory_history",
        "a history of CUDA's allocator that the program records, or ends, must be its own",
        TORCH,
    ),
    Patch("threading.Thread", "start", "work in other threads is not seen, and is to be named", PYTHON),
    Patch(
        "torch.distributed.nn.functional.all_reduce",
        "__defaults__",
        "this function and those beside it would keep the first process group alive",
        TORCH,
        unchecked=DATA,
        stays="for the life of the process",
    ),
    Patch(
        "transformers.cache_utils.Cache",
        "update",
        "an offloaded cache moves each layer to the device only while it is used",
        TRANSFORMERS,
        stays="as long as the cache lives",
    ),
)


def import_owners() -> None:
    """Import the modules of torch that have the originals: an import inside a ledger's block would be seen."""
    for patch in PATCHES.values():
        if patch.package == "torch":
            patch.place()
