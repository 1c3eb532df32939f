"""DeepSeek-V3.2: which operators its layers should reach, whichever file of vLLM holds the model (0.24:
models/deepseek_v2.py, 0.29 on: models/deepseek_v32). Data for the activation report; remove with the hooks."""

ARCHITECTURES = ("DeepseekV32ForCausalLM",)
OPS = ("moe", "moe_routing", "dsa_indexer", "dsa_topk", "dsa_sparse_mla")
