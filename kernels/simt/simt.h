// The host shim, as a kernel sees it: the words of CUDA that our kernels use, with one fiber per CUDA thread.
//
// A barrier is a switch to another fiber, warps meet among themselves, `__shared__` is the block's. Threads are resumed
// in an order drawn from a seed, so an answer that changes with the seed is a missing barrier. Blocks run one after the
// other, also in a seeded order: a kernel whose blocks wait for each other cannot run here. Of speed, of memory ordering
// and of tensor-core rounding the shim says nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#define KERNEL static void
#define DEVICE inline
#define __launch_bounds__(threads)

// The array's address tells two arrays apart, so one static byte per place (and per template instance) names it.
#define SHARED(type, name, count)                                                                                      \
    static char name##_site;                                                                                           \
    type(&name)[count] =                                                                                               \
        *static_cast<type(*)[count]>(simt::shared_array(&name##_site, #name, sizeof(type) * (count), alignof(type)))

#define threadIdx (simt::here().thread)
#define blockIdx (simt::here().block)
#define blockDim (simt::here().block_size)
#define gridDim (simt::here().grid_size)

namespace simt {

struct Index {
    uint32_t x, y, z;
};

struct Here {
    Index thread, block, block_size, grid_size;
};

// What the lanes of a warp brought to a meeting. A lane that has returned, or never was, shows all ones: a NaN.
struct Posted {
    uint64_t by_lane[32];
};

// Where the running thread is.
const Here& here();

// The running thread's lane in its warp.
uint32_t lane();

// Meets the other lanes of the warp that have not returned, and shows what each brought. Good until the lane's next
// meeting. A warp whose lanes come here from different places is divergent, which is a fault.
const Posted& warp_exchange(uint64_t value, const char* what, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE());

// The block's array named by `site`: poisoned before the block's first thread runs, guarded on both sides.
void* shared_array(const void* site, const char* name, size_t bytes, size_t alignment);

// A fault unless `address` is a multiple of `alignment`.
void check_alignment(const void* address, size_t alignment, const char* what);

}  // namespace simt

// Meets the other threads of the block that have not returned. CUDA leaves it undefined when they come from different
// barriers of the source; here that is a fault.
void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE());
