// lmKAN layer, grad_input, on CPU: 26 cells per axis, 16 floats per SIMD register
// and all outputs in one row.
//
// The parameters of one grid knot are kept as a row over outputs, so that a sample's four corner rows
// are read with full SIMD registers and without gathers.
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

namespace {

constexpr int64_t G = 26;
constexpr int64_t KNOTS = (G + 1) * (G + 1);
constexpr int64_t LANES = 16;
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

// table -> packed [tiles, pairs, KNOTS, width], outputs padded with zeros to whole tiles of ``width``
extern "C" int pack_table(const float* table, float* packed, int64_t pairs, int64_t outputs, int64_t width,
                          int64_t threads) {
    const int64_t tiles = ceil_div(outputs, width);
    const int64_t blocks = ceil_div(pairs, BLOCK);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t o = tile * width;
            const int64_t p = block * BLOCK;
            for (int64_t knot = 0; knot < KNOTS; ++knot)
                transpose(table + (knot * outputs + o) * pairs + p, pairs, std::min(width, outputs - o),
                          std::min(BLOCK, pairs - p), packed + ((tile * pairs + p) * KNOTS + knot) * width,
                          KNOTS * width, width);
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

extern "C" int grad_input(void* cells, const float* packed, const float* grads, const float* borders,
                          float* grad_x, int64_t inputs, int64_t width, int64_t batch, int64_t batch_tile,
                          int64_t pairs_tile, int64_t input_stride, int64_t batch_stride, int64_t threads) {
    const int64_t pairs = ceil_div(inputs, 2);
    const int64_t vectors = width / LANES;
    const int64_t chunks = ceil_div(batch, batch_tile);
    const int64_t blocks = ceil_div(pairs, pairs_tile);
    const Cells at(cells, pairs, batch);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t p1 = std::min((block + 1) * pairs_tile, pairs);
            const int64_t b1 = std::min((chunk + 1) * batch_tile, batch);
            for (int64_t p = block * pairs_tile; p < p1; ++p) {
                for (int64_t b = chunk * batch_tile; b < b1; ++b) {
                    const int64_t i = p * batch + b;
                    const int64_t knot = at.knot[i];
                    const Vector* c00 =
                        reinterpret_cast<const Vector*>(packed + (p * KNOTS + knot) * width);
                    const Vector* c01 = c00 + vectors;
                    const Vector* c10 = c00 + (G + 1) * vectors;
                    const Vector* c11 = c10 + vectors;
                    const Vector* g = reinterpret_cast<const Vector*>(grads + b * width);
                    // differences of corners first: on smooth functions they are small and exact
                    Vector along1 = {}, along2 = {}, mixed = {};
                    for (int64_t v = 0; v < vectors; ++v) {
                        const Vector low1 = c10[v] - c00[v], low2 = c01[v] - c00[v];
                        along1 += g[v] * low1;
                        along2 += g[v] * low2;
                        mixed += g[v] * ((c11[v] - c01[v]) - low1);
                    }
                    float s1 = 0.0f, s2 = 0.0f, s12 = 0.0f;
                    for (int64_t lane = 0; lane < LANES; ++lane) {
                        s1 += along1[lane];
                        s2 += along2[lane];
                        s12 += mixed[lane];
                    }
                    const float* g1 = borders + knot / (G + 1);
                    const float* g2 = borders + knot % (G + 1);
                    float* target = grad_x + 2 * p * input_stride + b * batch_stride;
                    *target = (s1 + at.d2[i] * s12) / (g1[1] - g1[0]);
                    if (2 * p + 1 < inputs) target[input_stride] = (s2 + at.d1[i] * s12) / (g2[1] - g2[0]);
                }
            }
        }
    }
    return 0;
}
