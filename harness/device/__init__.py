"""What is special about a device: what its allocator reserves, what it keeps outside torch, where its operators differ.

It may import tables, config and ledger; what twins PyTorch's allocator needs no torch. Start reading at
`caching_allocator.py`, a twin of PyTorch's CUDA caching allocator, and `replay.py`, which runs a sequence of births and
deaths through it. `operators.py` has the scratch memory of CUDA's kernels, `kernels.py` what CUDA runs in place of a
composite operator, and `workspaces.py` the workspaces of cuBLAS.
"""
