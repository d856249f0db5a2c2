// Enough of CUDA to run kernels on a CPU, one block after the other. Its threads take turns on one of the CPU's: each
// runs until it has to wait for others.
// Shared memory is whatever a block leaves behind: as on a GPU, nobody may rely on its contents.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>

struct Index {
    unsigned x, y, z;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T> T __ldg(const T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) __builtin_trap();  // a misaligned address
    return *address;
}
template <typename To, typename From> To bits_of(From value) {
    To result;
    static_assert(sizeof(To) == sizeof(From));
    std::memcpy(&result, &value, sizeof(To));
    return result;
}
inline float __int_as_float(int v) { return bits_of<float>(v); }
inline float __uint_as_float(unsigned v) { return bits_of<float>(v); }
inline int __float_as_int(float v) { return bits_of<int>(v); }
inline int __float2int_rd(float v) { return v != v ? 0 : int(std::floor(std::clamp(v, -2147483648.0f, 2147483520.0f))); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int atomicAdd(int* address, int value) { return (*address += value) - value; }

Index threadIdx, blockIdx, blockDim, gridDim;

// A thread of the block, with a stack of its own.
struct Thread {
    ucontext_t context;
    bool done = false;
    std::unique_ptr<char[]> stack;
};
inline std::vector<Thread> threads;
inline ucontext_t all_done;

// Lets the next thread run.
inline void give_way() {
    const unsigned own = threadIdx.x, count = threads.size();
    unsigned next = (own + 1) % count;
    while (threads[next].done && next != own) next = (next + 1) % count;
    threadIdx.x = next;
    if (next != own) swapcontext(&threads[own].context, &threads[next].context);
    else if (threads[own].done) setcontext(&all_done);
}

struct Barrier {
    unsigned expected, arrived = 0, generation = 0;

    void arrive_and_wait() {
        const unsigned mine = generation;
        if (++arrived == expected) arrived = 0, ++generation;
        while (mine == generation) give_way();
    }
};
inline Barrier in_block;
inline void __syncthreads() { in_block.arrive_and_wait(); }

// What lanes of a warp show each other. All of them take part, whatever the mask.
struct Warp {
    Barrier barrier{32};
    unsigned shown[32];
};
inline std::vector<Warp> warps;
inline void __syncwarp() { warps[threadIdx.x / 32].barrier.arrive_and_wait(); }
template <typename T, typename Look> auto shown(T value, Look look) {
    __syncwarp();
    Warp& warp = warps[threadIdx.x / 32];
    warp.shown[threadIdx.x % 32] = bits_of<unsigned>(value);
    __syncwarp();
    return look([&](int lane) { return bits_of<T>(warp.shown[lane]); });
}
template <typename T> T __shfl_sync(unsigned, T value, int lane) {
    return shown(value, [&](auto of) { return of(lane); });
}
template <typename T> T __shfl_up_sync(unsigned, T value, int by) {
    const int lane = threadIdx.x % 32;
    return shown(value, [&](auto of) { return of(lane >= by ? lane - by : lane); });
}
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return shown(value, [&](auto of) { return of(int(threadIdx.x % 32) ^ mask); });
}
inline unsigned __ballot_sync(unsigned, int set) {
    return shown(set, [&](auto of) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= unsigned(of(lane) != 0) << lane;
        return bits;
    });
}

using std::max;
using std::min;
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define asm if (false) asm  // prefetches

alignas(16) inline char dynamic_shared_memory[1 << 18];
// In place of an addition by one instruction.
inline void add_atomically(float* address, float value) { *address += value; }

// An argument of a launch: an address or a number, as the parameter wants it.
struct Argument {
    int64_t value;
    template <typename T> operator T*() const { return reinterpret_cast<T*>(value); }
    operator long long() const { return value; }
};

// What threads run: all blocks, one after the other.
inline std::vector<Index> blocks;
inline void (*run_kernel)(const void*);
inline const void* kernel_of_launch;

inline void run_blocks() {
    for (const Index& block : blocks) {
        blockIdx = block;
        run_kernel(kernel_of_launch);
        __syncthreads();
    }
    threads[threadIdx.x].done = true;
    give_way();
}

// In an order of blocks that `seed` says: 0 is by their indices.
template <typename Kernel> void launch(const Index& grid, unsigned count, unsigned seed, const Kernel& kernel) {
    constexpr size_t kStack = 1 << 16;
    blockDim = {count, 1, 1};
    gridDim = grid;
    blocks.clear();
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    if (seed) std::shuffle(blocks.begin(), blocks.end(), std::mt19937(seed));
    in_block = {count};
    warps = std::vector<Warp>((count + 31) / 32);
    threads = std::vector<Thread>(count);
    kernel_of_launch = &kernel;
    run_kernel = [](const void* k) { (*static_cast<const Kernel*>(k))(); };
    for (Thread& thread : threads) {
        thread.stack = std::make_unique_for_overwrite<char[]>(kStack);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStack;
        makecontext(&thread.context, run_blocks, 0);
    }
    threadIdx = {0, 0, 0};
    swapcontext(&all_done, &threads[0].context);
}
