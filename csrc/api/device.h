// What the host needs to know of a device, asked once.
#pragma once

#include <string>

namespace flash_mla::api {

struct DeviceFacts {
  int compute_capability;  // 90 for 9.0
  int num_sms;
};

const DeviceFacts& device_facts(int device);

// For ops whose kernels are those of csrc/any: "", or why this build does not serve a compute capability.
std::string why_not_built_for(int compute_capability);

// The same as an error.
void check_built_for(const char* op, int device);

}  // namespace flash_mla::api
