"""Which tensors are computed in low precision (report 3.3.1, 3.3.3).

    linears of attention, dense feed-forward, experts      the recipe's class, below
    embedding, output head, MTP's projection               the activations' dtype
    router, norms, softmax, SwiGLU's inside                float32 or wider
    residual stream, inputs and outputs of all layers      the activations' dtype
    master weights, weight gradients and their sums        float32
    AdamW's moments                                        `optimizer.moment_dtype`

MTP's projection is not mentioned in the report; the released weights hold it in bfloat16.
"""

# Each linear by the end of its parameter's name.
CLASSES = {
    "mla.w_q_D_HNR": "linear",
    "mla.w_dq_DQ": "linear",
    "mla.w_uq_Q_HNR": "linear",
    "mla.w_dkv_D_CR": "linear",
    "mla.w_ukv_C_HNU": "linear",
    "mla.w_o_HU_D": "after_attention",  # its input is kept in E5M6
    "w_gate_DF": "linear",  # dense layers and shared experts
    "w_up_DF": "linear",
    "w_down_FD": "after_swiglu",  # SwiGLU's arguments are kept, not its output
    "moe.w_gate_EDF": "dispatched",  # its input has come from other devices, in FP8
    "moe.w_up_EDF": "dispatched",
    "moe.w_down_EFD": "expert_after_swiglu",
}


def class_of(name: str) -> str | None:
    """The class of a parameter, by its name; None for what stays in high precision."""
    return next((kind for end, kind in CLASSES.items() if name.endswith(end)), None)


def is_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear: neither gain, router, embedding nor head."""
    return name.rpartition(".")[2].startswith("w_") and ".router." not in name
