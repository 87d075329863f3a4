// In place of csrc/sm100/dense_prefill, CUTLASS's own kernels, which are not emulated: the table names them, and what is
// called says so.
#include "core/error.h"
#include "sm100/dense_prefill/launch.h"

namespace flash_mla::sm100::dense_prefill {
namespace {

void refuse() { check(false, ErrorKind::kUnsupported, "dense prefill of SM100 is not emulated"); }

}  // namespace

void launch_bf16_192(const DensePrefillParams&, void*) { refuse(); }
void launch_bf16_128(const DensePrefillParams&, void*) { refuse(); }
void launch_fp16_192(const DensePrefillParams&, void*) { refuse(); }
void launch_fp16_128(const DensePrefillParams&, void*) { refuse(); }

}  // namespace flash_mla::sm100::dense_prefill
