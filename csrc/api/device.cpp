#include "api/device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <iterator>
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

bool is_built_for(int compute_capability) {
  constexpr int kBuilt[] = {
#ifdef FLASH_MLA_WITH_SM90
      90,
#endif
#ifdef FLASH_MLA_WITH_SM100
      100, 103,  // code for sm_100f runs on both
#endif
      0};
  return std::find(std::begin(kBuilt), std::end(kBuilt), compute_capability) != std::end(kBuilt);
}

struct NoCode {
  int compute_capability;
};

std::ostream& operator<<(std::ostream& out, const NoCode& text) {
  return out << "this build has no code for compute capability " << text.compute_capability / 10 << "."
             << text.compute_capability % 10;
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

OnDevice::OnDevice(int device) {
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess || current != device) {
    guard_.emplace(device);
  }
}

std::string why_not_built_for(int compute_capability) {
  return is_built_for(compute_capability) ? "" : cat(NoCode{compute_capability});
}

void check_built_for(const char* op, int device) {
  const int found = device_facts(device).compute_capability;
  check(is_built_for(found), ErrorKind::kUnsupported, op, ": ", NoCode{found});
}

}  // namespace flash_mla::api
