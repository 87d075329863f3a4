// The math warpgroups. Keys, then columns of the values, are the rows of their products, and query rows the
// columns: so the keys are A operands, which come from registers, and no tile is ever written to shared memory.
#pragma once

#include "device/softmax.cuh"
#include "sm90/sparse_attention_few_heads/epilogue.cuh"
#include "sm90/sparse_attention_few_heads/operands.cuh"
#include "sm90/sparse_attention_few_heads/producer.cuh"

namespace flash_mla::sm90::sparse_attention_few_heads {

// Warpgroup `side` scores every fourth tile and keeps a quarter of the output's columns. The tiles' probabilities are
// multiplied in their order, by all.
template <class C>
class MathWarpgroup {
  using Major = cute::SM90::GMMA::Major;
  template <class Few, class Many>
  using Atom = std::conditional_t<C::kRows == 16, Few, Many>;
  using Scores = Atom<cute::SM90::GMMA::MMA_64x16x16_F32F16F16_RS<Major::K, Major::K>,
                      cute::SM90::GMMA::MMA_64x32x16_F32F16F16_RS<Major::K, Major::K>>;
  using RopeScores = Atom<cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_RS<Major::K, Major::K>,
                          cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, Major::K>>;
  using Output = Atom<cute::SM90::GMMA::MMA_64x16x16_F32F16F16_RS<Major::K, Major::MN>,
                      cute::SM90::GMMA::MMA_64x32x16_F32F16F16_RS<Major::K, Major::MN>>;
  static constexpr int kThreads = 128;
  static constexpr uint32_t kPiecePhase = 1u << kSides;
  static constexpr int kFragment = C::kRows / 2;  // accumulators of a product
  static constexpr int kOwnRows = C::kRows / 4;   // query rows that are columns of a lane's accumulators
  static_assert(C::kRows == 16 || C::kRows == 32);

  // Of a key whose scores the lane has.
  struct ScoredRow {
    int exponent;
    float factor;
  };
  // Of the warp's 16 keys.
  struct ScoredKeys {
    ScoredRow rows[2];
    bool sums;  // float32 scales: one of them is no half
  };

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage, int side)
      : params_(params),
        storage_(storage),
        side_(side),
        warp_(__shfl_sync(~0u, threadIdx.x / 32 % 4, 0)),
        lane_(threadIdx.x % 32),
        column_(side * (kHeadDimV / kSides) + warp_ * 32 + lane_ / 4 * 4) {}

  __device__ __forceinline__ void run() {
    for (;; phases_ ^= kPiecePhase) {
      const int piece = (phases_ & kPiecePhase) != 0;
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      const PieceFacts& facts = storage_.pieces[piece];
      const int num_tiles = facts.num_tiles;
      if (num_tiles < 0) {
        return;
      }
      begin_piece(num_tiles);
      RingPlace<C> scored = next_ + C::kTileGroups * side_;
      float scores[kFragment];
      ScoredKeys keys{};
      // A step multiplies a tile. Before it this warpgroup scores its next tile, or makes probabilities of the scores.
      // There is one copy of each in the code: small calls spend much of their time fetching instructions.
#pragma unroll 1
      for (int tile = min(side_ - kAhead, 0); tile < num_tiles; ++tile) {
        const int ahead = tile + kAhead;
        if (ahead % kSides == side_) {
          if (ahead < num_tiles) {
            score(scored, scores, keys);
            if (ahead + kSides >= num_tiles) {
              release_q();
            }
          }
        } else if (tile >= 0 && tile % kSides == side_) {
          softmax(scored, tile, facts, scores, keys);
          scored.advance(kSides * C::kTileGroups);
        }
        if (tile >= 0) {
          multiply(tile);
        }
      }
      if (side_ >= num_tiles) {
        release_q();
      }
      finish_piece(facts);
    }
  }

