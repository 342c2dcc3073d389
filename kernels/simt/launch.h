// The border between Rust and the shim; twin: src/backend/simt/mod.rs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// How many threads, and which of the many possible orders to run them in.
struct Launch {
    uint32_t grid[3];
    uint32_t block[3];
    uint64_t seed;
};

enum Status : int {
    DONE = 0,
    // Threads are left and none can run.
    DEADLOCK = 1,
    // A thread did what the device forbids.
    FAULT = 2,
    UNKNOWN_KERNEL = 3,
    ARGS_SIZE = 4,
    LAUNCH_SIZE = 5,
};

// A kernel takes one struct by value, so all kernels can be called through one type.
struct Kernel {
    const char* name;
    size_t args_bytes;
    // Offsets of the fields of the struct, in order.
    const size_t* offsets;
    size_t offset_count;
    void (*run)(const void* args);
};

// The kernels that were compiled for the host (kernels.cpp).
extern const Kernel KERNELS[];
extern const size_t KERNEL_COUNT;

// Runs every thread of `launch`. On anything but DONE, `report` says what happened, in which block and thread.
Status run(const Kernel& kernel, const void* args, const Launch& launch, char* report, size_t report_bytes);

}  // namespace simt
