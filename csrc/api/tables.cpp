#include "api/tables.h"

#include <initializer_list>
#include <vector>

#ifdef FLASH_MLA_WITH_SM90
#include "sm90/kernels.h"
#endif
#ifdef FLASH_MLA_WITH_SM100
#include "sm100/kernels.h"
#endif

namespace flash_mla::api {
namespace {

template <class Problem, class Params>
std::vector<Kernel<Problem, Params>> joined(std::initializer_list<KernelTable<Problem, Params>> tables) {
  std::vector<Kernel<Problem, Params>> all;
  for (const auto& table : tables) {
    all.insert(all.end(), table.begin(), table.end());
  }
  return all;
}

}  // namespace

KernelTable<DenseDecodeProblem, DenseDecodeParams> dense_decode_kernels() {
  static const auto kAll = joined<DenseDecodeProblem, DenseDecodeParams>({
#ifdef FLASH_MLA_WITH_SM90
      sm90::dense_decode_kernels(),
#endif
#ifdef FLASH_MLA_WITH_SM100
      sm100::dense_decode_kernels(),
#endif
  });
  return kAll;
}

KernelTable<SparseAttentionProblem, SparseAttentionParams> sparse_attention_kernels() {
  static const auto kAll = joined<SparseAttentionProblem, SparseAttentionParams>({
#ifdef FLASH_MLA_WITH_SM90
      sm90::sparse_attention_kernels(),
#endif
#ifdef FLASH_MLA_WITH_SM100
      sm100::sparse_attention_kernels(),
#endif
  });
  return kAll;
}

KernelTable<SparseAttentionProblem, SparsePrefillBackwardParams> sparse_prefill_backward_kernels() {
  static const auto kAll = joined<SparseAttentionProblem, SparsePrefillBackwardParams>({
#ifdef FLASH_MLA_WITH_SM90
      sm90::sparse_prefill_backward_kernels(),
#endif
  });
  return kAll;
}

KernelTable<DensePrefillProblem, DensePrefillParams> dense_prefill_kernels() {
  static const auto kAll = joined<DensePrefillProblem, DensePrefillParams>({
#ifdef FLASH_MLA_WITH_SM90
      sm90::dense_prefill_kernels(),
#endif
#ifdef FLASH_MLA_WITH_SM100
      sm100::dense_prefill_kernels(),
#endif
  });
  return kAll;
}

KernelTable<DensePrefillProblem, DensePrefillBackwardParams> dense_prefill_backward_kernels() {
  static const auto kAll = joined<DensePrefillProblem, DensePrefillBackwardParams>({
#ifdef FLASH_MLA_WITH_SM90
      sm90::dense_prefill_backward_kernels(),
#endif
#ifdef FLASH_MLA_WITH_SM100
      sm100::dense_prefill_backward_kernels(),
#endif
  });
  return kAll;
}

}  // namespace flash_mla::api
