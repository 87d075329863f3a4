// What a producer warp knows of the keys: it walks the lists of the pieces a tile at a time, fetches the indices of its
// keys, and finds their rows. It also hands over the facts and Q of each piece.
#pragma once

#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/copy.cuh"
#include "device/slices.h"
#include "device/slots.cuh"
#include "device/sparse/pieces.cuh"

namespace flash_mla::inline device {

// What unreachable keys are read from: all zeros, scales too.
__device__ __align__(16) const unsigned char kZeroRow[1152] = {};

template <class C, class Storage>
class KeyLists {
 protected:
  // Keys of a tile per warp, each of which `kLanes` lanes know: where its row is.
  static constexpr int kWarpKeys = C::kKeys / C::kProducerWarps;
  static constexpr int kLanes = 32 / kWarpKeys;
  static constexpr int kItemTiles = ceil_div(C::kRows, kRowTile);
  // Of a pair of CTAs each has half of the columns of all rows of Q, or half of the rows.
  static constexpr bool kHalfColumns = requires { requires C::kRanks == 2; };

  __device__ __forceinline__ KeyLists(const SparseAttentionParams& params, Storage& storage, Walk& walk, int warp,
                                      int lane)
      : params_(params), storage_(storage), walk_(walk), warp_(warp), lane_(lane) {
    if (lane_ == 0) {
      begin_walk<kItemTiles>(walk_);
    }
    __syncwarp();
  }

  // Of a warp that others tell of the tiles: it leaves their walk alone.
  struct IsTold {};
  __device__ __forceinline__ KeyLists(const SparseAttentionParams& params, Storage& storage, Walk& walk, int warp,
                                      int lane, IsTold)
      : params_(params), storage_(storage), walk_(walk), warp_(warp), lane_(lane) {}

  // Steps to the next tile and fetches the lane's index; -1 where its list has ended.
  __device__ __forceinline__ void fetch_indices() {
    ahead_ = {0};
    index_ = -1;
    if (!find_run()) {
      return;
    }
    const Run run = walk_.run;
    ahead_.bits |= run.bits;
    const int position = run.position + key_of_lane();
    if (position < run.length) {
      index_ = load_index(run.list + (params_.from_table ? page_of(params_.keys[0], position) : position));
    }
    step_over(run);
  }

  // All tiles, for producers that keep nothing of one while they work on another: `copy(entry, row)`.
  template <class Copy>
  __device__ __forceinline__ void copy_tiles(Copy&& copy) {
    fetch_indices();
#pragma unroll 1
    while (ahead_.exists()) {
      const Entry entry = ahead_;
      const unsigned char* const row = locate(entry);
      fetch_indices();
      if (entry.begins_piece()) {
        begin_piece(entry.piece());
      }
      if (entry.has_tile()) {
        copy(entry, row);
      }
    }
    end();
  }

  // Where no schedule is read, the first piece is found before the kernels before this one have ended; and once more
  // behind them, where lengths say how long it is.
  __device__ __forceinline__ void find_piece_early() {
    __syncwarp();
    if (lane_ == 0) {
      walk_.guesses = true;
      next_piece<kItemTiles>(params_, walk_);
      walk_.guesses = false;
      if (params_.keys[0].lengths != nullptr || params_.keys[1].lengths != nullptr || walk_.run.num_tiles == 0) {
        begin_walk<kItemTiles>(walk_);
      }
    }
    __syncwarp();
  }

  // Kernels whose roles wait for the kernels before by themselves.
  __device__ __forceinline__ void wait_if_early() {
    if constexpr (requires { C::kStartsEarly; }) {
      if (params_.cut_evenly) {
        find_piece_early();
      }
      wait_for_dependencies();
    }
  }

  // Of the CTAs that share an item.
  __device__ __forceinline__ int rank() const {
    if constexpr (kItemTiles == 2) {
      return cluster_rank();
    } else {
      return 0;
    }
  }

  __device__ __forceinline__ int first_key() const { return warp_ * kWarpKeys; }
  __device__ __forceinline__ int key_of_lane() const { return first_key() + lane_ / kLanes; }

  static __device__ __forceinline__ int load_index(const int32_t* address) {
    int index;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(index) : "l"(address));
    return index;
  }

  static __device__ __forceinline__ int page_of(const KeySource& keys, int slot) {
    return keys.page_shift >= 0 ? slot >> keys.page_shift
                                : static_cast<int>(static_cast<unsigned>(slot) / static_cast<unsigned>(keys.page));
  }

