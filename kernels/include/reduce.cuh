// Sums over a warp and over a block. The order of the additions is fixed, so a result never depends on timing.
#pragma once

#include "ptx.cuh"

// Every lane gets the sum of all lanes.
DEVICE float warp_sum(float value) {
    for (int distance = WARP_LANES / 2; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
    return value;
}

// Every thread of a block of Threads gets the sum of all threads. `partial` is the caller's and shared: two sums in
// one kernel take two arrays, because a fast warp may begin the second while a slow one still reads the first.
template <int Warps>
DEVICE float block_sum(float value, float (&partial)[Warps]) {
    value = warp_sum(value);
    if (threadIdx.x % WARP_LANES == 0) partial[threadIdx.x / WARP_LANES] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < Warps; ++warp) sum += partial[warp];
    return sum;
}
