// Compile-time facts of the sparse attention kernels for few heads: roles, registers, where things are in tensor
// memory.
#pragma once

#include "device/few_rows/config.h"
#include "device/few_rows/storage.h"
#include "device/sm100/umma.h"

namespace flash_mla::sm100::sparse_attention_few_heads {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, int kRows, class Element = __nv_bfloat16>
struct Config : FewRowsConfig<kFormat, kExtraFormat, kHeadDim, kRows, 16, Element> {
  // Four math warps, four of which one issues products, sixteen producers.
  static constexpr int kProductThreads = 128;
  static constexpr int kThreads = Config::kMathThreads + kProductThreads + Config::kProducerThreads;
  // Registers per thread after the roles part: 128 * (152 + 40 + 4 * 72), of the 768 * 80 that the kernel starts with.
  static constexpr int kMathRegisters = 152, kProductRegisters = 40, kProducerRegisters = 72;

  // Products have 64 rows, keys or columns of the values, and results take 16 of every 32 lanes, a column for each
  // query row: the output in blocks of 64 columns of the values, then the scores of both slots.
  static constexpr int kProductRows = 64, kBlocks = kHeadDimV / kProductRows;
  static constexpr uint32_t output(int block) { return block * kRows; }
  static constexpr uint32_t scores(int slot) { return (kBlocks + slot) * kRows; }
  static constexpr uint32_t kTensorColumns = 16 * kRows;  // a power of two
};

template <class C>
struct Storage : FewRowsStorage<C, 2> {
  uint64_t scores_full[2];
  uint64_t probabilities_full[2];
  uint32_t tensor_memory;
};

}  // namespace flash_mla::sm100::sparse_attention_few_heads
