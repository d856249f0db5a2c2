// Enough of CUDA to run kernels on a CPU, one cluster of blocks after the other, its threads taking turns at every
// barrier. Shared memory is whatever a block leaves behind: as on a GPU, nobody may rely on its contents. What kernels
// declare in it without `extern` is there once, for all blocks: clusters of several must not have any.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sys/mman.h>
#include <type_traits>
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
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <typename T> T __ldg(const T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) __builtin_trap();  // a misaligned address
    return *address;
}

using std::max;
using std::min;
#define __global__
#define __grid_constant__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __restrict__
#define __align__(bytes) alignas(bytes)

Index threadIdx, blockIdx, blockDim, gridDim;
// What a launch asks for, of the blocks of a cluster one after the other. The addresses of a block's are offsets in its
// own; those of others are offsets from the first block's, behind what is its own.
constexpr unsigned kMostShared = 256 * 1024, kMostBlocks = 8;
alignas(1024) unsigned char shared_memory_of_cluster[kMostBlocks * kMostShared];
unsigned char* shared_memory = shared_memory_of_cluster;  // the current block's
inline unsigned __cvta_generic_to_shared(const void* address) {
    return unsigned(static_cast<const unsigned char*>(address) - shared_memory);
}

// A barrier in shared memory: the number of its current phase, and who has to arrive in each.
struct Arrivals {
    unsigned phase, expected, arrived;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
    unsigned cluster_phase;
    static constexpr size_t kStack = 1 << 17;
};
ucontext_t between_turns;
void end_turn();

// A thread that has returned is waited for no longer.
struct Barrier {
    unsigned expected, arrived = 0, passed = 0;
    unsigned arrive() {  // what to wait for
        const unsigned before = passed;
        ++arrived;
        open();
        return before;
    }
    void wait(unsigned before) {
        while (passed == before) end_turn();
    }
    void wait() { wait(arrive()); }
    void leave() {
        --expected;
        open();
    }
    void open() {
        if (arrived == expected) arrived = 0, ++passed;
    }
};
struct Warp {
    Barrier barrier{32};
    uint64_t values[32];
    unsigned operands[32][6];
};
// A thread's asynchronous copies are made when it waits for them, which is the latest that they could be.
struct Copies {
    struct Copy {
        unsigned target;
        const void* source;
        int bytes, size;
    };
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;

    static void make(const std::vector<Copy>& copies) {
        for (const Copy& c : copies) {
            std::memset(shared_memory + c.target, 0, c.size);
            std::memcpy(shared_memory + c.target, c.source, c.bytes);
        }
    }
    void commit() {
        groups.push_back(std::move(open));
        open.clear();
    }
    void wait(size_t pending) {
        for (; groups.size() > pending; groups.pop_front()) make(groups.front());
    }
    void wait_all() {
        wait(0);
        make(open);
        open.clear();
    }
};

struct Block {
    std::vector<Thread> threads;  // kept: their stacks are used again
    Barrier barrier;
    std::vector<Warp> warps;
    std::vector<Copies> copies;
    std::map<unsigned, Arrivals> arrivals;  // by the addresses of barriers
    bool any_vote;
    unsigned ended, waiting;                // threads; for other blocks
};
std::vector<Block> blocks_of_cluster;
Barrier cluster_barrier;
unsigned block_rank;  // of the current block, in its cluster
inline Block& this_block() { return blocks_of_cluster[block_rank]; }
inline Thread& this_thread() { return this_block().threads[threadIdx.x]; }
inline Warp& this_warp() { return this_block().warps[threadIdx.x / 32]; }
inline void end_turn() { swapcontext(&this_thread().context, &between_turns); }

inline Arrivals& arrivals_of(unsigned barrier) { return this_block().arrivals[barrier]; }
inline void arrive_at(unsigned barrier) {
    Arrivals& at = arrivals_of(barrier);
    if (++at.arrived == at.expected) at.arrived = 0, ++at.phase;
}

