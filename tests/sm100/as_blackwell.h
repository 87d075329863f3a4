// In front of a Blackwell program that asks the device what it is: whatever it is, it says compute capability 10.0.
#pragma once

#include <cuda_runtime.h>

inline cudaError_t properties_as_blackwell(cudaDeviceProp* properties, int device) {
  const cudaError_t status = cudaGetDeviceProperties(properties, device);
  properties->major = 10, properties->minor = 0;
  return status;
}

#define cudaGetDeviceProperties properties_as_blackwell
