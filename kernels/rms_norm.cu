// rms_norm: each row divided by its root mean square, times a weight.     twin: src/ops/rms_norm.rs
// maths   y = w x / sqrt(mean(x²) + eps), statistics and product in f32, rounded once at the end
// layout  x, y [rows, width], w [width] bf16, all 16-byte aligned; |x| < 1e19 / sqrt(width), so that f32 holds the sum
// moves   2 · rows · width · 2 bytes; w is read by every row and stays in L2
// launch  grid rows, block 256; any width, in loads of 16 bytes where it is a multiple of 8
// source  Zhang and Sennrich 2019, arXiv 1910.07467; one block per row, so that the second read of the row hits L1

#include "include/reduce.cuh"

constexpr int RMS_NORM_THREADS = 256;

struct RmsNormArgs {
    const bf16* x;
    const bf16* weight;
    bf16* y;
    uint32_t width;
    float eps;
};

template <typename Pack>
DEVICE float rms_norm_squares(const bf16* x, uint32_t width) {
    float squares = 0.0f;
    for (uint32_t i = threadIdx.x * Pack::count; i < width; i += RMS_NORM_THREADS * Pack::count) {
        const Pack pack = load_pack<Pack>(x + i);
        for (int k = 0; k < Pack::count; ++k) squares += to_f32(pack.at[k]) * to_f32(pack.at[k]);
    }
    return squares;
}

template <typename Pack>
DEVICE void rms_norm_scale(const bf16* x, const bf16* weight, bf16* y, uint32_t width, float scale) {
    for (uint32_t i = threadIdx.x * Pack::count; i < width; i += RMS_NORM_THREADS * Pack::count) {
        const Pack in = load_pack<Pack>(x + i), gain = load_pack<Pack>(weight + i);
        Pack out;
        for (int k = 0; k < Pack::count; ++k) out.at[k] = to_bf16(to_f32(gain.at[k]) * (to_f32(in.at[k]) * scale));
        store_pack(y + i, out);
    }
}

template <typename Pack>
DEVICE void rms_norm_row(const RmsNormArgs& args, float (&partial)[RMS_NORM_THREADS / WARP_LANES]) {
    // 64 bits: rows · width of a long prefill of a wide model passes 2³².
    const size_t row = static_cast<size_t>(blockIdx.x) * args.width;
    const float squares = block_sum(rms_norm_squares<Pack>(args.x + row, args.width), partial);
    const float scale = reciprocal_sqrt(squares / static_cast<float>(args.width) + args.eps);
    rms_norm_scale<Pack>(args.x + row, args.weight, args.y + row, args.width, scale);
}

KERNEL __launch_bounds__(RMS_NORM_THREADS) rms_norm(const RmsNormArgs args) {
    SHARED(float, partial, RMS_NORM_THREADS / WARP_LANES);
    // A row begins on a 16-byte line only if all rows do.
    if (args.width % 8 == 0) {
        rms_norm_row<Bf16Pack<8>>(args, partial);
    } else {
        rms_norm_row<Bf16Pack<1>>(args, partial);
    }
}
