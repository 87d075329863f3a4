// What the host needs to know of a device, asked once.
#pragma once

namespace flash_mla::api {

struct DeviceFacts {
  int compute_capability;  // 90 for 9.0
  int num_sms;
};

const DeviceFacts& device_facts(int device);

// For ops whose kernels are those of csrc/any: an error unless this build has code for the device.
void check_built_for(const char* op, int device);

}  // namespace flash_mla::api
