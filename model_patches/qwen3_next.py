"""Qwen3-Next: which operators its layers should reach. Data for the activation report; remove with the hooks."""

ARCHITECTURES = ("Qwen3NextForCausalLM",)
OPS = ("moe", "moe_routing", "gdn_decode", "gdn_prefill")
