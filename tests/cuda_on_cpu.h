// Lets g++ compile kernels/topk_tail.cu and run its kernels on a CPU, for tests of correctness.
//
// A CUDA thread is a fiber; one block runs at a time, its fibers one after the other, each until it reaches a barrier
// or a shuffle.
// Checked while they run, and reported as the launch's status with the place and the thread:
//   * reads and writes outside a tensor (Global) or a shared array (Shared), and misaligned 16-byte accesses
//   * a shared element read before the block wrote it
//   * a race: two threads on one shared element, at least one of them writing, with no barrier between them (atomics
//     excepted)
//   * a barrier or shuffle that not every thread reaches
// Not seen: races on global memory, warp-level memory order, anything about speed.
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
using std::isnan;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct __nv_bfloat16 { uint16_t bits; };

// -------------------------------------------------------------------------------------------------------------- fibers
// switch_fiber saves the registers that a call preserves on the running stack, stores the stack pointer, and continues
// on the other.
#if defined(__x86_64__)
extern "C" void switch_fiber(void** save, void* next);
__asm__(
    ".text\n.weak switch_fiber\nswitch_fiber:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
inline void* prepare_stack(char* top, void (*entry)()) {
    void** stack = (void**)((uintptr_t)top & ~(uintptr_t)63);
    *--stack = nullptr;  // entry's return address: it never returns
    *--stack = (void*)entry;
    for (int i = 0; i < 6; i++) *--stack = nullptr;
    return stack;
}
#elif defined(__aarch64__)
extern "C" void switch_fiber(void** save, void* next);
__asm__(
    ".text\n.weak switch_fiber\nswitch_fiber:\n"
    " sub sp, sp, #160\n"
    " stp x19, x20, [sp, #0]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n stp x25, x26, [sp, #48]\n"
    " stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n"
    " stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
    " mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
    " ldp x19, x20, [sp, #0]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n"
    " ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n"
    " ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
    " add sp, sp, #160\n ret\n");
inline void* prepare_stack(char* top, void (*entry)()) {
    char* stack = (char*)((uintptr_t)top & ~(uintptr_t)63) - 160;
    memset(stack, 0, 160);
    memcpy(stack + 88, &entry, sizeof entry);  // x30, the return address
    return stack;
}
#else
#error "write switch_fiber and prepare_stack for this processor"
#endif

namespace cpu {

constexpr size_t STACK = 64 << 10;
struct Barrier { unsigned waiting = 0, generation = 0; };
struct Fiber {
    void* stack;
    dim3 index;
    unsigned number;
    bool done;
    unsigned parity;  // which of the two shuffle buffers comes next
};
struct Block {
    std::vector<Fiber> fibers;
    std::vector<char> stacks;
    void* outside;  // the stack of launch()
    unsigned current, alive, idle;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<uint64_t> slots[2];
    dim3 number, threads, grid;
    std::function<void()> body;
};
inline Block* block;
inline uint64_t epoch = 1;        // counts block barriers, over all blocks
inline uint64_t block_epoch = 1;  // where the running block began
inline char message[400];         // empty: no launch failed since it was last asked

[[noreturn]] inline void fail(const char* format, ...) {
    char text[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const unsigned thread = block ? block->fibers[block->current].number : 0;
    snprintf(message, sizeof message, "%s (block %u, thread %u)", text, block ? block->number.x : 0, thread);
    void* forgotten;
    switch_fiber(&forgotten, block->outside);
    __builtin_unreachable();
}
__attribute__((noinline)) inline void next_fiber() {
    Block& b = *block;
    const unsigned me = b.current, n = b.fibers.size();
    unsigned next = me;
    do next = next + 1 == n ? 0 : next + 1;
    while (b.fibers[next].done && next != me);
    if (next == me) return;
    b.current = next;
    switch_fiber(&b.fibers[me].stack, b.fibers[next].stack);
}
inline void wait(Barrier& barrier, unsigned needed) {
    const unsigned generation = barrier.generation;
    if (++barrier.waiting >= needed) {
        barrier.waiting = 0;
        barrier.generation++;
        block->idle = 0;
        if (&barrier == &block->all) epoch++;
        return;
    }
    while (barrier.generation == generation) {
        if (++block->idle > 8 * block->fibers.size() + 64)
            fail("deadlock: a barrier or shuffle that not every thread reaches");
        next_fiber();
    }
}
inline void fiber_main() {
    block->body();
    Block& b = *block;
    b.fibers[b.current].done = true;
    b.alive--;
    b.idle = 0;
    if (b.all.waiting) fail("a thread returns while others wait at a barrier");
    void* forgotten;
    if (!b.alive) switch_fiber(&forgotten, b.outside);
    next_fiber();
}
inline void run_block(unsigned number) {
    Block& b = *block;
    const unsigned n = b.threads.x;
    b.number = dim3(number);
    b.fibers.resize(n);
    b.stacks.resize(n * STACK + 64);
    b.alive = n;
    b.idle = 0;
    b.all = Barrier();
    b.warps.assign((n + 31) / 32, Barrier());
    for (auto& slot : b.slots) slot.assign((n + 31) / 32 * 32, 0);
    for (unsigned i = 0; i < n; i++) {
        void* stack = prepare_stack(b.stacks.data() + (i + 1) * STACK, fiber_main);
        b.fibers[i] = {stack, dim3(i, 0, 0), i, false, 0};
    }
    b.current = 0;
    block_epoch = ++epoch;
    switch_fiber(&b.outside, b.fibers[0].stack);
    epoch++;
}
inline void launch(int64_t blocks, unsigned threads, std::function<void()> body) {
    Block own;
    own.threads = dim3(threads);
    own.grid = dim3(blocks);
    own.body = std::move(body);
    block = &own;
    for (int64_t i = 0; i < blocks && !message[0]; i++) run_block(i);
    block = nullptr;
}
template <class T> T shuffle(unsigned mask, T value, int from) {  // from: a lane, or out of range for one's own value
    Block& b = *block;
    Fiber& fiber = b.fibers[b.current];
    const unsigned warp = fiber.number / 32, first = 32 * warp, parity = fiber.parity ^= 1;
    const unsigned lanes = std::min<unsigned>(32, b.fibers.size() - first);
    if (lanes < 32) mask &= (1u << lanes) - 1;
    if (!(mask >> fiber.number % 32 & 1)) fail("a lane that the mask does not name takes part in a shuffle");
    memcpy(&b.slots[parity][fiber.number], &value, sizeof value);
    wait(b.warps[warp], __builtin_popcount(mask));
    if (from >= 0 && from < 32 && (mask >> from & 1)) memcpy(&value, &b.slots[parity][first + from], sizeof value);
    return value;
}
inline int lane() { return block->fibers[block->current].number % 32; }
inline int status() { return message[0] != 0; }
inline const char* take_message() {
    static char taken[sizeof message];
    memcpy(taken, message, sizeof message);
    message[0] = 0;
    return taken;
}

// ------------------------------------------------------------------------------------------------------- shared memory
constexpr int NOBODY = -1, SEVERAL = -2, ATOMIC = -3;
struct Access {  // the last ones, and the epoch they were in
    uint64_t written = 0, read = 0;
    int writer = NOBODY, reader = NOBODY;
};
template <class T> struct Shared {
    T* data;
    Access* accesses;
    int64_t size, offset;
    const char* name;

    int64_t at(int64_t i) const {
        if (offset + i < 0 || offset + i >= size)
            fail("%s[%ld] lies outside the shared array of %ld", name, (long)(offset + i), (long)size);
        return offset + i;
    }
    T get(int64_t i) const {
        Access& a = accesses[i];
        const int me = block->current;
        if (a.written < block_epoch) fail("%s[%ld] is read before the block wrote it", name, (long)i);
        if (a.written == epoch && a.writer != me)
            fail("race: %s[%ld] was written by thread %d and no barrier came since", name, (long)i, a.writer);
        a.reader = a.read < epoch || a.reader == me ? me : SEVERAL;
        a.read = epoch;
        return data[i];
    }
    void check_write(int64_t i, int as) const {
        Access& a = accesses[i];
        const int me = block->current;
        if (a.written == epoch && a.writer != me && !(a.writer == ATOMIC && as == ATOMIC))
            fail("race: %s[%ld] was written by thread %d and no barrier came since", name, (long)i, a.writer);
        if (a.read == epoch && a.reader != me)
            fail("race: %s[%ld] was read by another thread and no barrier came since", name, (long)i);
        a.written = epoch;
        a.writer = as;
    }
    void put(int64_t i, T value) const {
        check_write(i, block->current);
        data[i] = value;
    }
    T update(int64_t i, const std::function<T(T)>& change) const {  // an atomic
        if (accesses[i].written < block_epoch) fail("%s[%ld] is read before the block wrote it", name, (long)i);
        check_write(i, ATOMIC);
        const T old = data[i];
        data[i] = change(old);
        return old;
    }
    struct Element {
        const Shared& array;
        int64_t i;
        operator T() const { return array.get(i); }
        const Element& operator=(T value) const { return array.put(i, value), *this; }
        const Element& operator=(const Element& other) const { return *this = (T)other; }
        const Element& operator-=(T value) const { return *this = array.get(i) - value; }
    };
    Element operator[](int64_t i) const { return {*this, at(i)}; }
    Shared operator+(int64_t i) const { return {data, accesses, size, offset + i, name}; }
};
template <class T, int N> struct SharedStorage {
    T data[N];
    Access accesses[N];
};

// ------------------------------------------------------------------------------------------------------- global memory
template <class T> struct Global {
    T* data;
    int64_t size, offset;
    T* at(int64_t i, int64_t n = 1) const {
        if (offset + i < 0 || offset + i + n > size)
            fail("element %ld lies outside a tensor of %ld", (long)(offset + i), (long)size);
        return data + offset + i;
    }
    T& operator[](int64_t i) const { return *at(i); }
    Global operator+(int64_t i) const { return {data, size, offset + i}; }
    operator Global<const T>() const { return {data, size, offset}; }
};

}  // namespace cpu

template <class T> using Shared = cpu::Shared<T>;
template <class T> using Global = cpu::Global<T>;
template <class T> T* span(Global<T> p, int64_t first, int n) { return p.at(first, n); }
template <class T> Global<T> global(T* p, int64_t size) { return {p, size, 0}; }
#define SHARED(T, name, n)                               \
    static cpu::SharedStorage<T, n> name##_storage;      \
    const Shared<T> name = {name##_storage.data, name##_storage.accesses, n, 0, #name}
#define LAUNCH(kernel, blocks, threads, stream, ...)              \
    do {                                                          \
        (void)(stream);                                           \
        cpu::launch(blocks, threads, [=] { kernel(__VA_ARGS__); }); \
    } while (0)
#define LAUNCH_STATUS() cpu::status()
#define STATUS_TEXT(status) ((void)(status), cpu::take_message())

// -------------------------------------------------------------------------------------------------- what CUDA provides
#define threadIdx (cpu::block->fibers[cpu::block->current].index)
#define blockIdx (cpu::block->number)
#define blockDim (cpu::block->threads)
inline void __syncthreads() { cpu::wait(cpu::block->all, cpu::block->alive); }
template <class T> T __shfl_xor_sync(unsigned mask, T value, int other) {
    return cpu::shuffle(mask, value, cpu::lane() ^ other);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    return cpu::shuffle(mask, value, cpu::lane() + (int)by);
}
template <class T> T atomicAdd(Shared<T> p, std::common_type_t<T> x) {
    return p.update(p.at(0), [=](T old) { return old + x; });
}
template <class T> T atomicOr(Shared<T> p, std::common_type_t<T> x) {
    return p.update(p.at(0), [=](T old) { return old | x; });
}
inline const uint4* check_aligned(const uint4* p) {
    if ((uintptr_t)p % 16) cpu::fail("a 16-byte access that is not aligned");
    return p;
}
inline uint4 __ldcs(const uint4* p) { return *check_aligned(p); }
inline void __stcs(uint4* p, uint4 x) { check_aligned(p), *p = x; }
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {  // to nearest, ties to even
    const unsigned bits = __float_as_uint(x);
    return {(uint16_t)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __expf(float x) { return expf(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
