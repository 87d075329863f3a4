"""The Triton backend: portable kernels for every GPU from compute capability 8.0 on, and what CUDA kernels decline.

This module imports no Triton: that happens in the first call that the backend serves. With `TRITON_INTERPRET=1` in the
environment when that happens, Triton's interpreter runs the kernels on any device, slowly: for tests.

| module | holds |
| --- | --- |
| `support` | where the kernels run and what they take: `why_not` |
| `operators` | `torch.ops.flash_mla.triton_*` |
| `config` | tile sizes by architecture and shared memory |
| `language` | what kernels share: constants, the softmax step, the pieces of a schedule |
| `dense_decode`, `combine` | split-KV attention over a paged cache, and joining its partial results |
| `plan` | the schedule, made on the device |
| `dequant` | cache formats: from bytes to keys, in registers |
| `sparse_decode`, `sparse_prefill` | attention over index lists |
| `dense_prefill` | attention over sequences laid end to end |
| `kv_cache` | `append_kv_cache`, `dequantize_kv_cache` |
| `merge` | `merge_attention_states` |
"""

from flash_mla.backends.triton.operators import OPERATORS
from flash_mla.backends.triton.support import missing, serves, why_not, why_not_on

__all__ = ["OPERATORS", "missing", "serves", "why_not", "why_not_on"]
