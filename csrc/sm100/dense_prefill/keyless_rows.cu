#include "sm100/dense_prefill/keyless_rows.h"

#include <cuda_runtime.h>

#include <cmath>

#include "device/launch.h"

namespace flash_mla::sm100::dense_prefill {
namespace {

constexpr int kThreads = 256;
constexpr int kRowUnits = kPrefillHeadDimV * 2 / 16;  // of 16 bytes

// They are the first ones of a sequence.
__device__ int count_keyless(const DensePrefillParams& params, const PrefillSequence& sequence) {
  return sequence.k_length() == 0 ? sequence.q_length()
         : params.causal          ? max(sequence.q_length() - sequence.k_length(), 0)
                                  : 0;
}

// Every warp looks at all sequences, 32 at a time; all threads of the grid share the rows of each that has some.
__global__ void __launch_bounds__(kThreads) keyless_rows_kernel(const __grid_constant__ DensePrefillParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int num_sequences = params.plan->num_sequences, lane = threadIdx.x % 32;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int first = 0; first < num_sequences; first += 32) {
    int own_rows = 0, own_begin = 0;
    if (first + lane < num_sequences) {
      const PrefillSequence sequence = params.planned[first + lane];
      own_rows = count_keyless(params, sequence);
      own_begin = sequence.q_begin;
    }
    for (unsigned having = __ballot_sync(~0u, own_rows > 0); having != 0; having &= having - 1) {
      const int holder = __ffs(having) - 1;
      const int64_t rows = __shfl_sync(~0u, own_rows, holder), begin = __shfl_sync(~0u, own_begin, holder);
      auto* out = static_cast<uint4*>(params.out) + begin * params.h_q * kRowUnits;
      for (int64_t i = thread; i < rows * params.h_q * kRowUnits; i += threads) {
        out[i] = make_uint4(0, 0, 0, 0);
      }
      for (int64_t i = thread; i < rows * params.h_q; i += threads) {
        params.lse[i / rows * params.tokens_q + begin + i % rows] = INFINITY;
      }
    }
  }
}

}  // namespace

void launch_keyless_rows(const DensePrefillParams& params, void* stream) {
  device::launch_dependent("sm100_dense_prefill_keyless_rows", keyless_rows_kernel, params.num_sms, kThreads, 0, stream,
                           params);
}

}  // namespace flash_mla::sm100::dense_prefill
