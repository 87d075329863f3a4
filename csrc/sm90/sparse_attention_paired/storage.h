// Shared-memory map of the paired sparse attention kernels. Slices are 64 rows x 64 columns of bfloat16, 128 bytes a
// row, whose 16-byte units are permuted by the row; the RoPE columns behind them have rows of 64 bytes.
#pragma once

#include "device/sparse/walk.h"
#include "sm90/sparse_attention_paired/config.h"

namespace flash_mla::sm90::sparse_attention_paired {

// What the CTA that owns rows sends to the other one: of a tile, in the order of wgmma's operand in registers, the
// probabilities and the reference maxima that they are relative to; behind a piece's last tile, the sums in their
// place.
struct Message {
  uint4 probabilities[4][128];
  float2 rows[32];
};

template <class C>
struct Storage {
  alignas(1024) unsigned char q[2][C::kTileBytes];  // of the pair's two row tiles, this CTA's columns
  alignas(1024) unsigned char k[C::kStages][C::kTileBytes];
  alignas(16) float4 scores[8][128];  // the other CTA's part of the scores of the row tile that this CTA owns
  Message messages[2];                // for the other row tile, by turns
  float row_max[kRowTile];            // the largest scores of the rows that this CTA owns, base 2
  // Of a slot: a bit for each key that counts.
  alignas(8) uint8_t valid[C::kStages][C::kProducerWarps];
  PieceFacts pieces[2];  // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[C::kStages][kNumParts];
  uint64_t k_empty[C::kStages];
  uint64_t q_full, q_empty;
  uint64_t scores_full;
  uint64_t peer_scores_read;  // those that this CTA has sent
  uint64_t message_full[2], peer_message_read[2];
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention_paired