// A thread waits for the phase of the cluster's barrier in which it has arrived.
inline void cluster_arrive() { this_thread().cluster_phase = cluster_barrier.arrive(); }
inline void cluster_wait() {
    ++this_block().waiting;
    cluster_barrier.wait(this_thread().cluster_phase);
    --this_block().waiting;
}
inline unsigned address_in_cluster(unsigned address, unsigned rank) {
    if (rank >= blocks_of_cluster.size()) __builtin_trap();
    return rank * kMostShared + address;
}

inline void __syncthreads() { this_block().barrier.wait(); }
inline bool __syncthreads_or(int mine) {
    this_block().any_vote |= mine != 0;
    __syncthreads();
    const bool any = this_block().any_vote;
    __syncthreads();
    this_block().any_vote = false;
    __syncthreads();
    return any;
}
inline void __syncwarp() { this_warp().barrier.wait(); }
template <typename T> T from_lane(T mine, int lane) {
    Warp& warp = this_warp();
    std::memcpy(&warp.values[threadIdx.x % 32], &mine, sizeof mine);
    warp.barrier.wait();
    if (lane >= 0 && lane < 32) std::memcpy(&mine, &warp.values[lane], sizeof mine);
    warp.barrier.wait();
    return mine;
}
template <typename T> T __shfl_sync(unsigned, T mine, int lane) { return from_lane(mine, lane); }
template <typename T> T __shfl_xor_sync(unsigned, T mine, int mask) { return from_lane(mine, int(threadIdx.x % 32) ^ mask); }
template <typename T> T __shfl_up_sync(unsigned, T mine, int step) { return from_lane(mine, int(threadIdx.x % 32) - step); }

inline unsigned __ballot_sync(unsigned, int set) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned(from_lane(set, lane) != 0) << lane;
    return bits;
}
inline unsigned __reduce_or_sync(unsigned, unsigned mine) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= from_lane(mine, lane);
    return all;
}
inline bool __any_sync(unsigned, int set) { return __ballot_sync(0xffffffffu, set) != 0; }
template <typename T> T __reduce_max_sync(unsigned, T mine) {
    T most = mine;
    for (int lane = 0; lane < 32; ++lane) most = max(most, from_lane(mine, lane));
    return most;
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }

template <typename T> T atomicAdd(T* address, T value) { return std::atomic_ref<T>(*address).fetch_add(value); }

inline int __float_as_int(float v) { int bits; std::memcpy(&bits, &v, 4); return bits; }
inline unsigned __float_as_uint(float v) { return unsigned(__float_as_int(v)); }
inline float __int_as_float(int v) { float value; std::memcpy(&value, &v, 4); return value; }
inline float __uint_as_float(unsigned v) { return __int_as_float(int(v)); }
inline int __float2int_rd(float v) { return v != v ? 0 : int(std::floor(std::clamp(v, -2147483648.0f, 2147483520.0f))); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int k = 0; k < 4; ++k) result |= unsigned(both >> 8 * (selector >> 4 * k & 7) & 0xff) << 8 * k;
    return int(result);
}
inline Copies& copies_of_thread() { return this_block().copies[threadIdx.x]; }
inline void copy_or_clear(unsigned target, const void* source, int bytes, int size) {
    if (target % size || bytes && reinterpret_cast<uintptr_t>(source) % size) __builtin_trap();  // a misaligned address
    copies_of_thread().open.push_back({target, source, bytes, size});
}

