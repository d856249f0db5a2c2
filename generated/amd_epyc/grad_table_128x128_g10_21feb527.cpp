// lmKAN layer, grad_table, on CPU: 10 cells per axis, 16 floats per SIMD register
// and 64 outputs per tile.
//
// The parameters of one grid knot are kept as a row over outputs, so that a sample's four corner rows
// are updated with full SIMD registers and without gathers.
//
// x [inputs, batch], table [G+1, G+1, outputs, pairs], borders [G+1], y and grad [outputs, batch];
// all float32, contiguous but for x, grad and the gradient of x, whose strides are arguments. Of an odd number of
// inputs the last pair has only one, and the other is zero. Functions return 0, or 1 when scratch memory cannot be allocated. No two
// iterations of a parallel loop write the same element, and no sum depends on how many threads there
// are: results are reproducible to the bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace {

constexpr int64_t G = 10;
constexpr int64_t KNOTS = (G + 1) * (G + 1);
constexpr int64_t LANES = 16;
constexpr int64_t TILE = 64;
constexpr int64_t VECTORS = TILE / LANES;
constexpr int64_t CHUNK = 1024;  // samples located at a time
constexpr int64_t STAGED = 128;  // the same where they are first laid out next to each other
constexpr int64_t BLOCK = 16;  // edge of the squares that transposes go through: one cache line

// one SIMD register of floats; rows of TILE floats start at multiples of its size
typedef float Vector __attribute__((vector_size(4 * LANES), may_alias));

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// the same for a square of BLOCK x BLOCK, through registers or first-level cache
inline void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    float block[BLOCK][BLOCK];
    for (int64_t r = 0; r < BLOCK; ++r)
        for (int64_t c = 0; c < BLOCK; ++c) block[r][c] = from[r * from_stride + c];
    for (int64_t c = 0; c < BLOCK; ++c)
        for (int64_t r = 0; r < BLOCK; ++r) to[c * to_stride + r] = block[r][c];
}

// to[c][r] = from[r][c] for r < rows and c < columns; zero for rows <= r < padded
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns,
               float* to, int64_t to_stride, int64_t padded) {
    for (int64_t c0 = 0; c0 < columns; c0 += BLOCK) {
        const int64_t c1 = std::min(c0 + BLOCK, columns);
        for (int64_t r0 = 0; r0 < padded; r0 += BLOCK) {
            const int64_t r1 = std::min(r0 + BLOCK, padded);
            if (c1 - c0 == BLOCK && r0 + BLOCK <= rows) {
                transpose_block(from + r0 * from_stride + c0, from_stride, to + c0 * to_stride + r0, to_stride);
                continue;
            }
            for (int64_t c = c0; c < c1; ++c)
                for (int64_t r = r0; r < r1; ++r)
                    to[c * to_stride + r] = r < rows ? from[r * from_stride + c] : 0.0f;
        }
    }
}

// exp(x) for x <= 0, without a branch or a call, so that loops over it vectorise: relative error
// below 2e-7, values below exp(-87) (and NaN) are taken for exp(-87).
inline float exp_negative(float x) {
    x = x > -87.0f ? x : -87.0f;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.98412698e-4f;
    e = e * r + 1.38888889e-3f;
    e = e * r + 8.33333333e-3f;
    e = e * r + 4.16666667e-2f;
    e = e * r + 1.66666667e-1f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &e, sizeof bits);
    bits += int32_t(n) * (1 << 23);
    std::memcpy(&e, &bits, sizeof e);
    return e;
}

