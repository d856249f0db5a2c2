// lmKAN layer, forward with float32 tables, on CPU: 8 cells per axis, 16 floats per SIMD register
// and 32 outputs per tile.
//
// The parameters of one grid knot are a row over outputs, so that a sample's four corner rows
// are read with full SIMD registers and without gathers.
//
// x [inputs, batch], table [G+1, G+1, outputs, pairs], borders [G+1], y and grad [outputs, batch];
// all float32, contiguous but for x, grad and the gradient of x, whose strides are arguments. Rows lie as
// [pairs, KNOTS, pitch]: outputs are padded with zeros to whole registers, and ``pitch`` may be more. Of an odd
// number of inputs the last pair has only one, and the other is zero. Functions return 0, or 1 when scratch memory
// cannot be allocated. No two iterations of a parallel loop write the same element, and no sum depends on how
// many threads there are: results are reproducible to the bit.

// What CPU kernels of layer calls share: SIMD registers, transposes, where samples lie in the grid.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t G = 8;
constexpr int64_t KNOTS = (G + 1) * (G + 1);
constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 16;  // edge of the squares that transposes go through: one cache line
constexpr int64_t WORTH_A_THREAD = 1 << 17;  // additions; fewer take less time than to wake a thread

// one SIMD register of floats, at an address that is a multiple of its size
typedef float Vector __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// how many of the threads share that much work; results do not depend on it
int64_t workers(int64_t threads, int64_t additions) {
    return std::max<int64_t>(1, std::min(threads, additions / WORTH_A_THREAD));
}

