// Compile-time facts of the sparse attention kernels for few heads: roles, registers.
#pragma once

#include "device/few_rows/config.h"
#include "device/few_rows/storage.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

// Converting a row is one latency after another, which twice the warps take side by side; for copying eight are faster.
constexpr int producer_warps(KVFormat format) { return format == KVFormat::kBf16 ? 8 : 16; }

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, int kRows>
struct Config : FewRowsConfig<kFormat, kExtraFormat, kHeadDim, kRows, producer_warps(kFormat)> {
  static constexpr bool kStartsEarly = true;  // before the kernels before it have ended, where lists are cut evenly
  static constexpr int kThreads = Config::kMathThreads + Config::kProducerThreads;
  // Registers per thread after the roles part: of 384 threads with 168 each, or 640 with 96.
  static constexpr int kMathRegisters = Config::kCopied ? 232 : 224;
  static constexpr int kProducerRegisters = Config::kCopied ? 96 : 64;
};

template <class C>
using Storage = FewRowsStorage<C, 1>;

}  // namespace flash_mla::sm90::sparse_attention_few_heads
