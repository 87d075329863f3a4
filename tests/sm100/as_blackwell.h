// In front of code that asks the device what it is: whatever it is, it says compute capability 10.0. To our library it
// does so where as_blackwell.py has been imported.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>

inline cudaError_t properties_as_blackwell(cudaDeviceProp* properties, int device) {
  const cudaError_t status = cudaGetDeviceProperties(properties, device);
  properties->major = 10, properties->minor = 0;
  return status;
}

inline cudaError_t attribute_as_blackwell(int* value, cudaDeviceAttr which, int device) {
  const bool capability = which == cudaDevAttrComputeCapabilityMajor || which == cudaDevAttrComputeCapabilityMinor;
  if (capability && std::getenv("FLASH_MLA_AS_BLACKWELL") != nullptr) {
    *value = which == cudaDevAttrComputeCapabilityMajor ? 10 : 0;
    return cudaSuccess;
  }
  return cudaDeviceGetAttribute(value, which, device);
}

#define cudaDeviceGetAttribute attribute_as_blackwell
#define cudaGetDeviceProperties properties_as_blackwell