// the lower and the upper halves of two registers, lanes in turns
inline Vector low(Vector a, Vector b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
    return __builtin_shuffle(a, b, Words{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}
inline Vector high(Vector a, Vector b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
    return __builtin_shuffle(a, b, Words{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// a square of LANES x LANES; rows from ``present`` on are taken for zero
void transpose_square(const float* from, int64_t from_stride, int64_t present, float* to,
                             int64_t to_stride) {
    if (present < LANES) {
        float all[LANES * LANES] = {};
        for (int64_t r = 0; r < present; ++r)
            std::memcpy(all + r * LANES, from + r * from_stride, sizeof(Vector));
        return transpose_square(all, LANES, LANES, to, to_stride);
    }
    // indices below are constants to the compiler, which keeps all rows in registers
    Vector rows[LANES], mixed[LANES];
    for (int64_t r = 0; r < LANES; ++r) std::memcpy(&rows[r], from + r * from_stride, sizeof(Vector));
    for (int64_t step = 1; step < LANES; step *= 2) {
        for (int64_t i = 0; i < LANES / 2; ++i) {
            mixed[2 * i] = low(rows[i], rows[i + LANES / 2]);
            mixed[2 * i + 1] = high(rows[i], rows[i + LANES / 2]);
        }
        for (int64_t i = 0; i < LANES; ++i) rows[i] = mixed[i];
    }
    for (int64_t c = 0; c < LANES; ++c) std::memcpy(to + c * to_stride, &rows[c], sizeof(Vector));
}

// to[c][r] = from[r][c] for r < rows and c < columns; zero for rows <= r < padded
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
               float* to, int64_t to_stride, int64_t padded) {
    for (int64_t c0 = 0; c0 < columns; c0 += BLOCK) {
        const int64_t c1 = std::min(c0 + BLOCK, columns);
        for (int64_t r0 = 0; r0 < padded; r0 += BLOCK) {
            const int64_t r1 = std::min(r0 + BLOCK, padded);
            if (c1 - c0 == BLOCK && r1 - r0 == BLOCK) {
                for (int64_t c = c0; c < c1; c += LANES)
                    for (int64_t r = r0; r < r1; r += LANES)
                        transpose_square(from + r * from_stride + c, from_stride, rows - r,
                                         to + c * to_stride + r, to_stride);
                continue;
            }
            for (int64_t c = c0; c < c1; ++c)
                for (int64_t r = r0; r < r1; ++r)
                    to[c * to_stride + r] = r < rows ? from[r * from_stride + c] : 0.0f;
        }
    }
}

// the first lanes of a register
inline Vector load_some(const float* from, int64_t present) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector>(_mm512_maskz_loadu_ps(__mmask16((1u << present) - 1), from));
#else
    Vector value = {};
    if (present == LANES) {
        std::memcpy(&value, from, sizeof value);
    } else {
        for (int64_t lane = 0; lane < present; ++lane) value[lane] = from[lane];
    }
    return value;
#endif
}

template <typename Number, typename Lanes>
inline void store_some(Number* to, Lanes value, int64_t present) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_epi32(to, __mmask16((1u << present) - 1), reinterpret_cast<__m512i>(value));
#else
    if (present == LANES) {
        std::memcpy(to, &value, sizeof value);
    } else {
        for (int64_t lane = 0; lane < present; ++lane) to[lane] = value[lane];
    }
#endif
}

// exp(x) for x <= 0, without a branch or a call: relative error below 2e-7, values below exp(-87) (and NaN) are
// taken for exp(-87).
inline Vector exp_negative(Vector x) {
    x = x > -87.0f ? x : Vector{} - 87.0f;
    const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const Vector n = shifted - 12582912.0f;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector e = Vector{} + 1.98412698e-4f;
    e = e * r + 1.38888889e-3f;
    e = e * r + 8.33333333e-3f;
    e = e * r + 4.16666667e-2f;
    e = e * r + 1.66666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    return reinterpret_cast<Vector>(reinterpret_cast<Words>(e) + __builtin_convertvector(n, Words) * (1 << 23));
}

// The knots and the inverse widths of cells, padded to whole registers.
struct Grid {
    static constexpr int64_t PADDED = (G + BLOCK - 1) / BLOCK * BLOCK;
    alignas(64) float knots[PADDED] = {};
    alignas(64) float inverse_width[PADDED] = {};

    explicit Grid(const float* borders) {
        for (int64_t i = 0; i < G; ++i) {
            knots[i] = borders[i];
            inverse_width[i] = 1.0f / (borders[i + 1] - borders[i]);
        }
    }

    static Vector at(const float* values, Words i) {
#if defined(__AVX512F__)
        const __m512i index = reinterpret_cast<__m512i>(i);
        if constexpr (G <= 16)
            return reinterpret_cast<Vector>(_mm512_permutexvar_ps(index, _mm512_load_ps(values)));
        else if constexpr (G <= 32)
            return reinterpret_cast<Vector>(
                _mm512_permutex2var_ps(_mm512_load_ps(values), index, _mm512_load_ps(values + 16)));
        else
            return reinterpret_cast<Vector>(_mm512_i32gather_ps(index, values, 4));
#else
        Vector found;
        for (int64_t lane = 0; lane < LANES; ++lane) found[lane] = values[i[lane]];
        return found;
#endif
    }

    // Cell of x, and ``d``, the position in it; comparisons are arranged so that NaN goes to cell 0. The knots decide
    // about the position, so a sample that rounding puts beside its cell gets the same value.
    Words locate(Vector x, Vector* d) const {
        const Vector distance = reinterpret_cast<Vector>(reinterpret_cast<Words>(x) & 0x7fffffff);
        const Vector tail = 0.5f * exp_negative(-distance);
        const Vector t = float(G) * (x > 0.0f ? 1.0f - tail : tail);
        const Words cell = __builtin_convertvector(t, Words), last = Words{} + int32_t(G - 1);
        const Words i = cell < last ? cell : last;
        *d = (x - at(knots, i)) * at(inverse_width, i);
        return i;
    }
};

}  // namespace

#include <memory>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif
// Rows of float32 parameters, read as float32. They start at multiples of 16 bytes: constants of AOTInductor
// packages do at no others. Where it is one of a register's size, reading costs no more than if it had to be.

namespace {

typedef float AnywhereVector __attribute__((vector_size(4 * LANES), may_alias, aligned(16)));
inline Vector load(const float* from) { return *reinterpret_cast<const AnywhereVector*>(from); }

typedef float Element;
// What parameters from some output on are to be multiplied by: [ceil(pairs / SCALE_PAIRS), pitch] for int8, else 1.
struct Scales {
    Scales from(int64_t) const { return {}; }
};

}  // namespace

namespace {

constexpr int64_t TILE = 32;
constexpr int64_t VECTORS = TILE / LANES;

constexpr int64_t CHUNK = 1024;  // samples located at a time
constexpr int64_t STAGED = 128;  // the same where they are first laid out next to each other

// Where each sample lies in the grid of each pair: arrays [pairs, batch], one behind the other.
struct Cells {
    float* d1;
    float* d2;
    int32_t* knot;  // index of the lower corner among the KNOTS

    Cells(void* memory, int64_t pairs, int64_t batch)
        : d1(static_cast<float*>(memory)),
          d2(d1 + pairs * batch),
          knot(reinterpret_cast<int32_t*>(d2 + pairs * batch)) {}
};

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};

// a slice of ``floats`` (a multiple of BLOCK) for each thread
std::unique_ptr<float, Free> scratch(int64_t threads, int64_t floats) {
    return std::unique_ptr<float, Free>(
        static_cast<float*>(std::aligned_alloc(4 * BLOCK, size_t(threads * floats) * sizeof(float))));
}

// Add pairs p0 to p1 to the sums [samples, TILE] of ``vectors`` registers of outputs; ``rows`` begins at pair p0.
template <int64_t N, typename Element>
void blend(const Cells& at, const Element* rows, int64_t pair_stride, int64_t pitch, Scales scales, int64_t p0, int64_t p1,
           int64_t first, int64_t samples, int64_t batch, float* sums, int64_t vectors) {
    if (vectors >= N) {
        for (int64_t b = 0; b < samples; ++b) {
            Vector* stored = reinterpret_cast<Vector*>(sums + b * TILE);
            Vector sum[N];
            for (int64_t v = 0; v < N; ++v) sum[v] = stored[v];
            for (int64_t p = p0; p < p1; ++p) {
                const int64_t i = p * batch + first + b;
                const float d1 = at.d1[i], d2 = at.d2[i];
                const float w00 = (1.0f - d1) * (1.0f - d2), w01 = (1.0f - d1) * d2;
                const float w10 = d1 * (1.0f - d2), w11 = d1 * d2;
                const Element* c00 = rows + (p - p0) * pair_stride + at.knot[i] * pitch;
                const Element* c01 = c00 + pitch;
                const Element* c10 = c00 + (G + 1) * pitch;
                const Element* c11 = c10 + pitch;
                for (int64_t v = 0; v < N; ++v) {
                    sum[v] += w00 * load(c00 + v * LANES);
                    sum[v] += w01 * load(c01 + v * LANES);
                    sum[v] += w10 * load(c10 + v * LANES);
                    sum[v] += w11 * load(c11 + v * LANES);
                }
            }
            for (int64_t v = 0; v < N; ++v) stored[v] = sum[v];
        }
        rows += N * LANES;
        scales = scales.from(N * LANES);
        sums += N * LANES;
        vectors -= N;
    }
    if constexpr (N > 1) {
        if (vectors > 0)
            blend<N / 2>(at, rows, pair_stride, pitch, scales, p0, p1, first, samples, batch, sums, vectors);
    }
}

}  // namespace

