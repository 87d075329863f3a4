// A host program: our descriptors, and the arithmetic by which the emulation finds data, against CuTe's. Prints what
// differs; no GPU.
#include <cstdio>
#include <cute/arch/mma_sm100_desc.hpp>
#include <cute/atom/copy_traits_sm100.hpp>
#include <cute/atom/mma_traits_sm100.hpp>
#include <cute/tensor.hpp>

#include "device/sm100/umma.h"
#include "emulation/layouts.h"

namespace flash_mla {
namespace {

using cute::_1, cute::_2, cute::Int;
int failures = 0;

template <class... Values>
void expect(bool ok, const char* text, Values... values) {
  if (!ok && ++failures < 20) {
    std::printf(text, values...);
    std::printf("\n");
  }
}

// One product's operand of kOuter x 16 values out of a tile of kOuter x kInner, all of its steps: where CuTe has each
// value, and where the emulation finds it by CuTe's descriptor.
template <class Atom, cute::UMMA::Major kMajor, int kOuter, int kInner>
void check_matrix(const char* name) {
  using T = cute::bfloat16_t;
  const auto layout = cute::tile_to_shape(Atom(), cute::Shape<Int<kOuter>, Int<kInner>>());
  // The host has no shared memory: an address is an offset from a base that is aligned as tiles are.
  T* const base = reinterpret_cast<T*>(uintptr_t{1} << 32);
  const auto tile = cute::make_tensor(cute::make_smem_ptr(base), layout);
  const auto steps = cute::local_tile(tile, cute::Shape<Int<kOuter>, Int<16>>(), cute::make_coord(0, cute::_));
  const auto plain = cute::get_nonswizzle_portion(layout);
  const auto swizzled = cute::as_position_independent_swizzle_layout(layout);
  auto descriptor = cute::UMMA::make_umma_desc<kMajor>(steps(cute::_, cute::_, 0));
  for (int step = 0; step < kInner / 16; ++step) {
    const uint32_t start = static_cast<uint32_t>(plain(0, step * 16)) * sizeof(T);
    descriptor.start_address_ = static_cast<uint16_t>(start >> 4);
    const auto matrix = emulation::decode_matrix(descriptor.desc_);
    expect(matrix.known && matrix.version == 1, "%s: not a known descriptor", name);
    for (int outer = 0; outer < kOuter; ++outer) {
      for (int inner = 0; inner < 16; ++inner) {
        const auto wanted = static_cast<uint32_t>(swizzled(outer, step * 16 + inner)) * sizeof(T);
        const uint32_t found = emulation::address_of(matrix, kMajor == cute::UMMA::Major::MN, outer, inner);
        expect(wanted == found, "%s: value (%d, %d) of step %d is at %u, found at %u", name, outer, inner, step,
               static_cast<unsigned>(wanted), found);
      }
    }
  }
}

// The descriptors that our kernels build, bit by bit: atoms of 8 rows follow each other in a slice.
template <cute::UMMA::Major kMajor, class Atom, class Order, int kOuter, int kInner>
void check_descriptor(const char* name, uint32_t leading) {
  using T = cute::bfloat16_t;
  T* const base = reinterpret_cast<T*>(uintptr_t{1} << 32);
  const auto tile = cute::make_tensor(cute::make_smem_ptr(base),
                                      cute::tile_to_shape(Atom(), cute::Shape<Int<kOuter>, Int<kInner>>(), Order()));
  auto wanted = cute::UMMA::make_umma_desc<kMajor>(
      cute::local_tile(tile, cute::Shape<Int<kOuter>, Int<16>>(), cute::make_coord(0, 0)));
  wanted.start_address_ = 0x12340 >> 4;
  const uint64_t ours = UmmaDescriptor(0x12000, leading).at(0x340);
  expect(wanted.desc_ == ours, "%s: the descriptor is %llx, ours %llx", name,
         static_cast<unsigned long long>(wanted.desc_), static_cast<unsigned long long>(ours));
}

template <class Theirs, class Ours, int kM, int kN, cute::UMMA::Major kA, cute::UMMA::Major kB>
void check_instruction() {
  const auto wanted = cute::UMMA::make_instr_desc<Theirs, Theirs, float, kM, kN, kA, kB>();
  const uint32_t ours = umma_instruction<Ours>(kM, kN, static_cast<Major>(kA), static_cast<Major>(kB));
  expect(wanted.desc_ == ours, "instruction of M %d, N %d: %x, ours %x", kM, kN, wanted.desc_, ours);
  const auto decoded = emulation::decode_instruction(ours);
  expect(decoded.known && decoded.m == kM && decoded.n == kN && decoded.outer_a == static_cast<bool>(kA) &&
             decoded.outer_b == static_cast<bool>(kB) && decoded.result_format == 1,
         "instruction of M %d, N %d is not decoded", kM, kN);
}

// Results in tensor memory: CuTe's fragment of one CTA, by the rows and columns that are this CTA's.
template <int kCtas, int kM, int kN>
void check_result() {
  using Fragment = cute::UMMA::tmem_frg<float, float, kCtas>;
  const auto fragment = Fragment::make(cute::Shape<cute::Shape<Int<kM / kCtas>, Int<kN>>, _1, _1>());
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      const auto place = emulation::place_of_result(kCtas, kM, kN, m, n);
      const auto wanted = static_cast<uint32_t>(fragment.layout()(cute::make_coord(m % (kM / kCtas), n), 0, 0));
      const uint32_t found = tmem_lane(place.lane) + place.column;
      expect(place.cta == m / (kM / kCtas) && wanted == found,
             "result (%d, %d) of %d x %d by %d CTAs is at %x, found at %x", m, n, kM, kN, kCtas, wanted, found);
    }
  }
}

