"""Why rows of `measured_operators.csv` and `measured_heldout.csv` are not exact, and what programs assume."""

BLOCK = (
    "A request of more than 1 MiB gets a free block whole if no more than 1 MiB of it would be left, and all of it "
    "counts as allocated (`should_split` in PyTorch's CUDACachingAllocator.cpp). Which blocks are free depends on all "
    "that ran before in that process, and Liger's own kernels ran there, which a rehearsal has not."
)
COMPILED = (
    "Liger's own loss ran before in that process. It compiles a function that is made anew in each call, and whose "
    "closure has weights, their gradient, targets and the loss: such tensors stayed alive, as the difference is the "
    "same for every batch"
)
CUDNN = (
    "cuDNN asks for a workspace in its convolutions, of a size that only cuDNN knows. A rehearsal names `convolution` "
    "and `convolution_backward` as not known"
)
CAUSES = {
    "distill_cosine_loss": (
        "`cosine_similarity` makes a tensor of its epsilon now, 512 bytes until its backward is over; PyTorch of then "
        f"clamped by the number. With 1,024 tokens, besides: {BLOCK[0].lower()}{BLOCK[1:]} Logits in float32 have 501 "
        "MiB, in blocks of 502 or 501."
    ),
    "distill_jsd_loss": (
        "The rows are eight weeks older than the first script in the repository, and have 8 bytes more for each logit "
        "than that script: two float32 tensors of their size. The rest, 5.3 GB for every batch, no script explains; "
        "Liger's own compiled loss ran before in that process, as in that of fused_linear_orpo_loss."
    ),
    "embedding": f"{BLOCK} Here 8,177,664 bytes of scratch lie in a block of 8 MiB, 210,944 bytes more.",
    "fused_linear_orpo_loss": (
        f"{COMPILED}. By their sizes they are two weights of the head, states of ten sequences, targets of six and "
        "512 bytes, for sequences of 1,024 tokens and of 4,096 alike."
    ),
    **dict.fromkeys(
        ("fused_linear_cpo_loss", "fused_linear_simpo_loss"),
        f"{COMPILED}: by 2,185,282,048 bytes, to the byte those of fused_linear_orpo_loss with sequences as long.",
    ),
    "fused_moe": (
        f"{BLOCK} The rows whose experts' tensors have at most 1 MiB are exact: such blocks are split to the 512 bytes."
    ),
    "fused_neighborhood_attention": (
        "With 512 features and up to 128 tokens the peak was in a Linear's forward: cublasLt had 1 MiB of its own, "
        "which PyTorch of then allocated for each call; the forward's peak here and 1 MiB are the published figures. "
        f"With 768 features: {BLOCK[0].lower()}{BLOCK[1:]} Weights of 2,359,296 bytes lie in segments of 20 MiB, which "
        "other sizes share."
    ),
    "jsd, 2026": f"{BLOCK} Log-probabilities of 1,024 tokens have 501 MiB, in blocks of 502 or 501.",
    "kto_loss": (
        f"{COMPILED}, but for blocks that are not split. By their sizes they are five weights, four biases, both "
        "states and the targets of six sequences, and 4,608 bytes."
    ),
    "megatron_cross_entropy, unfused": (
        "One block of 512 bytes is missing, the same for every vocabulary. The script has a process group of NCCL and "
        "waits at its barriers, which the program here has not; that the block is of these is not known."
    ),
    "multi_token_attention": f"{CUDNN}: here in bfloat16, where it is up to 86% of the peak.",
    "sparse_multi_token_attention": (
        f"{CUDNN}: here in float32, where it matters only for the shortest sequences."
    ),
}
"""Why a kernel's rows that are not exact are not. None of these sizes is used in any figure."""

ASSUMED = {
    "embedding": (
        "What ran under `torch.compile` before is kept alive: LLaMA's embeddings of both speed tests, the second with "
        "gradients, then BERT's of the memory test. The sizes say which: 12,240 MiB and 1,530 MiB, in the rows of "
        "Liger's own kernel too, and the rows of `torch.compile` fall by exactly both where it gave up compiling."
    ),
    "fused_linear_orpo_loss": (
        "Where sequences have 4,096 tokens the logits are in bfloat16, as half the bytes of each say. The one version "
        "of that script which is in the repository has 1,024 tokens, and float32."
    ),
    "llama4_rope": (
        "The angles are a product of matrices, as in transformers then, which takes a workspace; the program was "
        "written with the figures in view."
    ),
    "megatron_swiglu, megatron": (
        "Megatron's own is compiled, and is taken for one kernel each way with no memory but its result; that was "
        "written with the figures in view."
    ),
}
"""What a program has from the rows that it is held against, because no script says it."""