// Where samples are not next to each other, a cache line of inputs at a time is laid out so first.
extern "C" int coordinates(const float* x, const float* borders, void* cells, int64_t inputs, int64_t batch,
                           int64_t input_stride, int64_t batch_stride, int64_t threads) {
    const bool apart = batch_stride != 1;
    const int64_t together = apart ? BLOCK : 2;  // inputs of one task
    const int64_t samples_together = apart ? STAGED : CHUNK;
    const int64_t groups = ceil_div(inputs, together);
    const int64_t chunks = ceil_div(batch, samples_together);
    const Cells out(cells, ceil_div(inputs, 2), batch);
    static const float zeros[CHUNK] = {};
    const Grid grid(borders);
#pragma omp parallel for collapse(2) num_threads(workers(threads, 8 * inputs * batch)) schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t first = chunk * samples_together;
            const int64_t samples = std::min(samples_together, batch - first);
            const int64_t from = group * together, to = std::min(from + together, inputs);
            const float* rows = x + from * input_stride + first * batch_stride;
            int64_t stride = input_stride;
            float beside[BLOCK][STAGED];
            if (apart) {
                if (input_stride == 1) {
                    transpose(rows, batch_stride, samples, to - from, beside[0], STAGED, samples);
                } else {
                    for (int64_t b = 0; b < samples; ++b)
                        for (int64_t i = 0; i < to - from; ++i)
                            beside[i][b] = rows[i * input_stride + b * batch_stride];
                }
                rows = beside[0];
                stride = STAGED;
            }
            for (int64_t i = from; i < to; i += 2) {
                const float* x1 = rows + (i - from) * stride;
                const float* x2 = i + 1 < inputs ? x1 + stride : zeros;
                const int64_t at = i / 2 * batch + first;
                float* d1 = out.d1 + at;
                float* d2 = out.d2 + at;
                int32_t* knot = out.knot + at;
                for (int64_t b = 0; b < samples; b += LANES) {
                    const int64_t present = std::min(LANES, samples - b);
                    Vector of1, of2;
                    const Words i1 = grid.locate(load_some(x1 + b, present), &of1);
                    const Words i2 = grid.locate(load_some(x2 + b, present), &of2);
                    store_some(d1 + b, of1, present);
                    store_some(d2 + b, of2, present);
                    store_some(knot + b, i1 * int32_t(G + 1) + i2, present);
                }
            }
        }
    }
    return 0;
}

