// Compile-time facts of the sparse attention kernels for few heads: roles, registers, what the roles tell each other.
#pragma once

#include <type_traits>

#include "device/few_rows/config.h"
#include "device/few_rows/storage.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

// That share a tile. Converting a row is one latency after another, which twice the warps take side by side; for
// copying eight are faster.
constexpr int producer_warps(KVFormat format) { return format == KVFormat::kBf16 ? 8 : 16; }

// What the index warps tell the converting warps: where the rows of the tiles to come are, a stage a tile.
template <bool kScalesBehindPage>
struct RowFeed {
  static constexpr int kStages = 4, kIndexWarps = 2;

  struct alignas(16) Tile {
    const unsigned char* rows[kScheduleBlock];
    int scales[kScalesBehindPage ? kScheduleBlock : 1];  // bytes from a row to its scales
    uint32_t valid[kIndexWarps];                         // a bit for each of an index warp's keys that counts
    uint32_t entry;                                      // struct Entry
    PieceFacts facts;                                    // of the piece that the tile begins
  };

  Tile tiles[kStages];
  Walk walks[kIndexWarps];
  uint64_t full[kStages], empty[kStages];
};

// Final rows on their way to memory, spread over the banks, and what is known of them.
template <int kRows>
struct ResultRows {
  alignas(16) unsigned char rows[kRows][kHeadDimV * 2 + 16];
  float reference[kRows], scale[kRows];
};

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, int kRows>
struct Config : FewRowsConfig<kFormat, kExtraFormat, kHeadDim, kRows, producer_warps(kFormat)> {
  static constexpr bool kStartsEarly = true;  // before the kernels before it have ended, where lists are cut evenly
  static constexpr bool kScalesBehindPage = layout_of(kFormat).scales_behind_page;
  using Feed = RowFeed<kScalesBehindPage>;
  using Walks = std::conditional_t<Config::kCopied, Walk[Config::kProducerWarps], Feed>;
  using Staging = ResultRows<kRows>;
  // Quarters of tiles go round groups of four converting warps: rows of a quarter or half of a tile more are on their
  // way than a tile has. What math warps need for 32 rows leaves registers for five groups.
  static constexpr int kGroupWarps = 4, kQuarters = Config::kProducerWarps / kGroupWarps;
  static constexpr int kGroups = kRows == 16 ? 6 : 5;
  static constexpr int kConvertingWarps = Config::kCopied ? Config::kProducerWarps : kGroups * kGroupWarps;
  static constexpr int kIndexWarps = Config::kCopied ? 0 : Feed::kIndexWarps;
  static constexpr int kIndexThreads = Config::kCopied ? 0 : 128;  // registers are shared out by warpgroups
  static constexpr int kQueryWarps = 2;                            // beside the index warps
  static constexpr int kQueryThreads = Config::kCopied ? Config::kProducerThreads : 32 * kQueryWarps;
  static constexpr int kThreads = Config::kMathThreads + 32 * kConvertingWarps + kIndexThreads;
  // Registers per thread after the roles part: of 384 threads with 168 each; 896 with 72, 1,024 with 64.
  static constexpr int kProducerRegisters = Config::kCopied ? 96 : 56;
  static constexpr int kIndexRegisters = 24;
  static constexpr int kMathRegisters = Config::kCopied ? 232 : kRows == 16 ? 152 : 200;
};

template <class C>
using Storage = FewRowsStorage<C, 1>;

}  // namespace flash_mla::sm90::sparse_attention_few_heads