// Elements of a tensor core's registers.
inline float part_in_tf32(unsigned bits, int) { return __uint_as_float(bits & 0xffffe000u); }
inline float part_in_half(unsigned bits, int which) {
    const uint16_t half = uint16_t(bits >> 16 * which);
    _Float16 value;
    std::memcpy(&value, &half, 2);
    return float(value);
}
inline float part_in_bfloat(unsigned bits, int which) { return __uint_as_float(bits >> 16 * which << 16); }
inline uint16_t in_half(float v) {
    const _Float16 half = static_cast<_Float16>(v);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline unsigned fused_in_half(unsigned two, unsigned factor_and_addend) {  // of both halves, rounded once
    const float factor = part_in_half(factor_and_addend, 0), addend = part_in_half(factor_and_addend, 1);
    unsigned both = 0;
    for (int k = 0; k < 2; ++k) both |= unsigned(in_half(std::fma(part_in_half(two, k), factor, addend))) << 16 * k;
    return both;
}
inline uint16_t in_bfloat(float v) {
    const unsigned bits = __float_as_uint(v);
    return v != v ? 0x7fff : uint16_t(bits + 0x7fff + (bits >> 16 & 1) >> 16);
}
template <typename Part, typename Round>
unsigned fused_twice(unsigned a, unsigned b, unsigned c, Part part, Round round) {  // a b + c, of both halves
    unsigned both = 0;
    for (int k = 0; k < 2; ++k) both |= unsigned(round(std::fma(part(a, k), part(b, k), part(c, k)))) << 16 * k;
    return both;
}

// c += a b on a tensor core, with PACK elements of a factor in a register: 16 rows, 8 columns, sums over 8 PACK.
template <int PACK, typename Part> void warp_product(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Part part) {
    Warp& warp = this_warp();
    const int lane = threadIdx.x % 32;
    unsigned(&mine)[6] = warp.operands[lane];
    std::copy(a, a + 4, mine);
    mine[4] = b0;
    mine[5] = b1;
    warp.barrier.wait();
    for (int k = 0; k < 4; ++k) {
        const int row = lane / 4 + 8 * (k / 2), column = 2 * (lane % 4) + k % 2;
        for (int i = 0; i < 8 * PACK; ++i) {
            const int other = i / PACK % 4, later = i / (4 * PACK);
            const float left = part(warp.operands[4 * (row % 8) + other][row / 8 + 2 * later], i % PACK);
            c[k] += left * part(warp.operands[4 * column + other][4 + later], i % PACK);
        }
    }
    warp.barrier.wait();
}
// Four matrices of 8 x 8 halves in shared memory, whose rows lanes give the addresses of.
inline void rows_of_matrices(unsigned (&to)[4], unsigned address, bool transposed) {
    if (address % 16) __builtin_trap();  // a misaligned address
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t two[2];
        for (int k = 0; k < 2; ++k) {
            const int row = transposed ? 2 * t + k : g, column = transposed ? g : 2 * t + k;
            std::memcpy(two + k, shared_memory + from_lane(address, 8 * matrix + row) + 2 * column, 2);
        }
        to[matrix] = two[0] | unsigned(two[1]) << 16;
    }
}
inline int dot2(int weights, int corners, int first, int sum) {  // two 16-bit weights, bytes from the first one on
    for (int k = 0; k < 2; ++k) sum += int16_t(weights >> 16 * k) * int8_t(corners >> 8 * (first + k));
    return sum;
}

// An argument of a launch: an address or a number, as the parameter wants it.
struct Argument {
    int64_t value;
    template <typename T> operator T*() const { return reinterpret_cast<T*>(value); }
    operator long long() const { return value; }
    template <typename T> requires (std::is_class_v<T> && sizeof(T) == 128) operator T() const {
        return *reinterpret_cast<const T*>(value);
    }
};

// A box out of a tensor, zeros beyond its edges: its map is an address, a rank, and as many sizes and edges of the box,
// innermost first.
template <typename Map> void copy_box(const Map& map, void* target, std::array<long long, 4> first) {
    const long long* numbers = reinterpret_cast<const long long*>(&map);
    const int* source = reinterpret_cast<const int*>(numbers[0]);
    const long long *sizes = numbers + 2, *box = numbers + 6;
    int* to = static_cast<int*>(target);
    for (long long k = 0; k < box[0] * box[1] * box[2] * box[3]; ++k) {
        long long rest = k, from = 0, pitch = 1;
        bool inside = true;
        for (int axis = 0; axis < 4; ++axis) {
            const long long at = first[axis] + rest % box[axis];
            inside &= at >= 0 && at < sizes[axis];
            from += at * pitch;
            pitch *= sizes[axis];
            rest /= box[axis];
        }
        to[k] = inside ? source[from] : 0;
    }
}