// table -> rows
extern "C" int pack_table(const float* table, float* packed, int64_t pairs, int64_t outputs, int64_t pitch,
                          int64_t threads) {
    const int64_t padded = ceil_div(outputs, LANES) * LANES;
#pragma omp parallel for collapse(2) num_threads(workers(threads, KNOTS * outputs * pairs)) schedule(static)
    for (int64_t knot = 0; knot < KNOTS; ++knot)
        for (int64_t o = 0; o < outputs; o += BLOCK)
            transpose(table + (knot * outputs + o) * pairs, pairs, std::min(BLOCK, outputs - o), pairs,
                      packed + knot * pitch + o, KNOTS * pitch, std::min(BLOCK, padded - o));
    return 0;
}

extern "C" int forward(void* cells, const Element* rows, float* y, int64_t pairs,
                       int64_t outputs, int64_t pitch, int64_t batch, int64_t batch_tile, int64_t pairs_tile, int64_t threads) {
    const int64_t tiles = ceil_div(outputs, TILE);
    const int64_t chunks = ceil_div(batch, batch_tile);
    const int64_t busy = workers(threads, 4 * pairs * outputs * batch);
    const Cells at(cells, pairs, batch);
    const Scales scales{};
    const int64_t widened = 0;
    const auto memory = scratch(busy, batch_tile * TILE + widened);
    if (!memory) return 1;
#pragma omp parallel for collapse(2) num_threads(busy) schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t first = chunk * batch_tile;
            const int64_t samples = std::min(batch_tile, batch - first);
            const int64_t o = tile * TILE;
            const int64_t vectors = std::min(VECTORS, ceil_div(outputs - o, LANES));
            // sums [samples, TILE]; a few pairs at a time, whose rows stay in cache over all samples
            float* sums = memory.get() + omp_get_thread_num() * (batch_tile * TILE + widened);
            std::fill(sums, sums + samples * TILE, 0.0f);
            for (int64_t p0 = 0; p0 < pairs; p0 += pairs_tile) {
                const int64_t p1 = std::min(p0 + pairs_tile, pairs);
                const Element* of_pairs = rows + p0 * KNOTS * pitch + o;
                blend<VECTORS>(at, of_pairs, KNOTS * pitch, pitch, scales.from(o), p0, p1, first, samples, batch, sums,
                               vectors);
            }
            transpose(sums, TILE, samples, std::min(TILE, outputs - o), y + o * batch + first, batch, samples);
        }
    }
    return 0;
}
