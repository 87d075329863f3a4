// In front of a program that asks the device what it is: whatever it is, it says compute capability 10.0.
#pragma once

#include <cuda_runtime.h>

inline cudaError_t properties_as_blackwell(cudaDeviceProp* properties, int device) {
  const cudaError_t status = cudaGetDeviceProperties(properties, device);
  properties->major = 10, properties->minor = 0;
  return status;
}

inline cudaError_t attribute_as_blackwell(int* value, cudaDeviceAttr which, int device) {
  if (which == cudaDevAttrComputeCapabilityMajor || which == cudaDevAttrComputeCapabilityMinor) {
    *value = which == cudaDevAttrComputeCapabilityMajor ? 10 : 0;
    return cudaSuccess;
  }
  return cudaDeviceGetAttribute(value, which, device);
}

#define cudaDeviceGetAttribute attribute_as_blackwell
#define cudaGetDeviceProperties properties_as_blackwell
