// Enough of CUDA to run simple kernels on a CPU, one block after the other and its threads as threads.
// Shared memory is whatever a block leaves behind: as on a GPU, nobody may rely on its contents.
#include <algorithm>
#include <barrier>
#include <cstdint>
#include <thread>
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
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T> T __ldg(const T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) __builtin_trap();  // a misaligned address
    return *address;
}

thread_local Index threadIdx, blockIdx;
Index blockDim;
std::barrier<>* in_block;
inline void __syncthreads() { in_block->arrive_and_wait(); }

using std::max;
using std::min;
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define asm if (false) asm  // prefetches

// An argument of a launch: an address or a number, as the parameter wants it.
struct Argument {
    int64_t value;
    template <typename T> operator T*() const { return reinterpret_cast<T*>(value); }
    operator long long() const { return value; }
};

template <typename Kernel> void launch(unsigned blocks, unsigned threads, const Kernel& kernel) {
    blockDim = {threads, 1, 1};
    for (unsigned block = 0; block < blocks; ++block) {
        std::barrier<> barrier(threads);
        in_block = &barrier;
        std::vector<std::thread> running;
        for (unsigned thread = 0; thread < threads; ++thread)
            running.emplace_back([&, thread] {
                threadIdx = {thread, 0, 0};
                blockIdx = {block, 0, 0};
                kernel();
                barrier.arrive_and_drop();
            });
        for (std::thread& thread : running) thread.join();
    }
}
