// Writing a piece: the final rows where it is a whole request, else a partial result for the combine kernel. Straight
// from registers, so that the key slots go on filling.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/numeric.cuh"
#include "sm90/dense_decode/pieces.cuh"

namespace flash_mla::sm90::dense_decode {

// Which partial result of all row tiles a piece's is.
__device__ __forceinline__ int64_t partial_tile(const DenseDecodeParams& params, const Place& place, int partial) {
  return (static_cast<int64_t>(partial) * params.h_kv + place.kv_head) * params.num_row_tiles + place.row_tile;
}

__device__ __forceinline__ uint32_t* state_of(const DenseDecodeParams& params, int64_t tile, int group, int side) {
  return params.partial_state + tile * kPartialStates + group * 2 + side;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ bool group_exists(const DenseDecodeParams& params, const Place& place, int row) {
  return place.row_tile * kRowTile + row / 16 * 16 < params.s_q * params.group;
}

// Whether a warp of its own tells other parts what is written; else each TMA thread has a slot, and none is idle.
__device__ __forceinline__ bool has_teller(const DenseDecodeParams& params) { return params.num_row_tiles <= 2; }

// A part's last piece may be the beginning of a request that ends in the next part. That one's piece comes first
// there, so that its results are mostly written when this piece ends, which then joins them with its own and writes
// the final rows; else the combine kernel does. Nothing waits, and no memory has to be set before the call: the warp
// that will ask for the other's results says here, at the start, that they are not there.
__device__ __forceinline__ bool expects_other(const DenseDecodeParams& params, const Place& place, int row, int side,
                                              int lane) {
  if (!params.joins || place.part + 1 >= params.num_parts) {
    return false;
  }
  const ScheduleRow* part = params.schedule + place.part;
  const int request = part->end_request, begin_request = part->begin_request, begin_block = part->begin_block,
            next_begin = part[1].begin_request, next_end = part[1].end_request;
  const int behind = place.part + 2 < params.num_parts ? part[2].begin_request : -1;
  const bool expects = request < params.b && next_begin == request && (begin_request < request || begin_block == 0) &&
                       (next_end > request || behind != request);
  if (expects && lane == 0 && group_exists(params, place, row)) {
    *state_of(params, partial_tile(params, place, kPartialsPerPart * (place.part + 1)), row / 16, side) = kPartialOpen;
  }
  return expects;
}

// No sum is a logarithm of -inf.
__device__ __forceinline__ void write_partial_lse(const DenseDecodeParams& params, int64_t tile, int row, int lane,
                                                  const float (&reference)[2], const float (&sum)[2]) {
  if (lane % 4 == 0) {
    *reinterpret_cast<float2*>(params.partial_lse + tile * kRowTile + row / 16 * 16 + lane / 4 * 2) =
        make_float2(reference[0] + log2f(sum[0]), reference[1] + log2f(sum[1]));
  }
}

// `row` is the first of the thread's two rows of the tile, the other is 8 further.
// `side`: which half of the columns.
__device__ __forceinline__ void write_partial(const DenseDecodeParams& params, const Place& place, const Piece& piece,
                                              int side, int row, int lane, const float (&output)[2][64],
                                              const float (&reference)[2], const float (&sum)[2]) {
  const int group = row / 16;
  if (!group_exists(params, place, row)) {
    return;
  }
  const int64_t tile = partial_tile(params, place, piece.partial);
  const float scale[2] = {sum[0] != 0 ? 1.0f / sum[0] : 0.0f, sum[1] != 0 ? 1.0f / sum[1] : 0.0f};
  if (side == 0) {
    write_partial_lse(params, tile, row, lane, reference, sum);
  }
  // In L2 until the combine kernel has read them, which drops them then: every line that goes to memory in between
  // holds up the loads of keys.
  const uint64_t policy = evict_last_policy();
  float* out = params.partial_out + tile * kPartialTile + group * kPartialGroup +
               side * kPartialBlocks / 2 * kPartialBlock + lane * 4;
#pragma unroll
  for (int block = 0; block < kPartialBlocks / 2; ++block) {
    const float* values = &output[block / 16][block % 16 * 4];
    store_hinted(out + block * kPartialBlock,
                 make_float4(values[0] * scale[0], values[1] * scale[0], values[2] * scale[1], values[3] * scale[1]),
                 policy);
  }
}

template <class T>
__device__ __forceinline__ void write_final(const DenseDecodeParams& params, const Place& place, const Piece& piece,
                                            int side, int row, int lane, const float (&output)[2][64],
                                            const float (&reference)[2], const float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int global_row = place.row_tile * kRowTile + row + 8 * r;
    const bool exists = global_row < params.s_q * params.group, any_key = sum[r] != 0;
    const int token = global_row / params.group, head = place.kv_head * params.group + global_row % params.group;
    const float sink = params.attn_sink && exists ? exp2f(params.attn_sink[head] * kLog2E - reference[r]) : 0.0f;
    const float scale = any_key ? 1.0f / (sum[r] + sink) : 0.0f;
    T* out = static_cast<T*>(params.out) + piece.request * params.stride_out_b + token * params.stride_out_s +
             head * params.stride_out_h + side * 256;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 32 columns: a quad's four words become four runs of 8 columns
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = i % 4 * 16 + j * 4 + 2 * r;
        words[j] = pack2<T>(output[i / 4][at] * scale, output[i / 4][at + 1] * scale);
      }
      transpose_quad(words, lane);
      if (exists) {
        *reinterpret_cast<uint4*>(out + i * 32 + lane % 4 * 8) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    if (side == 0 && exists && lane % 4 == 0) {
      params.lse[piece.request * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s] =
          any_key ? (reference[r] + log2f(sum[r])) * kLn2 : INFINITY;
    }
  }
}

// Joins the results of the part behind with this piece's, if they are there, and writes the final rows; the same bits
// as the combine kernel makes of both.
template <class T>
__device__ __forceinline__ bool join(const DenseDecodeParams& params, const Place& place, const Piece& piece, int side,
                                     int row, int lane, const float (&output)[2][64], const float (&reference)[2],
                                     const float (&sum)[2]) {
  if (!group_exists(params, place, row)) {
    return true;
  }
  const int group = row / 16;
  const int64_t tile = partial_tile(params, place, kPartialsPerPart * (place.part + 1));
  // The first half of the columns brings the log-sum-exps.
  const bool written = lane >= 2 || load_acquire(state_of(params, tile, group, lane)) == kPartialWritten;
  if (!__all_sync(~0u, written)) {
    return false;
  }
  __syncwarp();
  if (side == 0) {
    // The other half of the columns may not find these results.
    write_partial_lse(params, partial_tile(params, place, piece.partial), row, lane, reference, sum);
  }
  const float2 other =
      __ldcg(reinterpret_cast<const float2*>(params.partial_lse + tile * kRowTile + group * 16 + lane / 4 * 2));
  float factor[2], other_factor[2], own_scale[2], scale[2];
  T* out[2];
  bool exists[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int global_row = place.row_tile * kRowTile + row + 8 * r;
    exists[r] = global_row < params.s_q * params.group;
    const int token = global_row / params.group, head = place.kv_head * params.group + global_row % params.group;
    const float own = reference[r] + log2f(sum[r]), others = r == 0 ? other.x : other.y;
    const float largest = fmaxf(fmaxf(kNoKeyLse, own), others);
    factor[r] = exp2_approx(own - largest);
    other_factor[r] = exp2_approx(others - largest);
    own_scale[r] = sum[r] != 0 ? 1.0f / sum[r] : 0.0f;
    const float weight = factor[r] + other_factor[r];
    const float sink = params.attn_sink && exists[r] ? params.attn_sink[head] * kLog2E : -INFINITY;
    scale[r] = weight != 0 ? __fdividef(1.0f, weight + exp2_approx(sink - largest)) : 0.0f;
    out[r] = static_cast<T*>(params.out) + piece.request * params.stride_out_b + token * params.stride_out_s +
             head * params.stride_out_h + side * 256 + lane % 4 * 8;
    if (side == 0 && exists[r] && lane % 4 == 0) {
      params.lse[piece.request * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s] =
          weight != 0 ? (largest + log2f(weight)) * kLn2 : INFINITY;
    }
  }
  const float* values =
      params.partial_out + tile * kPartialTile + group * kPartialGroup + side * kPartialBlocks / 2 * kPartialBlock;
  float4 theirs[2][4];
  auto load = [&](int i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      theirs[i % 2][j] = __ldcg(reinterpret_cast<const float4*>(values + (i * 4 + j) * kPartialBlock + lane * 4));
    }
    __syncwarp();  // holds them: there are no registers for more
  };
  load(0);
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // 32 columns, as in `write_final`
    if (i < 7) {
      load(i + 1);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* own = &output[i / 4][i % 4 * 16 + j * 4 + 2 * r];
        const float x = r == 0 ? theirs[i % 2][j].x : theirs[i % 2][j].z,
                    y = r == 0 ? theirs[i % 2][j].y : theirs[i % 2][j].w;
        // The combine kernel adds to zero, of which the first addition decides the sign.
        words[j] = pack2<T>(fmaf(other_factor[r], x, fmaf(factor[r], own[0] * own_scale[r], 0.0f)) * scale[r],
                            fmaf(other_factor[r], y, fmaf(factor[r], own[1] * own_scale[r], 0.0f)) * scale[r]);
      }
      transpose_quad(words, lane);
      if (exists[r]) {
        *reinterpret_cast<uint4*>(out[r] + i * 32) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
  // Nobody reads them again.
  __syncwarp();
  constexpr int kLineFloats = 128 / sizeof(float), kLines = kPartialBlocks / 2 * kPartialBlock / kLineFloats;
#pragma unroll
  for (int line = 0; line < kLines; line += 32) {
    discard_line(values + (line + lane) * kLineFloats);
  }
  return true;
}

// A piece of a split request: joined with the rest, where this is the beginning and the rest is there; else a partial
// result.
template <class T>
__device__ __forceinline__ void write_split(const DenseDecodeParams& params, const Place& place, const Piece& piece,
                                            bool expects, int side, int row, int lane, const float (&output)[2][64],
                                            const float (&reference)[2], const float (&sum)[2]) {
  const bool begins = piece.begin_tile == 0;
  const bool joined =
      params.joins && begins && expects && join<T>(params, place, piece, side, row, lane, output, reference, sum);
  if (!joined) {
    write_partial(params, place, piece, side, row, lane, output, reference, sum);
  }
  if (!params.joins || !group_exists(params, place, row)) {
    return;
  }
  uint32_t* const state = state_of(params, partial_tile(params, place, piece.partial), row / 16, side);
  if (begins) {
    if (lane == 0) {
      *state = joined ? kPartialJoined : kPartialOpen;
    }
  } else if (!has_teller(params)) {
    __threadfence();
    __syncwarp();
    if (lane == 0) {
      store_release(state, kPartialWritten);
    }
  }
}

// Says that the results of a part's first piece are written, where that piece is the end of a split request. The math
// warps hand them over to this warp and go on: they would else wait until memory has them.
template <class Storage>
__device__ __forceinline__ void tell_written(const DenseDecodeParams& params, Storage& storage, const Place& place,
                                             int lane) {
  const ScheduleRow& row = params.schedule[place.part];
  if (row.begin_block == 0 || row.begin_request >= params.b || row.begin_request > row.end_request) {
    return;
  }
  mbarrier_wait(shared_address(&storage.written), 0);
  __threadfence();
  if (lane < kPartialStates && group_exists(params, place, lane / 2 * 16)) {
    store_release(state_of(params, partial_tile(params, place, kPartialsPerPart * place.part), lane / 2, lane % 2),
                  kPartialWritten);
  }
}

}  // namespace flash_mla::sm90::dense_decode
