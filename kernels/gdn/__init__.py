"""Gated Delta Net: decode, chunked prefill and its preparation. Importing registers the ops."""

from blackwell_kernels.gdn.op import (
    gdn_decode,
    gdn_decode_triton,
    gdn_prefill,
    gdn_prefill_triton,
    gdn_prepare,
    gdn_prepare_triton,
)

__all__ = [
    "gdn_decode",
    "gdn_decode_triton",
    "gdn_prefill",
    "gdn_prefill_triton",
    "gdn_prepare",
    "gdn_prepare_triton",
]
