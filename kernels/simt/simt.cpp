// One block at a time, one fiber per thread: who waits for whom, and who runs next.
#include "simt.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "launch.h"

namespace simt {
namespace {

constexpr uint32_t LANES = 32;
// CUDA's own limit on every device we know.
constexpr uint64_t MAX_THREADS = 1024;
// A kernel's frame is a few hundred bytes; formatting a report is what needs room. Untouched pages cost nothing.
constexpr size_t STACK_BYTES = 64 * 1024;
constexpr size_t GUARD_BYTES = 64;
// As a float, a bfloat16 or a double this is a NaN, so what nobody wrote spoils what is made of it.
constexpr unsigned char POISON = 0xff;
constexpr unsigned char GUARD = 0xa5;

// splitmix64 (Steele, Lea and Flood 2014): any seed will do, also 0.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}

    // Below `count`. The bias of the remainder does not matter to a schedule.
    size_t below(size_t count) {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return static_cast<size_t>((z ^ (z >> 31)) % count);
    }

private:
    uint64_t state_;
};

// Where in the source a thread waits.
struct Site {
    const char* what = nullptr;
    const char* file = "";
    int line = 0;

    bool operator==(const Site& other) const {
        return line == other.line && std::strcmp(what, other.what) == 0 && std::strcmp(file, other.file) == 0;
    }

    std::string text() const {
        const char* slash = std::strrchr(file, '/');
        return std::string(what) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
    }
};

struct Thread {
    StackPointer stack = nullptr;
    Here here{};
    uint32_t number = 0;
    bool returned = false;
    Site waits_at;
};

// The lanes of a warp that are at its meeting. Two turns of posts, because a lane may come to the next meeting while
// another still reads this one; it cannot come to the one after that before all have read.
struct Warp {
    uint32_t live = 0;
    uint32_t arrived = 0;
    uint32_t turn = 0;
    Site site;
    Posted posted[2];
};

struct SharedArray {
    const void* site;
    const char* name;
    size_t bytes;
    size_t padding;
    std::unique_ptr<unsigned char[]> memory;

