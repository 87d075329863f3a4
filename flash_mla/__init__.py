"""flash_mla: multi-head latent attention over paged KV caches."""

from flash_mla import backends
from flash_mla._ops import build_info
from flash_mla._version import __version__
from flash_mla.backends.capability import KernelSupport, kernels, why_not
from flash_mla.decode import flash_mla_with_kvcache
from flash_mla.errors import UnsupportedError
from flash_mla.kv_cache import KVFormat, append_kv_cache, dequantize_kv_cache, quantize_kv_cache
from flash_mla.merge import merge_attention_states
from flash_mla.prefill import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
)
from flash_mla.problem import DenseDecodeProblem
from flash_mla.problem_kv_cache import KVCacheProblem
from flash_mla.problem_prefill import DensePrefillBackwardProblem, DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillBackwardProblem, SparsePrefillProblem
from flash_mla.schedule import FlashMLASchedMeta, get_mla_decoding_metadata, get_mla_metadata

__all__ = [
    "DenseDecodeProblem",
    "DensePrefillBackwardProblem",
    "DensePrefillProblem",
    "FlashMLASchedMeta",
    "KVCacheProblem",
    "KVFormat",
    "KernelSupport",
    "SparseDecodeProblem",
    "SparsePrefillBackwardProblem",
    "SparsePrefillProblem",
    "UnsupportedError",
    "__version__",
    "append_kv_cache",
    "backends",
    "build_info",
    "dequantize_kv_cache",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_decoding_metadata",
    "get_mla_metadata",
    "kernels",
    "merge_attention_states",
    "quantize_kv_cache",
    "why_not",
]