// A of two CTAs' product in tensor memory: CuTe's fragment has 128 rows, those of the CTA twice.
template <int kN>
void check_twice() {
  using Traits = cute::MMA_Traits<cute::SM100_MMA_F16BF16_2x1SM_TS<cute::bfloat16_t, cute::bfloat16_t, float, 128, kN,
                                                                   cute::UMMA::Major::K, cute::UMMA::Major::K>>;
  const auto layout = Traits::FrgTypeA::make(cute::Shape<cute::Shape<Int<64>, Int<16>>, _1, _1>()).layout();
  for (int m = 0; m < 128; ++m) {
    for (int n = 0; n < kN; n += 32) {
      for (int k = 0; k < 16; ++k) {
        const auto place = emulation::place_of_a(2, 128, kN, m, n, k);
        const int copy = n / (kN / 2);
        // In 16-bit values: two to a column.
        const auto wanted = static_cast<uint32_t>(layout(cute::make_coord(m % 64 + 64 * copy, k), 0, 0));
        const uint32_t found = 2 * (tmem_lane(place.lane) + place.column) + k % 2;
        expect(place.cta == m / 64 && wanted == found, "A (%d, %d) for column %d is at %x, found at %x", m, k, n,
               wanted, found);
      }
    }
  }
}

// A second result of 64 rows lies in the upper halves of the lanes of the first one.
void check_upper_lanes() {
  using Fragment = cute::UMMA::tmem_frg<float, float, 1>;
  const auto fragment = Fragment::make(cute::Shape<cute::Shape<Int<64>, Int<64>>, _2, _1>());
  const auto wanted = static_cast<uint32_t>(fragment.layout()(cute::make_coord(0, 0), 1, 0));
  expect(wanted == tmem_lane(16), "a second result of 64 rows is at %x", wanted);
}

// Registers of loads: CuTe's map from (thread, bit of its registers) to bits of the source, lane by lane.
template <class Load, emulation::Shape kShape>
void check_load(const char* name) {
  using Traits = cute::Copy_Traits<Load>;
  constexpr int kRegisters = sizeof(typename Load::DRegisters) / sizeof(uint32_t);
  constexpr int kColumns = emulation::columns_of(kShape, kRegisters);
  const auto layout = typename Traits::DstLayout();
  for (int t = 0; t < 32; ++t) {
    for (int r = 0; r < kRegisters; ++r) {
      const auto place = emulation::place_of_register(kShape, kRegisters, t, r);
      // Bits of the source: columns first, then lanes.
      const auto wanted = static_cast<int>(layout(t, 32 * r)) / 32;
      const int found = place.lane * kColumns + place.column;
      expect(wanted == found, "%s: register %d of thread %d is value %d, found %d", name, r, t, wanted, found);
    }
  }
}