// Cell of x; comparisons are arranged so that NaN goes to cell 0. The borders decide about the
// position in the cell, so a sample that rounding puts beside its cell gets the same value.
inline int32_t locate(float x) {
    const float tail = 0.5f * exp_negative(-std::fabs(x));
    const float t = float(G) * (x > 0.0f ? 1.0f - tail : tail);
    const int32_t cell = int32_t(t);
    return cell < G - 1 ? cell : G - 1;
}

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
    float inverse_width[G];
    for (int64_t i = 0; i < G; ++i) inverse_width[i] = 1.0f / (borders[i + 1] - borders[i]);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
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
#pragma omp simd
                for (int64_t b = 0; b < samples; ++b) {
                    const int32_t i1 = locate(x1[b]), i2 = locate(x2[b]);
                    d1[b] = (x1[b] - borders[i1]) * inverse_width[i1];
                    d2[b] = (x2[b] - borders[i2]) * inverse_width[i2];
                    knot[b] = i1 * int32_t(G + 1) + i2;
                }
            }
        }
    }
    return 0;
}

// grad -> packed [tiles, batch, width], outputs padded with zeros to whole tiles of ``width``
extern "C" int pack_grad(const float* grad, float* packed, int64_t outputs, int64_t batch, int64_t width,
                         int64_t output_stride, int64_t batch_stride, int64_t threads) {
    const int64_t tiles = ceil_div(outputs, width);
    const int64_t chunks = ceil_div(batch, BLOCK);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t o = tile * width;
            const int64_t b = chunk * BLOCK;
            const int64_t present = std::min(width, outputs - o), samples = std::min(BLOCK, batch - b);
            const float* from = grad + o * output_stride + b * batch_stride;
            float* to = packed + (tile * batch + b) * width;
            if (batch_stride == 1) {
                transpose(from, output_stride, present, samples, to, width, width);
                continue;
            }
            for (int64_t s = 0; s < samples; ++s)
                for (int64_t k = 0; k < width; ++k)
                    to[s * width + k] = k < present ? from[k * output_stride + s * batch_stride] : 0.0f;
        }
    }
    return 0;
}

extern "C" int grad_table(void* cells, const float* grads, float* grad_table, int64_t pairs, int64_t outputs,
                          int64_t batch, int64_t batch_tile, int64_t pairs_tile, int64_t threads) {
    const int64_t tiles = ceil_div(outputs, TILE);
    const int64_t blocks = ceil_div(pairs, pairs_tile);
    const Cells at(cells, pairs, batch);
    const auto memory = scratch(threads, pairs_tile * KNOTS * TILE);
    if (!memory) return 1;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t p0 = block * pairs_tile;
            const int64_t p1 = std::min(p0 + pairs_tile, pairs);
            // sums [pairs_tile, KNOTS, TILE] of this thread; nobody else adds to these elements
            float* sums = memory.get() + omp_get_thread_num() * pairs_tile * KNOTS * TILE;
            std::fill(sums, sums + (p1 - p0) * KNOTS * TILE, 0.0f);
            for (int64_t first = 0; first < batch; first += batch_tile) {
                const int64_t last = std::min(first + batch_tile, batch);
                for (int64_t p = p0; p < p1; ++p) {
                    for (int64_t b = first; b < last; ++b) {
                        const int64_t i = p * batch + b;
                        const float d1 = at.d1[i], d2 = at.d2[i];
                        const float w00 = (1.0f - d1) * (1.0f - d2), w01 = (1.0f - d1) * d2;
                        const float w10 = d1 * (1.0f - d2), w11 = d1 * d2;
                        const Vector* g =
                            reinterpret_cast<const Vector*>(grads + (tile * batch + b) * TILE);
                        Vector* c = reinterpret_cast<Vector*>(sums + ((p - p0) * KNOTS + at.knot[i]) * TILE);
                        for (int64_t v = 0; v < VECTORS; ++v) {
                            const Vector value = g[v];
                            c[v] += w00 * value;
                            c[VECTORS + v] += w01 * value;
                            c[(G + 1) * VECTORS + v] += w10 * value;
                            c[(G + 2) * VECTORS + v] += w11 * value;
                        }
                    }
                }
            }
            const int64_t o = tile * TILE;
            for (int64_t knot = 0; knot < KNOTS; ++knot)
                transpose(sums + knot * TILE, KNOTS * TILE, p1 - p0, std::min(TILE, outputs - o),
                          grad_table + (knot * outputs + o) * pairs + p0, pairs, p1 - p0);
        }
    }
    return 0;
}