inline void end_thread() {
    this_warp().barrier.leave();
    this_block().barrier.leave();
    cluster_barrier.leave();
    this_thread().done = true;
    end_turn();
}
template <typename Kernel> const Kernel* running;
template <typename Kernel> void run_thread() {
    (*running<Kernel>)();
    end_thread();
}

// A kernel that starts early, while those before it have not even begun: its threads end where they would wait for
// these. What it may not touch until then lies at an address where nothing can be read or written.
bool too_early, has_waited, has_touched;
inline void wait_for_earlier_kernels() {
    if (!too_early) return;
    has_waited = true;
    end_thread();
}
inline void touch(int) {
    has_touched = true;
    setcontext(&between_turns);
}
extern "C" char* untouchable() {
    constexpr size_t bytes = size_t(1) << 40;
    static void* const reserved = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return static_cast<char*>(reserved) + bytes / 2;
}

// A turn of each of the current block's threads.
inline void run_round() {
    Block& block = this_block();
    for (unsigned t = 0; t < blockDim.x; ++t) {
        if (block.threads[t].done) continue;
        threadIdx = {t, 0, 0};
        swapcontext(&between_turns, &block.threads[t].context);
        if (has_touched) return;
        block.ended += block.threads[t].done;
    }
}

// One cluster of blocks, along x, after the other, in an order that `seed` says: 0 is by their indices. So is the order of
// turns in a cluster.
template <typename Kernel>
void launch(const unsigned* grid, unsigned threads, unsigned cluster, unsigned seed, const Kernel& kernel) {
    if (grid[0] % cluster || cluster > kMostBlocks) __builtin_trap();  // as the driver refuses it
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    running<Kernel> = &kernel;
    blocks_of_cluster.resize(cluster);
    std::vector<Index> firsts;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; x += cluster) firsts.push_back({x, y, z});
    std::vector<unsigned> turns(cluster);
    std::iota(turns.begin(), turns.end(), 0);
    std::mt19937 random(seed);
    if (seed) std::shuffle(firsts.begin(), firsts.end(), random);
    for (const Index& first : firsts) {
        if (seed) std::shuffle(turns.begin(), turns.end(), random);
        cluster_barrier = {cluster * threads};
        for (Block& block : blocks_of_cluster) {
            block.barrier = {threads};
            block.ended = block.waiting = 0;
            block.warps.assign((threads + 31) / 32, Warp{});
            block.copies.assign(threads, {});
            block.threads.resize(threads);
            for (Thread& thread : block.threads) {
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.get();
                thread.context.uc_stack.ss_size = Thread::kStack;
                makecontext(&thread.context, run_thread<Kernel>, 0);
                thread.done = false;
            }
        }
        for (unsigned left = cluster; left;) {
            for (const unsigned rank : turns) {
                Block& block = blocks_of_cluster[rank];
                if (block.ended == threads) continue;
                block_rank = rank;
                blockIdx = {first.x + rank, first.y, first.z};
                shared_memory = shared_memory_of_cluster + rank * kMostShared;
                // as far ahead of the others as it gets
                int rounds = 0;
                do {
                    run_round();
                    if (has_touched) return;
                } while (++rounds < 1000 && block.ended + block.waiting < threads);
                if (block.ended < threads) continue;
                --left;
                if (cluster > 1) std::memset(shared_memory, 0xff, kMostShared);  // gone for the others
            }
        }
    }
}

// What a kernel does that starts early: 0, it waits before it touches what it must not; 1, it does not wait; 2, it touches.
template <typename Kernel> int launch_early(const unsigned* grid, unsigned threads, unsigned cluster, const Kernel& kernel) {
    struct sigaction action = {}, before;
    action.sa_handler = touch;
    sigaction(SIGSEGV, &action, &before);
    too_early = true;
    has_waited = has_touched = false;
    launch(grid, threads, cluster, 0, kernel);
    sigaction(SIGSEGV, &before, nullptr);
    too_early = false;
    const int found = has_touched ? 2 : !has_waited;
    has_touched = false;
    return found;
}
