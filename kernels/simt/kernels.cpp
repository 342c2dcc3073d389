// The list of kernels that run on the host, and the two functions Rust calls. A new kernel is one include, one line of
// offsets and one line of the table.
#include <cstdio>
#include <cstring>

#include "../rms_norm.cu"
#include "launch.h"
#include "tests/planted.cu"

namespace simt {
namespace {

template <typename Args, void (*kernel)(Args)>
void call(const void* args) {
    kernel(*static_cast<const Args*>(args));
}

constexpr size_t RMS_NORM_OFFSETS[] = {offsetof(RmsNormArgs, x), offsetof(RmsNormArgs, weight),
                                       offsetof(RmsNormArgs, y), offsetof(RmsNormArgs, width),
                                       offsetof(RmsNormArgs, eps)};
constexpr size_t PLANTED_OFFSETS[] = {offsetof(PlantedArgs, x), offsetof(PlantedArgs, y)};

}  // namespace

#define ENTRY(kernel, Args, offsets)                                                                                   \
    {#kernel, sizeof(Args), offsets, sizeof(offsets) / sizeof *(offsets), call<Args, kernel>}

const Kernel KERNELS[] = {
    ENTRY(rms_norm, RmsNormArgs, RMS_NORM_OFFSETS),
    ENTRY(planted_missing_barrier, PlantedArgs, PLANTED_OFFSETS),
    ENTRY(planted_unequal_meetings, PlantedArgs, PLANTED_OFFSETS),
    ENTRY(planted_two_barriers, PlantedArgs, PLANTED_OFFSETS),
    ENTRY(planted_shared_overrun, PlantedArgs, PLANTED_OFFSETS),
    ENTRY(planted_global_overrun, PlantedArgs, PLANTED_OFFSETS),
    ENTRY(planted_misaligned_load, PlantedArgs, PLANTED_OFFSETS),
    ENTRY(planted_early_return, PlantedArgs, PLANTED_OFFSETS),
    ENTRY(planted_rounding, PlantedArgs, PLANTED_OFFSETS),
};
const size_t KERNEL_COUNT = sizeof KERNELS / sizeof *KERNELS;

namespace {

const Kernel* find(const char* name) {
    for (const Kernel& kernel : KERNELS) {
        if (std::strcmp(kernel.name, name) == 0) return &kernel;
    }
    return nullptr;
}

}  // namespace
}  // namespace simt

// Runs the kernel called `name`. `args` must be its struct; `report` receives a text of at most `report_bytes`,
// its closing zero included.
extern "C" int ferrotron_simt_launch(const char* name, const void* args, size_t args_bytes, const simt::Launch* launch,
                                     char* report, size_t report_bytes) {
    std::snprintf(report, report_bytes, "%s", "");
    const simt::Kernel* kernel = simt::find(name);
    if (kernel == nullptr) return simt::UNKNOWN_KERNEL;
    if (kernel->args_bytes != args_bytes) return simt::ARGS_SIZE;
    return simt::run(*kernel, args, *launch, report, report_bytes);
}

// Writes the size of the kernel's struct, then the offsets of its fields, to `layout`, at most `capacity` numbers.
// Returns how many there are; 0 if there is no such kernel.
extern "C" size_t ferrotron_simt_layout(const char* name, size_t* layout, size_t capacity) {
    const simt::Kernel* kernel = simt::find(name);
    if (kernel == nullptr) return 0;
    for (size_t i = 0; i < capacity && i <= kernel->offset_count; ++i) {
        layout[i] = i == 0 ? kernel->args_bytes : kernel->offsets[i - 1];
    }
    return kernel->offset_count + 1;
}
