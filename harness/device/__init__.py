"""What is special about a GPU's memory: its allocator, its kernels, its libraries, and what lies outside PyTorch.

It may import `config`, `ledger` and `tables`. Start at `caching_allocator.py`, the twin of PyTorch's, which needs no
torch, and at `operators.py`, the table of what kernels take; `kernels.py` has operators that are others on CUDA,
`workspaces.py` what cuBLAS keeps, and `outside.py` the CUDA context and NCCL.
"""
