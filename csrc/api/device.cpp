#include "api/device.h"

#include <cuda_runtime.h>

#include <array>
#include <mutex>

#include "core/error.h"

namespace flash_mla::api {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, device);
  check(status == cudaSuccess, ErrorKind::kCuda, "cudaDeviceGetAttribute for cuda:", device, ": ",
        cudaGetErrorString(status));
  return value;
}

}  // namespace

const DeviceFacts& device_facts(int device) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceFacts, kMaxDevices> facts;
  static std::array<std::once_flag, kMaxDevices> once;
  check(device >= 0 && device < kMaxDevices, ErrorKind::kValue, "device index must be in 0 to ", kMaxDevices - 1,
        ", got ", device);
  std::call_once(once[device], [&] {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device),
              minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    facts[device] = {10 * major + minor, attribute(cudaDevAttrMultiProcessorCount, device)};
  });
  return facts[device];
}

void check_built_for(const char* op, int device) {
  const int found = device_facts(device).compute_capability;
#ifdef FLASH_MLA_WITH_SM90
  constexpr int kBuilt[] = {90};
#else
  constexpr int kBuilt[] = {0};
#endif
  bool built = false;
  for (const int compute_capability : kBuilt) {
    built |= compute_capability == found;
  }
  check(built, ErrorKind::kUnsupported, op, ": this build has no code for compute capability ", found / 10, ".",
        found % 10);
}

}  // namespace flash_mla::api