    unsigned char* data() const { return memory.get() + padding; }
};

std::string text(const Index& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

Index unravel(uint64_t number, const uint32_t (&size)[3]) {
    return {static_cast<uint32_t>(number % size[0]), static_cast<uint32_t>(number / size[0] % size[1]),
            static_cast<uint32_t>(number / size[0] / size[1])};
}

class Block {
public:
    Block(const Kernel& kernel, const void* args, const Launch& launch, size_t thread_count)
        : kernel_(kernel), args_(args), launch_(launch), random_(launch.seed), threads_(thread_count),
          warps_((thread_count + LANES - 1) / LANES), stacks_(new unsigned char[thread_count * STACK_BYTES]) {}

    Status run(uint64_t block_number);
    const std::string& report() const { return report_; }
    Random& random() { return random_; }

    Thread& running() { return *running_; }
    void meet_block(const Site& site);
    const Posted& meet_warp(const Site& site, uint64_t value);
    void* shared_array(const void* site, const char* name, size_t bytes, size_t alignment);
    void fault(const char* format, ...) __attribute__((format(printf, 2, 3)));

private:
    static void enter();
    void start(uint64_t block_number);
    void finish();
    void wait(const Site& site);
    void wake_block();
    void wake_warp(uint32_t warp);
    void describe_deadlock();
    bool check_guards();

    const Kernel& kernel_;
    const void* args_;
    const Launch& launch_;
    Random random_;
    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::unique_ptr<unsigned char[]> stacks_;
    std::vector<SharedArray> shared_;
    std::vector<Thread*> ready_;
    Thread* running_ = nullptr;
    StackPointer scheduler_ = nullptr;
    size_t live_ = 0;
    size_t at_barrier_ = 0;
    Site barrier_;
    Index index_{};
    bool faulted_ = false;
    std::string report_;
};

// The fibers of a launch stay on the OS thread that launched, so that tests may run beside each other.
thread_local Block* block = nullptr;

void Block::enter() {
    block->kernel_.run(block->args_);
    block->finish();
}

void Block::start(uint64_t block_number) {
    index_ = unravel(block_number, launch_.grid);
    live_ = threads_.size();
    at_barrier_ = 0;
    for (Warp& warp : warps_) warp = Warp{};
    for (const SharedArray& array : shared_) std::memset(array.data(), POISON, array.bytes);
    ready_.clear();
    for (size_t i = 0; i < threads_.size(); ++i) {
        unsigned char* low = stacks_.get() + i * STACK_BYTES;
        std::memset(low, GUARD, GUARD_BYTES);
        Thread& thread = threads_[i];
        thread = Thread{};
        thread.stack = prepare_stack(low, STACK_BYTES, enter);
        thread.number = static_cast<uint32_t>(i);
        thread.here = {unravel(i, launch_.block), index_,
                       {launch_.block[0], launch_.block[1], launch_.block[2]},
                       {launch_.grid[0], launch_.grid[1], launch_.grid[2]}};
        warps_[i / LANES].live |= 1u << (i % LANES);
        ready_.push_back(&thread);
    }
}

Status Block::run(uint64_t block_number) {
    start(block_number);
    while (live_ > 0) {
        if (ready_.empty()) {
            describe_deadlock();
            return DEADLOCK;
        }
        std::swap(ready_[random_.below(ready_.size())], ready_.back());
        running_ = ready_.back();
        ready_.pop_back();
        ferrotron_simt_switch(&scheduler_, running_->stack);
        // A stack given up in the middle needs no unwinding: kernels own nothing.
        if (faulted_ || !check_guards()) return FAULT;
    }
    return DONE;
}

// A thread returned: those who waited for it need not wait any longer.
void Block::finish() {
    running_->returned = true;
    const uint32_t warp = running_->number / LANES;
    warps_[warp].live &= ~(1u << (running_->number % LANES));
    --live_;
    if (live_ > 0 && at_barrier_ == live_) wake_block();
    if (warps_[warp].live != 0 && warps_[warp].arrived == warps_[warp].live) wake_warp(warp);
    ferrotron_simt_switch(&running_->stack, scheduler_);
}

void Block::wait(const Site& site) {
    running_->waits_at = site;
    ferrotron_simt_switch(&running_->stack, scheduler_);
}

void Block::wake_block() {
    at_barrier_ = 0;
    for (Thread& thread : threads_) {
        if (!thread.returned) ready_.push_back(&thread);
    }
}

void Block::wake_warp(uint32_t warp) {
    const uint32_t arrived = std::exchange(warps_[warp].arrived, 0u);
    ++warps_[warp].turn;
    for (uint32_t lane = 0; lane < LANES; ++lane) {
        if (arrived >> lane & 1u) ready_.push_back(&threads_[warp * LANES + lane]);
    }
}

// The last to come wakes the others and then waits its turn like them, so that it has no privilege.
void Block::meet_block(const Site& site) {
    if (at_barrier_ == 0) barrier_ = site;
    if (!(barrier_ == site)) {
        fault("divergent barrier: at %s, while others wait at %s", site.text().c_str(), barrier_.text().c_str());
    }
    ++at_barrier_;
    if (at_barrier_ == live_) wake_block();
    wait(site);
}

const Posted& Block::meet_warp(const Site& site, uint64_t value) {
    const uint32_t number = running_->number / LANES;
    Warp& warp = warps_[number];
    Posted& posted = warp.posted[warp.turn % 2];
    if (warp.arrived == 0) {
        warp.site = site;
        std::memset(&posted, POISON, sizeof posted);
    }
    if (!(warp.site == site)) {
        fault("divergent warp: at %s, while other lanes wait at %s", site.text().c_str(), warp.site.text().c_str());
    }
    posted.by_lane[running_->number % LANES] = value;
    warp.arrived |= 1u << (running_->number % LANES);
    if (warp.arrived == warp.live) wake_warp(number);
    wait(site);
    return posted;
}

void* Block::shared_array(const void* site, const char* name, size_t bytes, size_t alignment) {
    for (const SharedArray& array : shared_) {
        if (array.site == site) return array.data();
    }
    // `new` aligns to 16; a guard of a multiple of that keeps what the array may ask for.
    if (alignment > 16) fault("shared array %s wants alignment %zu, the shim gives 16", name, alignment);
    SharedArray array{site, name, bytes, GUARD_BYTES, nullptr};
    array.memory.reset(new unsigned char[bytes + 2 * GUARD_BYTES]);
    std::memset(array.memory.get(), GUARD, bytes + 2 * GUARD_BYTES);
    std::memset(array.data(), POISON, bytes);
    shared_.push_back(std::move(array));
    return shared_.back().data();
}

// Ends the launch. The thread that did wrong is never continued.
void Block::fault(const char* format, ...) {
    char message[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(message, sizeof message, format, values);
    va_end(values);
    report_ = "block " + text(index_) + ", thread " + text(running_->here.thread) + ": " + message;
    faulted_ = true;
    ferrotron_simt_switch(&running_->stack, scheduler_);
}

void Block::describe_deadlock() {
    report_ = "block " + text(index_) + ", no thread can run:";
    std::vector<std::pair<const Thread*, size_t>> groups;
    for (const Thread& thread : threads_) {
        if (thread.returned) continue;
        bool found = false;
        for (auto& [first, count] : groups) {
            if (!(first->waits_at == thread.waits_at)) continue;
            ++count;
            found = true;
            break;
        }
        if (!found) groups.emplace_back(&thread, 1);
    }
    for (const auto& [first, count] : groups) {
        report_ += " thread " + text(first->here.thread);
        if (count > 1) report_ += " and " + std::to_string(count - 1) + " more";
        report_ += count > 1 ? " wait at " : " waits at ";
        report_ += first->waits_at.text() + ";";
    }
    const size_t gone = threads_.size() - live_;
    report_ += " " + std::to_string(gone) + " returned";
}

// Whoever ran last is to blame: guards are looked at after every turn.
bool Block::check_guards() {
    const auto whole = [](const unsigned char* guard) {
        for (size_t i = 0; i < GUARD_BYTES; ++i) {
            if (guard[i] != GUARD) return false;
        }
        return true;
    };
    const std::string who = "block " + text(index_) + ", thread " + text(running_->here.thread) + ": ";
    if (!whole(stacks_.get() + running_->number * STACK_BYTES)) {
        report_ = who + "used more than " + std::to_string(STACK_BYTES) + " bytes of stack";
        return false;
    }
    for (const SharedArray& array : shared_) {
        if (whole(array.data() - GUARD_BYTES) && whole(array.data() + array.bytes)) continue;
        report_ = who + "wrote outside the shared array " + array.name;
        return false;
    }
    return true;
}

}  // namespace

const Here& here() { return block->running().here; }

uint32_t lane() { return block->running().number % LANES; }

const Posted& warp_exchange(uint64_t value, const char* what, const char* file, int line) {
    return block->meet_warp({what, file, line}, value);
}

void* shared_array(const void* site, const char* name, size_t bytes, size_t alignment) {
    return block->shared_array(site, name, bytes, alignment);
}

void check_alignment(const void* address, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
        block->fault("%s of %p, which is not a multiple of %zu", what, address, alignment);
    }
}

Status run(const Kernel& kernel, const void* args, const Launch& launch, char* report, size_t report_bytes) {
    uint64_t thread_count = 1, block_count = 1;
    for (int axis = 0; axis < 3; ++axis) {
        // The first test keeps the product of three 32-bit sizes within 64 bits.
        if (launch.block[axis] == 0 || launch.block[axis] > MAX_THREADS || launch.grid[axis] == 0) return LAUNCH_SIZE;
        thread_count *= launch.block[axis];
        if (__builtin_mul_overflow(block_count, uint64_t{launch.grid[axis]}, &block_count)) return LAUNCH_SIZE;
    }
    if (thread_count > MAX_THREADS) return LAUNCH_SIZE;

    Block runner(kernel, args, launch, thread_count);
    block = &runner;
    // A random start and direction: every block once, without a list of them.
    const uint64_t first = runner.random().below(block_count);
    const bool backwards = runner.random().below(2) == 1;
    Status status = DONE;
    for (uint64_t i = 0; i < block_count && status == DONE; ++i) {
        const uint64_t number = (first + i) % block_count;
        status = runner.run(backwards ? block_count - 1 - number : number);
    }
    block = nullptr;
    std::snprintf(report, report_bytes, "%s", runner.report().c_str());
    return status;
}

}  // namespace simt

void __syncthreads(const char* file, int line) { simt::block->meet_block({"__syncthreads", file, line}); }
