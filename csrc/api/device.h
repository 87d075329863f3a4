// What the host needs to know of a device, asked once; and which device is the current one.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>

namespace flash_mla::api {

struct DeviceFacts {
  int compute_capability;  // 90 for 9.0
  int num_sms;
};

const DeviceFacts& device_facts(int device);

// Makes a device the current one. Mostly it is already, and to ask costs a tenth of what a guard of torch's does.
class OnDevice {
 public:
  explicit OnDevice(int device);

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// For ops whose kernels are those of csrc/any: "", or why this build does not serve a compute capability.
std::string why_not_built_for(int compute_capability);

// The same as an error.
void check_built_for(const char* op, int device);

}  // namespace flash_mla::api
