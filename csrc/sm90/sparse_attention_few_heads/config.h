// Compile-time facts of the sparse attention kernels for few heads: roles, registers.
#pragma once

#include "device/few_rows/config.h"
#include "device/few_rows/storage.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, int kRows>
struct Config : FewRowsConfig<kFormat, kExtraFormat, kHeadDim, kRows, 8> {
  static constexpr bool kStartsEarly = true;  // before the kernels before it have ended, where lists are cut evenly
  static constexpr int kThreads = Config::kMathThreads + Config::kProducerThreads;
  // Registers per thread after the roles part: 128 * 232 + 256 * 96 <= 64 K.
  static constexpr int kMathRegisters = 232;
  static constexpr int kProducerRegisters = 96;
};

template <class C>
using Storage = FewRowsStorage<C, 1>;

}  // namespace flash_mla::sm90::sparse_attention_few_heads
