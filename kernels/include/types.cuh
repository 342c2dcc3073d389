// The types kernels share, and the few words that differ between nvcc and the host shim.
#pragma once

#ifdef __CUDACC__
#include <cstdint>

#define KERNEL extern "C" __global__ void
#define DEVICE __device__ __forceinline__
// A macro rather than a bare `__shared__`, because the shim gives the array guard zones and a poisoned start.
#define SHARED(type, name, count) __shared__ type name[count]
#else
#include "../simt/simt.h"
#endif

constexpr int WARP_LANES = 32;

// A bfloat16 as memory holds it. Arithmetic is done in float; see ptx.cuh for the conversions.
struct bf16 {
    uint16_t bits;
};

// Neighbouring values that travel in one load or store.
template <int Count>
struct alignas(Count * sizeof(bf16)) Bf16Pack {
    static constexpr int count = Count;
    bf16 at[Count];
};
