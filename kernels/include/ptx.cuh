// Every instruction we ask for by name, each with its host meaning next to it. Nothing else may contain `asm`.
#pragma once

#include "types.cuh"

#ifndef __CUDACC__
#include <cmath>
#include <cstring>
#endif

// Exact: a bfloat16 is the upper half of a float.
DEVICE float to_f32(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
#endif
}

// Rounds to the nearest, ties to even. Every NaN becomes 0x7fff, as PTX says of `cvt.rn.bf16.f32`.
DEVICE bf16 to_bf16(float value) {
    bf16 result;
#ifdef __CUDACC__
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t half_and_tie = 0x7fffu + ((bits >> 16) & 1u);
    result.bits = std::isnan(value) ? uint16_t{0x7fff} : static_cast<uint16_t>((bits + half_and_tie) >> 16);
#endif
    return result;
}

// 1 / sqrt(value). The device's instruction is within 2 units in the last place.
DEVICE float reciprocal_sqrt(float value) {
#ifdef __CUDACC__
    return rsqrtf(value);
#else
    return 1.0f / std::sqrt(value);
#endif
}

// The value of the lane whose number differs in the bits of `lane_mask`. The whole warp takes part.
DEVICE float shuffle_xor(float value, int lane_mask) {
#ifdef __CUDACC__
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const simt::Posted& posted = simt::warp_exchange(bits, "shuffle_xor");
    bits = static_cast<uint32_t>(posted.by_lane[simt::lane() ^ lane_mask]);
    std::memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

// One load of a whole pack. `values` must be aligned to the pack; the shim checks it, the device would fault.
template <typename Pack>
DEVICE Pack load_pack(const bf16* values) {
#ifndef __CUDACC__
    simt::check_alignment(values, alignof(Pack), "load_pack");
#endif
    return *reinterpret_cast<const Pack*>(values);
}

// One store of a whole pack, aligned likewise.
template <typename Pack>
DEVICE void store_pack(bf16* values, const Pack& pack) {
#ifndef __CUDACC__
    simt::check_alignment(values, alignof(Pack), "store_pack");
#endif
    *reinterpret_cast<Pack*>(values) = pack;
}