 private:
  // Q as half precision, each row by a power of two of its own, in the order of columns in which the keys' fragments
  // have them; what is known of the rows.
  __device__ __forceinline__ void begin_piece(int num_tiles) {
    constexpr int kWarpRows = C::kRows / (4 * kSides);
    for (int i = 0; i < kWarpRows; ++i) {
      const int row = (side_ * 4 + warp_) * kWarpRows + i;
      int exponent = 0;
      if (num_tiles > 0) {
        exponent = convert_q(row);
      }
      if (lane_ == 0) {
        storage_.references[row] = {params_.scale_log2 * power_of_two(-exponent), 0};
        storage_.started[row] = false;
      }
    }
    if (threadIdx.x == 0) {
      storage_.all_started = false;
    }
    if (lane_ < C::kRows / 4) {
      *reinterpret_cast<float4*>(&storage_.maxima[side_][warp_][lane_ * 4]) =
          make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    }
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      sum_[own] = 0;
    }
#pragma unroll
    for (int product = 0; product < 2; ++product) {
#pragma unroll
      for (int i = 0; i < kFragment; ++i) {
        output_[product][i] = 0;
      }
    }
    fence_async_proxy();
    named_barrier_sync(kMathWarps, C::kMathThreads);
  }

  // Returns the exponent by which the row has been multiplied.
  __device__ __forceinline__ int convert_q(int row) {
    constexpr int kUnits = C::kHeadDim / 8, kHalfUnits = kUnits - (C::kHasRope ? 8 : 0), kPasses = ceil_div(kUnits, 32);
    unsigned char* const line = storage_.q + row * kSliceRowBytes;
    uint4 words[kPasses];
    float largest = 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int unit = pass * 32 + lane_;
      words[pass] = make_uint4(0, 0, 0, 0);
      if (unit < kUnits) {
        words[pass] = *reinterpret_cast<const uint4*>(line + unit / 8 * C::kQSliceBytes + ((unit % 8 ^ row % 8) * 16));
      }
      if (unit < kHalfUnits) {
        const uint32_t w[4] = {words[pass].x, words[pass].y, words[pass].z, words[pass].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          largest =
              fmaxf(largest, fmaxf(fabsf(__uint_as_float(w[i] << 16)), fabsf(__uint_as_float(w[i] & 0xffff0000))));
        }
      }
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, mask));
    }
    const int exponent = clamped_exponent(14 - exponent_of(largest));
    const float factor = power_of_two(exponent);
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int unit = pass * 32 + lane_;
      if (unit < kUnits) {
        const uint32_t w[4] = {words[pass].x, words[pass].y, words[pass].z, words[pass].w};
        // Where the key fragments of lane `t` of a quad have the unit: step `first_step` of a slice's four and the
        // next.
        int slice, first_step, t;
        const bool rope = unit >= kHalfUnits;
        if (rope) {
          slice = C::kRopeSlice;
          t = unit % 8 / 2;
          first_step = unit % 2 * 2;
        } else if (kHalfUnits % 16 != 0 && unit >= kHalfUnits / 16 * 16) {
          slice = unit / 8;
          t = unit % 8 / 2;
          first_step = unit % 2 * 2;
        } else {
          slice = unit / 16 * 2 + unit / 2 % 2;
          t = unit % 16 / 4;
          first_step = unit % 2 * 2;
        }
        unsigned char* const place = line + slice * C::kQSliceBytes + t * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = __uint_as_float(w[i] << 16) * factor, y = __uint_as_float(w[i] & 0xffff0000) * factor;
          const int its_unit = (first_step + i / 2) * 2 + i % 2;
          *reinterpret_cast<uint32_t*>(place + ((its_unit ^ row % 8) * 16)) =
              rope ? pack2<__nv_bfloat16>(x, y) : pack2<__half>(x, y);
        }
      }
    }
    return exponent;
  }

  __device__ __forceinline__ void release_q() {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.q_empty));
    }
  }

  // Calls `function` with the format of the tile whose keys `valid` tells of.
  template <class Function>
  static __device__ __forceinline__ void with_format(uint32_t valid, Function&& function) {
    if (C::kTwoFormats && (valid & kOfSecondFormat)) {
      function(std::integral_constant<KVFormat, C::kSecondFormat>());
    } else {
      function(std::integral_constant<KVFormat, C::kFormat>());
    }
  }

  // S^T = K Q^T. A warp reads only the 16 rows that it scores.
  __device__ __forceinline__ void score(const RingPlace<C>& tile, float (&scores)[kFragment], ScoredKeys& keys) {
    const RingPlace<C> place = tile + warp_;
    mbarrier_wait(shared_address(&storage_.full[place.group]), place.parity);
    with_format(storage_.valid[place.group], [&](auto format) {
      constexpr KVFormat kFormat = format;
      constexpr int kValues = layout_of(kFormat).values, kBlocks = kValues / 128;
      constexpr bool kScalesScores = layout_of(kFormat).scale == ScaleType::kFloat32;
      const int t = lane_ % 4, key = lane_ / 4;
      unsigned char* const rows[2] = {storage_.rows[place.group] + key * C::kRowBytes,
                                      storage_.rows[place.group] + (key + 8) * C::kRowBytes};
      const unsigned char* const rope = storage_.rope[C::kHasRope ? place.group : 0] + key * kSliceRowBytes;
      const Descriptor q(shared_address(storage_.q), 16);
      float steps[2];
      bool sums = false;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int rope_exponent = -127;
        if constexpr (C::kRopeInValues) {
          rope_exponent = largest_rope_exponent(rope + r * 8 * kSliceRowBytes, t, key);
        }
        const PreparedRow prepared = Scales<kFormat>::prepare(rows[r], t, rope_exponent);
        keys.rows[r] = {prepared.exponent, prepared.factor};
        steps[r] = prepared.step;
        sums |= prepared.sums;
      }
      if constexpr (kScalesScores) {
        keys.sums = __any_sync(~0u, sums);
      }
      __syncwarp();
      uint32_t fragments[2][8];  // of two steps each
      if constexpr (kScalesScores && C::kHasRope) {
        score_rope(rope, t, key, 0x3f803f80, 0x3f803f80, false, fragments, scores);
        wgmma_wait<0>();
      }
      // Of 128 columns a lane has 32 consecutive ones; of 64 on their own, 16.
#pragma unroll 1
      for (int block = 0; block < kBlocks; ++block) {
        if (kScalesScores && (C::kHasRope || block > 0)) {
          const float step[2] = {__shfl_sync(~0u, steps[0], block, 4), __shfl_sync(~0u, steps[1], block, 4)};
#pragma unroll
          for (int i = 0; i < kFragment; ++i) {
            scores[i] *= step[i / 2 % 2];
          }
        }
        const bool accumulate = block > 0 || (kScalesScores && C::kHasRope);
        const int column = block * 128 + t * 32;
        score_slice<kFormat>(rows, column, q.at(block * 2 * C::kQSliceBytes), accumulate, fragments, scores);
        score_slice<kFormat>(rows, column + 16, q.at((block * 2 + 1) * C::kQSliceBytes), true, fragments, scores);
        // No product is in flight at a loop's back edge: the compiler would serialise all products.
        wgmma_wait<0>();
      }
      if constexpr (kValues % 128 != 0) {
        score_slice<kFormat>(rows, kBlocks * 128 + t * 16, q.at(kBlocks * 2 * C::kQSliceBytes), true, fragments,
                             scores);
      }
      if constexpr (!kScalesScores && C::kHasRope) {
        const uint32_t first = static_cast<uint32_t>(127 - keys.rows[0].exponent) << 7,
                       second = static_cast<uint32_t>(127 - keys.rows[1].exponent) << 7;
        score_rope(rope, t, key, first * 0x10001, second * 0x10001, true, fragments, scores);
      }
      wgmma_wait<0>();
    });
  }

  // The RoPE columns stay bfloat16, times a power of two of each row.
  __device__ __forceinline__ void score_rope(const unsigned char* rope, int t, int key, uint32_t first, uint32_t second,
                                             bool accumulate, uint32_t (&fragments)[2][8],
                                             float (&scores)[kFragment]) const {
    const Descriptor q(shared_address(storage_.q), 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t factor = r ? second : first;
        const uint4 words = rope_unit(rope + r * 8 * kSliceRowBytes, 2 * t + half, key);
        const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const __nv_bfloat162 product =
              __hmul2(reinterpret_cast<const __nv_bfloat162&>(w[j]), reinterpret_cast<const __nv_bfloat162&>(factor));
          fragments[half][j / 2 * 4 + j % 2 * 2 + r] =
              factor == 0x3f803f80 ? w[j] : reinterpret_cast<const uint32_t&>(product);
        }
      }
      score_steps<RopeScores>(fragments[half], q.at(C::kRopeSlice * C::kQSliceBytes), half, accumulate, scores);
    }
  }

  // 64 columns of the keys, of which the lane has 16 from `column` on.
  template <KVFormat kFormat>
  static __device__ __forceinline__ void score_slice(unsigned char* const (&rows)[2], int column, uint64_t q,
                                                     bool accumulate, uint32_t (&fragments)[2][8],
                                                     float (&scores)[kFragment]) {
    using Operand = ScoreOperand<kFormat>;
    uint4 raw[2];
    uint32_t scales[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      raw[r] = Operand::load(rows[r], column);
      scales[r] = Scales<kFormat>::of_row(rows[r], column);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        Operand::convert(raw[r], half, scales[r], fragments[half] + r);
      }
      score_steps<Scores>(fragments[half], q, half, accumulate, scores);
    }
  }

  // Two of a slice's four steps. Waits for the two before, whose fragments are the next to be overwritten.
  template <class Atom>
  static __device__ __forceinline__ void score_steps(const uint32_t (&fragment)[8], uint64_t q, int half,
                                                     bool accumulate, float (&scores)[kFragment]) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      wgmma_rs<Atom>(scores, fragment + 4 * j, q + (half * 2 + j) * (32 >> 4), accumulate || half + j > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
  }

  static __device__ __forceinline__ uint4 rope_unit(const unsigned char* row, int unit, int key) {
    return *reinterpret_cast<const uint4*>(row + ((unit ^ key % 8) * 16));
  }

  // The exponent of the largest RoPE value of a row, of the lane's two units.
  static __device__ __forceinline__ int largest_rope_exponent(const unsigned char* row, int t, int key) {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = rope_unit(row, 2 * t + i, key);
      largest = __vmaxu2(largest, __vmaxu2(__vmaxu2(words.x & 0x7fff7fff, words.y & 0x7fff7fff),
                                           __vmaxu2(words.z & 0x7fff7fff, words.w & 0x7fff7fff)));
    }
    return static_cast<int>(max(largest & 0xffff, largest >> 16) >> 7) - 127;
  }

  // The query rows that are columns of a lane's fragments, by their number.
  __device__ __forceinline__ int row_of(int own) const { return own / 2 * 8 + lane_ % 4 * 2 + own % 2; }

  // Scores -> probabilities times 2^exponent of their keys, where all multiply them.
  __device__ __forceinline__ void softmax(const RingPlace<C>& tile, int number, const PieceFacts& facts,
                                          float (&scores)[kFragment], const ScoredKeys& keys) {
    const RingPlace<C> place = tile + warp_;
    const int exponents[2] = {keys.rows[0].exponent, keys.rows[1].exponent};
    const float factors[2] = {power_of_two(exponents[0]), power_of_two(exponents[1])};
#pragma unroll
    for (int j = 0; j < C::kRows / 8; ++j) {
      const float4 pair = *reinterpret_cast<const float4*>(&storage_.references[row_of(2 * j)]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scores[4 * j + 2 * r] = fmaf(scores[4 * j + 2 * r] * keys.rows[r].factor, pair.x, -pair.y);
        scores[4 * j + 2 * r + 1] = fmaf(scores[4 * j + 2 * r + 1] * keys.rows[r].factor, pair.z, -pair.w);
      }
    }
    mask(place, number, facts, scores);
    if (params_.max_logits != nullptr) {
      keep_maxima(scores);
    }
    bool outgrown = !storage_.all_started;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = scores[2 * r];
#pragma unroll
      for (int i = 0; i < kFragment; ++i) {
        if (i / 2 % 2 == r) {
          largest = fmaxf(largest, scores[i]);
        }
      }
      outgrown |= largest + exponents[r] > kTop + kSlack;
    }
    const bool moves = named_barrier_any(kOutgrown + side_, kThreads, outgrown);
    if (moves) {
      move_references(scores, exponents);
    }
    if (threadIdx.x % kThreads == 0) {
      storage_.moved[side_] = moves;
    }
    uint32_t packed[kFragment / 2];