  // The lane's row of the tile whose indices have been fetched.
  __device__ __forceinline__ const unsigned char* locate(const Entry& entry) {
    const KeySource& keys = params_.keys[entry.source()];
    int page;
    if (params_.from_table) {
      const int position = walk_.run.position - C::kKeys + key_of_lane();  // its fetching was the last step
      page = index_;
      next_row_in_page_ = position - page_of(keys, position) * keys.page;
      if (static_cast<uint32_t>(index_) >= keys.num_slots / static_cast<uint32_t>(keys.page)) {
        return kZeroRow;
      }
    } else {
      if (static_cast<uint32_t>(index_) >= keys.num_slots) {
        return kZeroRow;
      }
      page = page_of(keys, index_);
      next_row_in_page_ = index_ - page * keys.page;
    }
    const unsigned char* base = static_cast<const unsigned char*>(keys.cache) + page * keys.stride_page;
    return base +
           next_row_in_page_ * (C::kFormat == KVFormat::kModel1 ? layout_of(C::kFormat).row_stride() : keys.stride_row);
  }

  // The compiler is to compute what follows from the lane for each tile anew: kept, it would be spilled.
  __device__ __forceinline__ int opaque_lane() const {
    int lane = lane_;
    asm volatile("" : "+r"(lane));
    return lane;
  }

  // Bit k: the warp's key k counts.
  __device__ __forceinline__ uint32_t valid_keys(const unsigned char* row) const {
    const uint32_t lanes = __ballot_sync(~0u, row != kZeroRow);
    return __ballot_sync(~0u, lane_ < kWarpKeys && (lanes >> (kLanes * lane_ & 31) & 1));
  }

  // Hands the facts and Q of a piece over, once the math warps have done with those of the piece before.
  __device__ __forceinline__ void begin_piece(int piece) {
    begin_piece(piece, [this](const PieceFacts& facts) {
      if constexpr (kHalfColumns) {
        load_half_q(facts);
      } else {
        load_q(facts);
      }
    });
  }

  template <class LoadQ>
  __device__ __forceinline__ void begin_piece(int piece, LoadQ&& load) {
    begin_piece(piece, walk_.pending[piece], load);
  }

  template <class LoadQ>
  __device__ __forceinline__ void begin_piece(int piece, const PieceFacts& facts, LoadQ&& load) {
    mbarrier_wait(shared_address(&storage_.q_empty), (piece & 1) ^ 1);
    if (warp_ == 0 && lane_ == 0) {
      storage_.pieces[piece & 1] = facts;
    }
    if (facts.num_tiles > 0) {
      load(facts);
    }
    async_copy_arrive(shared_address(&storage_.q_full));
  }

  // Asks L2 for the Q of the piece whose first indices have been fetched, while the one before is still worked on.
  __device__ __forceinline__ void prefetch_next_q() const {
    if constexpr (requires { C::kPrefetchesQ; }) {
      if (!ahead_.begins_piece()) {
        return;
      }
      constexpr int kLine = 128, kSharers = 32 * C::kProducerWarps / C::kRows;  // of a row
      constexpr int kBytes = (C::kRanks == 2 ? kHeadDimV / 2 : C::kHeadDim) * 2;
      const int thread = warp_ * 32 + opaque_lane();
      const unsigned char* row = row_of_q(walk_.pending[ahead_.piece()], thread / kSharers);
      if (row == nullptr) {
        return;
      }
      row += C::kRanks == 2 ? rank() * kBytes : 0;
#pragma unroll 1
      for (int offset = thread % kSharers * kLine; offset < kBytes; offset += kSharers * kLine) {
        prefetch_l2(row + offset);
      }
      if (C::kRanks == 2 && C::kRopeBehindValues && thread % kSharers == 0) {
        prefetch_l2(row + (kHeadDimV * 2 - rank() * kBytes));
      }
    }
  }

  // While the math warps still read the Q of the piece before, a tile can be made: waiting for them first would leave
  // the warp idle until they have scored the last tile.
  __device__ __forceinline__ bool makes_tile_before_q(const Entry& entry) const {
    if constexpr (requires { C::kMakesTileBeforeQ; }) {
      return entry.begins_piece() &&
             !__all_sync(~0u, mbarrier_test(shared_address(&storage_.q_empty), (entry.piece() & 1) ^ 1));
    } else {
      return false;
    }
  }

  // A row of Q by its place in the item; null where the unit has no such row.
  __device__ __forceinline__ const unsigned char* row_of_q(const PieceFacts& facts, int item_row) const {
    const int row = facts.row_tile * C::kRows + item_row;
    if (row >= params_.unit_rows) {
      return nullptr;
    }
    const int unit_row = facts.unit * params_.unit_rows + row, of_unit = params_.by_h_q.divide(unit_row);
    const Token at(params_, facts.request, of_unit);
    return static_cast<const unsigned char*>(params_.q) +
           2 * (at.batch * params_.stride_q_b + at.token * params_.stride_q_s +
                (unit_row - of_unit * params_.h_q) * params_.stride_q_h);
  }

  // The first slices of Q, that lie in shared memory.
  static constexpr int shared_q_slices() {
    if constexpr (requires { C::kSharedQSlices; }) {
      return C::kSharedQSlices;
    } else {
      return C::kSlices;
    }
  }

