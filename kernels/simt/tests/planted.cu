// Kernels with one planted fault each, and two that probe the shim itself (tests/kernels.rs). Never compiled by nvcc.
#include "../../include/reduce.cuh"

constexpr int PLANTED_THREADS = 64;
constexpr int PLANTED_WARPS = PLANTED_THREADS / WARP_LANES;

struct PlantedArgs {
    const float* x;
    bf16* y;
};

// Every thread should see every warp's sum; without the barrier a fast warp reads what a slow one has not written.
KERNEL planted_missing_barrier(const PlantedArgs args) {
    SHARED(float, partial, PLANTED_WARPS);
    const float sum = warp_sum(args.x[threadIdx.x]);
    if (threadIdx.x % WARP_LANES == 0) partial[threadIdx.x / WARP_LANES] = sum;
    args.y[threadIdx.x] = to_bf16(partial[0] + partial[1]);
}

// Half a warp waits for the block, the other half for the warp.
KERNEL planted_unequal_meetings(const PlantedArgs args) {
    if (threadIdx.x % 2 == 0) {
        __syncthreads();
    } else {
        args.y[threadIdx.x] = to_bf16(warp_sum(args.x[threadIdx.x]));
    }
}

// As many barriers on either branch, yet not the same ones.
KERNEL planted_two_barriers(const PlantedArgs args) {
    if (threadIdx.x < 5) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    args.y[threadIdx.x] = to_bf16(args.x[threadIdx.x]);
}

KERNEL planted_shared_overrun(const PlantedArgs args) {
    SHARED(float, stage, PLANTED_THREADS - 1);
    stage[threadIdx.x] = args.x[threadIdx.x];
    __syncthreads();
    args.y[threadIdx.x] = to_bf16(stage[0]);
}

KERNEL planted_global_overrun(const PlantedArgs args) { args.y[threadIdx.x + 1] = to_bf16(args.x[threadIdx.x]); }

KERNEL planted_misaligned_load(const PlantedArgs args) {
    args.y[threadIdx.x] = load_pack<Bf16Pack<8>>(args.y + 1).at[0];
}

// Not a fault: who has returned is not waited for, in the warp or in the block. Some leave before the warp meets, some
// before the block does.
KERNEL planted_early_return(const PlantedArgs args) {
    SHARED(float, first, 1);
    if (threadIdx.x >= PLANTED_THREADS - 8) return;
    const float neighbour = shuffle_xor(args.x[threadIdx.x], 2);
    if (threadIdx.x >= PLANTED_THREADS - 24) return;
    if (threadIdx.x == 0) first[0] = neighbour;
    __syncthreads();
    args.y[threadIdx.x] = to_bf16(first[0]);
}

// Not a fault: the host meaning of the conversion, to compare with another implementation of it.
KERNEL planted_rounding(const PlantedArgs args) { args.y[threadIdx.x] = to_bf16(args.x[threadIdx.x]); }