#pragma unroll
    for (int i = 0; i < kFragment; i += 2) {
      const int own = i / 4 * 2, r = i / 2 % 2;
      const float x = exp2_approx(scores[i]), y = exp2_approx(scores[i + 1]);
      sum_[own] += x;
      sum_[own + 1] += y;
      packed[i / 2] = pack2<__half>(x * factors[r], y * factors[r]);
    }
    const uint32_t group = probabilities(place.group, side_, warp_);
    const int key = lane_ % 16, unit = lane_ / 16;
    __syncwarp();  // the RoPE columns that lay there have been read
#pragma unroll
    for (int units = 0; units < C::kRows / 8; units += 2) {
      store_matrix_x4(group + key * kSliceRowBytes + (((units + unit) ^ key % 8) * 16), &packed[units * 2]);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane_ == 0) {
      storage_.sums[side_][warp_] = keys.sums;
      mbarrier_arrive(shared_address(&storage_.probabilities_full[side_]));
    }
  }

  // Of the tile that warpgroup `side` has scored last, a group of keys.
  __device__ __forceinline__ uint32_t probabilities(int ring_group, int side, int group) const {
    if constexpr (C::kRopeBehindValues) {
      return shared_address(storage_.rope[ring_group]);
    } else {
      return shared_address(storage_.probabilities[side * C::kTileGroups + group]);
    }
  }

  // Keys that do not count become -inf. A lane's keys are `key` and the one 8 further.
  __device__ __forceinline__ void mask(const RingPlace<C>& place, int number, const PieceFacts& facts,
                                       float (&scores)[kFragment]) const {
    const int key = lane_ / 4;
    const uint32_t valid = storage_.valid[place.group] & 0xffff;
    if (valid != 0xffff) {
#pragma unroll
      for (int i = 0; i < kFragment; ++i) {
        scores[i] = valid >> (key + i / 2 % 2 * 8) & 1 ? scores[i] : -INFINITY;
      }
    }
    if (params_.causal) {
      const int limit = facts.limit - number * C::kKeys, first = warp_ * C::kGroupKeys + key;
      if (limit < C::kKeys) {
#pragma unroll
        for (int i = 0; i < kFragment; ++i) {
          const int token = (facts.row_tile * C::kRows + row_of(i / 4 * 2 + i % 2)) / params_.h_q;
          scores[i] = first + i / 2 % 2 * 8 < limit + token ? scores[i] : -INFINITY;
        }
      }
    }
  }

  // Over the lanes that hold other keys.
  static __device__ __forceinline__ float largest_of_lanes(float x) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
    }
    return x;
  }

  static __device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      x += __shfl_xor_sync(~0u, x, mask);
    }
    return x;
  }

  __device__ __forceinline__ void keep_maxima(const float (&scores)[kFragment]) {
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      const int at = own / 2 * 4 + own % 2, row = row_of(own);
      const float largest = largest_of_lanes(fmaxf(scores[at], scores[at + 2])) + storage_.references[row].maximum;
      if (lane_ < 4) {
        float& kept = storage_.maxima[side_][warp_][row];
        kept = fmaxf(kept, largest);
      }
    }
  }

  // Moves the references of the rows in which a score has outgrown its own, or which see their first key.
  __device__ __forceinline__ void move_references(float (&scores)[kFragment], const int (&exponents)[2]) {
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      const int at = own / 2 * 4 + own % 2;
      const float largest = largest_of_lanes(fmaxf(scores[at] + exponents[0], scores[at + 2] + exponents[1]));
      if (lane_ < 4) {
        storage_.scratch[side_][warp_][row_of(own)] = largest;
      }
    }
    named_barrier_sync(kOutgrown + side_, kThreads);
    constexpr uint32_t kRowLanes = C::kRows == 32 ? ~0u : 0xffff;
    const int row = threadIdx.x % kThreads;
    if (row < C::kRows) {
      float largest = storage_.scratch[side_][0][row];
#pragma unroll
      for (int warp = 1; warp < 4; ++warp) {
        largest = fmaxf(largest, storage_.scratch[side_][warp][row]);
      }
      const bool started = storage_.started[row], moves = largest > (started ? kTop + kSlack : -INFINITY);
      const float shift = moves ? largest - kTop : 0;
      storage_.shifts[row] = shift;
      storage_.factors[side_][row] = started ? exp2_approx(-shift) : 1;
      storage_.references[row].maximum += shift;
      storage_.started[row] = started || moves;
      const bool all = __all_sync(kRowLanes, started || moves);
      if (lane_ == 0) {
        storage_.all_started = all;
      }
    }
    named_barrier_sync(kOutgrown + side_, kThreads);
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      const float shift = storage_.shifts[row_of(own)];
      scores[own / 2 * 4 + own % 2] -= shift;
      scores[own / 2 * 4 + own % 2 + 2] -= shift;
    }
    rescale_sums(side_);
  }

  __device__ __forceinline__ void rescale_sums(int scored_by) {
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      sum_[own] *= storage_.factors[scored_by][row_of(own)];
    }
  }

  // O^T += V^T P^T of the next tile.
  __device__ __forceinline__ void multiply(int tile) {
    const int side = tile % kSides;  // that scored it
    mbarrier_wait(shared_address(&storage_.probabilities_full[side]), phases_ >> side & 1);
    phases_ ^= 1u << side;
    if (storage_.moved[side]) {
      rescale(side);
      if (side != side_) {
        rescale_sums(side);
      }
    }
    with_format(storage_.valid[next_.group], [&](auto format) {
      if (layout_of(format).scale == ScaleType::kFloat32 &&
          *reinterpret_cast<const uint32_t*>(storage_.sums[side]) != 0) {
        multiply_tile<format, true>(side);
      } else {
        multiply_tile<format, false>(side);
      }
    });
  }

  // What a lane reads of a group of keys: of keys 2 t and 2 t + 1, and of those 8 further.
  struct RawValues {
    uint32_t values[2][2], scales[2][2];
  };

  template <KVFormat kFormat>
  __device__ __forceinline__ RawValues load_values(int group) const {
    const unsigned char* const rows = storage_.rows[group] + lane_ % 4 * 2 * C::kRowBytes;
    RawValues raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned char* const row = rows + (i / 2 * 8 + i % 2) * C::kRowBytes;
      raw.values[i / 2][i % 2] = ValueOperand<kFormat>::load(row, column_);
      raw.scales[i / 2][i % 2] = Scales<kFormat>::load(row, column_);
    }
    return raw;
  }

  // A group's bytes are converted while the products of the group before run.
  template <KVFormat kFormat, bool kSums>
  __device__ __forceinline__ void multiply_tile(int side) {
    uint32_t fragments[2][8];  // of two products each
    RingPlace<C> place = next_;
#pragma unroll 1
    for (int first_group = 0; first_group < C::kTileGroups; first_group += 2) {
      int groups[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        groups[i] = place.group;
        place.advance(1);
        const RawValues now = load_values<kFormat>(groups[i]);
        if (C::kRopeInValues && side_ == kSides - 1 && warp_ >= 2) {
          convert_rope(groups[i], fragments[i]);
        } else {
#pragma unroll
          for (int eight = 0; eight < 2; ++eight) {
            ValueOperand<kFormat>::template convert<kSums>(
                now.values[eight][0], now.values[eight][1],
                Scales<kFormat>::pair(now.scales[eight][0], now.scales[eight][1]), fragments[i] + 2 * eight);
          }
        }
        const Descriptor p(probabilities(groups[i], side, first_group + i), 16);
        wgmma_fence();
        wgmma_rs<Output>(output_[0], fragments[i], p.at(0), true);
        wgmma_rs<Output>(output_[1], fragments[i] + 4, p.at(0), true);
        wgmma_commit();
      }
      // No product is in flight at a loop's back edge: the compiler would serialise all products.
      wgmma_wait<0>();
      release(groups[0]);
      release(groups[1]);
    }
    next_ = place;
  }

  // The lane's four columns, which are RoPE columns.
  __device__ __forceinline__ void convert_rope(int group, uint32_t (&fragment)[8]) const {
    if constexpr (C::kRopeInValues) {
      using Layout = Scales<C::kFormat>;
      const int key = lane_ % 4 * 2, unit = (column_ - layout_of(C::kFormat).values) / 8;
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        uint2 words[2];
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int its = key + eight * 8 + i;
          words[i] = *reinterpret_cast<const uint2*>(storage_.rope[group] + its * kSliceRowBytes +
                                                     ((unit ^ its % 8) * 16) + column_ % 8 * 2);
          inverse[i] = Layout::inverse(storage_.rows[group] + its * C::kRowBytes);
        }
        ValueOperand<C::kFormat>::convert_rope(words[0], words[1], inverse[0], inverse[1], fragment + 2 * eight);
      }
    }
  }

  __device__ __forceinline__ void release(int group) {
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.empty[group]));
    }
  }

  // By what the tile's scoring did to the references.
  __device__ __forceinline__ void rescale(int scored_by) {
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      const float factor = storage_.factors[scored_by][row_of(own)];
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        output_[product][own / 2 * 4 + own % 2] *= factor;
        output_[product][own / 2 * 4 + own % 2 + 2] *= factor;
      }
    }
  }

  __device__ __forceinline__ void finish_piece(const PieceFacts& facts) {
#pragma unroll
    for (int own = 0; own < kOwnRows; ++own) {
      const float sum = sum_of_lanes(sum_[own]);
      if (lane_ < 4) {
        storage_.scratch[side_][warp_][row_of(own)] = sum;
      }
    }
    named_barrier_sync(kMathWarps, C::kMathThreads);
    // What follows from these is to be computed here: kept, it would be spilled.
    int thread = threadIdx.x, lane = lane_;
    asm volatile("" : "+r"(thread), "+r"(lane));
    if (thread < C::kRows) {
      finish_row<C>(params_, storage_, facts, thread);
    }
    named_barrier_sync(kMathWarps, C::kMathThreads);
    write_columns<C>(params_, storage_, facts, side_, warp_, lane, output_);
    // `facts` may be overwritten from here on.
  }

  const SparseAttentionParams& params_;
  Storage<C>& storage_;
  const int side_, warp_, lane_;
  const int column_;            // the first of the lane's four
  uint32_t phases_ = 0;         // of probabilities_full
  RingPlace<C> next_;           // the tile that is multiplied next
  float output_[2][kFragment];  // O^T: two columns in each product
  float sum_[kOwnRows];         // of the rows that are columns of this lane, over its keys
};

}  // namespace flash_mla::sm90::sparse_attention_few_heads
