// Shared-memory map of the paired sparse attention kernels. Slices are 64 rows x 64 columns of bfloat16, 128 bytes a
// row, whose 16-byte units are permuted by the row; the RoPE columns behind them have rows of 64 bytes.
#pragma once

#include "sm90/sparse_attention/storage.h"
#include "sm90/sparse_attention_paired/config.h"

namespace flash_mla::sm90::sparse_attention_paired {

using sparse_attention::kNumParts, sparse_attention::kRope, sparse_attention::kValues;
using sparse_attention::PieceFacts, sparse_attention::Walk;

// What a math warpgroup sends to the one of the other CTA that has the same rows: the probabilities of its half of a
// tile's keys, in the order of wgmma's operand in registers, and of each quad's two rows the reference maxima that they
// are relative to; with a piece's last tile, the sums and the largest scores of all of its keys.
struct Message {
  uint4 probabilities[2][128];
  float2 references[32], sums[32], maxima[32];
};

template <class C>
struct Storage {
  alignas(1024) unsigned char q[2][C::kTileBytes];  // of the pair's two row tiles, this CTA's columns
  alignas(1024) unsigned char k[C::kStages][C::kTileBytes];
  // By row tile: the other CTA's part of the scores of this CTA's half of the keys; what the other CTA found, by turns.
  alignas(16) float4 scores[2][4][128];
  Message messages[2][2];
  // Of a slot: a bit for each key that counts.
  alignas(8) uint16_t valid[C::kStages][C::kProducerWarps / C::kProducerGroups];
  PieceFacts pieces[2];  // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[C::kStages][kNumParts];
  uint64_t k_empty[C::kStages];
  uint64_t q_full, q_empty;
  uint64_t scores_full[2];       // by row tile
  uint64_t peer_scores_read[2];  // those that this CTA has sent
  uint64_t message_full[2][2];
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention_paired
