// The switch saves what the platform's calling convention says a function must preserve, and nothing else: to the
// compiler it is an ordinary call. `swapcontext` would do, at the price of two system calls a switch for a signal mask
// that no kernel changes.
#include "fiber.h"

#include <cstring>

#if defined(__x86_64__)
// System V AMD64 ABI, section 3.2.1: rbx, rbp and r12 to r15 belong to the caller.
asm(R"(
    .text
    .globl ferrotron_simt_switch
    .hidden ferrotron_simt_switch
    .type ferrotron_simt_switch, @function
ferrotron_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size ferrotron_simt_switch, . - ferrotron_simt_switch
)");
// Six registers, the address to return to, and a null where a caller's address would stand. The last also puts the
// stack 8 bytes off a multiple of 16 at the entry, as after a call.
constexpr size_t FRAME_WORDS = 8;
constexpr size_t RETURN_WORD = 6;
#elif defined(__aarch64__)
// AAPCS64, section 6.1: x19 to x29 and the lower halves of v8 to v15 belong to the caller; x30 is where to return.
asm(R"(
    .text
    .globl ferrotron_simt_switch
    .hidden ferrotron_simt_switch
    .type ferrotron_simt_switch, %function
ferrotron_simt_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size ferrotron_simt_switch, . - ferrotron_simt_switch
)");
constexpr size_t FRAME_WORDS = 20;
constexpr size_t RETURN_WORD = 11;
#else
#error "the shim's switch is written for x86_64 and aarch64"
#endif

namespace simt {

StackPointer prepare_stack(unsigned char* low, size_t bytes, void (*entry)()) {
    const uintptr_t top = (reinterpret_cast<uintptr_t>(low) + bytes) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<uintptr_t*>(top) - FRAME_WORDS;
    std::memset(frame, 0, FRAME_WORDS * sizeof *frame);
    frame[RETURN_WORD] = reinterpret_cast<uintptr_t>(entry);
    return frame;
}

}  // namespace simt
