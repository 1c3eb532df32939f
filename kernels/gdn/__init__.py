"""Gated Delta Net: decode, chunked prefill, its preparation and its causal convolution. Importing registers the ops."""

from blackwell_kernels.gdn.op import (
    gdn_causal_conv,
    gdn_causal_conv_triton,
    gdn_decode,
    gdn_decode_triton,
    gdn_prefill,
    gdn_prefill_triton,
    gdn_prepare,
    gdn_prepare_triton,
)

__all__ = [
    "gdn_causal_conv",
    "gdn_causal_conv_triton",
    "gdn_decode",
    "gdn_decode_triton",
    "gdn_prefill",
    "gdn_prefill_triton",
    "gdn_prepare",
    "gdn_prepare_triton",
]
