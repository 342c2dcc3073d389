// A second stack to run on, and the switch between stacks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// A stack that is not running: all else it needs lies on it.
using StackPointer = void*;

// Leaves the running stack in `*from` and continues `to`, until someone switches back.
extern "C" void ferrotron_simt_switch(StackPointer* from, StackPointer to);

// A stack that, when first switched to, calls `entry`. `entry` must never return.
StackPointer prepare_stack(unsigned char* low, size_t bytes, void (*entry)());

}  // namespace simt