  // A warp loads as many rows of Q as keys, if the tile has so many, eight at a time; zeros where there is no row.
  __device__ __forceinline__ void load_q(const PieceFacts& facts) const {
    const int lane = opaque_lane();
#pragma unroll 1
    for (int tile_row = warp_ * kWarpKeys + lane / 4; tile_row < min((warp_ + 1) * kWarpKeys, C::kRows);
         tile_row += 8) {
      const unsigned char* row = row_of_q(facts, rank() * kRowTile + tile_row);
      const bool valid = row != nullptr;
      const unsigned char* source = (valid ? row : static_cast<const unsigned char*>(params_.q)) + lane % 4 * 16;
      uint32_t destination = shared_address(storage_.q) + tile_row * kSliceRowBytes + ((lane % 4 ^ tile_row % 8) * 16);
#pragma unroll 1
      for (int slice = 0; slice < shared_q_slices(); ++slice) {
        async_copy16(destination, source, valid);
        async_copy16(destination ^ 64, source + 64, valid);
        destination += C::kQSliceBytes;
        source += kSliceRowBytes;
      }
    }
  }

  // Where a row's unit of the CTA's RoPE columns lies, which are a slice of 64-byte rows behind a tile's values.
  static __device__ __forceinline__ uint32_t half_rope_unit(uint32_t tile, int row, int unit) {
    return tile + C::kRopeOffset + row * C::kRopeRowBytes + ((unit ^ row / 2 % 4) * 16);
  }

  // The CTA's columns of the item's rows of Q, as many rows a warp as that makes, eight at a time.
  __device__ __forceinline__ void load_half_q(const PieceFacts& facts) const {
    constexpr int kWarpRows = C::kRows / C::kProducerWarps;
    const int lane = opaque_lane(), unit = lane % 4;
#pragma unroll 1
    for (int item_row = warp_ * kWarpRows + lane / 4; item_row < (warp_ + 1) * kWarpRows; item_row += 8) {
      const unsigned char* row = row_of_q(facts, item_row);
      const bool valid = row != nullptr;
      const unsigned char* source = (valid ? row : static_cast<const unsigned char*>(params_.q)) + unit * 16;
      const uint32_t tile = shared_address(storage_.q[item_row / kRowTile]);
      const int tile_row = item_row % kRowTile;
      if constexpr (C::kRopeBehindValues) {
        async_copy16(half_rope_unit(tile, tile_row, unit), source + kHeadDimV * 2 + rank() * C::kRopeRowBytes, valid);
      }
      source += rank() * C::kSlices * kSliceRowBytes;
      uint32_t destination = tile + tile_row * kSliceRowBytes + ((unit ^ tile_row % 8) * 16);
#pragma unroll 1
      for (int slice = 0; slice < C::kSlices; ++slice) {
        async_copy16(destination, source, valid);
        async_copy16(destination ^ 64, source + 64, valid);
        destination += C::kSliceBytes;
        source += kSliceRowBytes;
      }
    }
  }

  __device__ __forceinline__ void end() { end(walk_.num_pieces); }

  __device__ __forceinline__ void end(int piece) {
    mbarrier_wait(shared_address(&storage_.q_empty), (piece & 1) ^ 1);
    if (warp_ == 0 && lane_ == 0) {
      storage_.pieces[piece & 1].num_tiles = -1;
    }
    async_copy_arrive(shared_address(&storage_.q_full));
    async_copy_wait<0>();
  }

  // Goes on to the next run, where this one has ended. False where there is none, or a piece without tiles.
  __device__ __forceinline__ bool find_run() {
    if (walk_.run.num_tiles > 0) {
      return true;
    }
    __syncwarp();
    int found = 1;
    if (lane_ == 0) {
      if (walk_.second_tiles > 0) {
        begin_second_run(params_, walk_);
      } else {
        found = next_piece<kItemTiles>(params_, walk_);
      }
    }
    found = __shfl_sync(~0u, found, 0);
    __syncwarp();
    const Entry begun{found ? walk_.run.bits : 0};
    if (!begun.has_tile()) {
      ahead_.bits |= begun.bits;
    }
    return begun.has_tile();
  }

  __device__ __forceinline__ void step_over(const Run& run) {
    __syncwarp();
    if (lane_ == 0) {
      walk_.run.position = run.position + C::kKeys;
      walk_.run.num_tiles = run.num_tiles - 1;
      walk_.run.bits = (run.bits ^ Entry::kSlot) & ~Entry::kBeginsPiece;
    }
    __syncwarp();
  }

  const SparseAttentionParams& params_;
  Storage& storage_;
  Walk& walk_;
  const int warp_, lane_;
  SlotPhases phases_;
  Entry ahead_{0};  // of the indices that have been fetched
  int index_ = -1;
  int next_row_in_page_;
};

}  // namespace flash_mla::inline device