void check_all() {
  using cute::UMMA::Major;
  using T = cute::bfloat16_t;
  namespace umma = cute::UMMA;
  check_matrix<umma::Layout_K_SW128_Atom<T>, Major::K, 128, 128>("K SW128");
  check_matrix<umma::Layout_K_SW64_Atom<T>, Major::K, 64, 64>("K SW64");
  check_matrix<umma::Layout_K_SW32_Atom<T>, Major::K, 64, 64>("K SW32");
  check_matrix<umma::Layout_K_INTER_Atom<T>, Major::K, 64, 64>("K INTER");
  check_matrix<umma::Layout_MN_SW128_Atom<T>, Major::MN, 256, 64>("MN SW128");
  check_matrix<umma::Layout_MN_SW64_Atom<T>, Major::MN, 128, 64>("MN SW64");
  check_matrix<umma::Layout_MN_SW32_Atom<T>, Major::MN, 128, 64>("MN SW32");
  check_matrix<umma::Layout_MN_INTER_Atom<T>, Major::MN, 128, 64>("MN INTER");

  check_descriptor<Major::K, umma::Layout_K_SW128_Atom<T>, cute::Step<_1, _2>, 64, 576>("scores", 16);
  check_descriptor<Major::MN, umma::Layout_MN_SW128_Atom<T>, cute::Step<_2, _1>, 256, 64>("values", 64 * 128);
  check_descriptor<Major::K, umma::Layout_K_SW128_Atom<T>, cute::Step<_1, _2>, 16, 576>("16 query rows", 16);
  check_descriptor<Major::MN, umma::Layout_MN_SW128_Atom<T>, cute::Step<_2, _1>, 64, 64>("64 columns of values", 0);
  // What a CTA of a pair has: 32 keys, and 128 columns of 64 keys.
  check_descriptor<Major::K, umma::Layout_K_SW128_Atom<T>, cute::Step<_1, _2>, 32, 576>("32 keys", 16);
  check_descriptor<Major::MN, umma::Layout_MN_SW128_Atom<T>, cute::Step<_2, _1>, 128, 64>("128 columns", 64 * 128);

  check_instruction<cute::bfloat16_t, __nv_bfloat16, 64, 64, Major::K, Major::K>();
  check_instruction<cute::bfloat16_t, __nv_bfloat16, 64, 256, Major::K, Major::MN>();
  check_instruction<cute::bfloat16_t, __nv_bfloat16, 64, 16, Major::MN, Major::K>();
  check_instruction<cute::bfloat16_t, __nv_bfloat16, 128, 64, Major::K, Major::K>();
  check_instruction<cute::bfloat16_t, __nv_bfloat16, 128, 256, Major::K, Major::MN>();
  check_instruction<cute::half_t, __half, 64, 32, Major::MN, Major::K>();
  check_instruction<cute::half_t, __half, 128, 256, Major::MN, Major::K>();

  check_upper_lanes();
  check_result<1, 64, 16>();
  check_result<1, 64, 32>();
  check_result<1, 64, 64>();
  check_result<1, 64, 256>();
  check_result<1, 128, 256>();
  check_result<2, 128, 256>();
  check_result<2, 128, 64>();
  check_result<2, 256, 256>();
  check_twice<64>();
  check_twice<256>();

  namespace load = cute::SM100::TMEM::LOAD;
  using emulation::Shape;
  check_load<load::SM100_TMEM_LOAD_32dp32b1x, Shape::k32x32>("32x32b.x1");
  check_load<load::SM100_TMEM_LOAD_32dp32b32x, Shape::k32x32>("32x32b.x32");
  check_load<load::SM100_TMEM_LOAD_32dp32b128x, Shape::k32x32>("32x32b.x128");
  check_load<load::SM100_TMEM_LOAD_16dp32b16x, Shape::k16x32x2>("16x32bx2.x16");
  check_load<load::SM100_TMEM_LOAD_16dp32b32x, Shape::k16x32x2>("16x32bx2.x32");
  check_load<load::SM100_TMEM_LOAD_16dp64b8x, Shape::k16x64>("16x64b.x8");
  check_load<load::SM100_TMEM_LOAD_16dp128b8x, Shape::k16x128>("16x128b.x8");
  check_load<load::SM100_TMEM_LOAD_16dp256b1x, Shape::k16x256>("16x256b.x1");
  check_load<load::SM100_TMEM_LOAD_16dp256b2x, Shape::k16x256>("16x256b.x2");
  check_load<load::SM100_TMEM_LOAD_16dp256b4x, Shape::k16x256>("16x256b.x4");
  check_load<load::SM100_TMEM_LOAD_16dp256b8x, Shape::k16x256>("16x256b.x8");
  check_load<load::SM100_TMEM_LOAD_16dp256b32x, Shape::k16x256>("16x256b.x32");
}

}  // namespace
}  // namespace flash_mla

int main() {
  flash_mla::check_all();
  std::printf("%d failures\n", flash_mla::failures);
  return flash_mla::failures != 0;
}
