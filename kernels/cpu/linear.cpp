// Products of many rows with packed weights: bf16 pairs or groups of four bytes, whatever is done with the result in the
// same pass.
//
// A weight [out, in] lies in panels of 64 outputs. Inside a panel one step along the inputs is 256 bytes, the 64 outputs'
// next two bf16 (or four int8) inputs side by side, as the dot instructions take them; six rows of the input against a
// panel keep 24 sums in registers. Every sum runs over the inputs in one order, so a row's result depends neither on the
// rows beside it nor on the number of threads, to the bit.
#include <algorithm>

#include "activation.h"
#include "parallel.h"
#include "quantize.h"
#include "vector.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

namespace {

#define UNROLL _Pragma("GCC unroll 8")

constexpr int ROWS = 6, VECTORS = 4, PANEL = VECTORS * LANES, HALF = PANEL / 2, STEP = 256;
constexpr int64_t BLOCK_BYTES = 384 << 10;  // of the input: what stays in a core's second cache beside two panels

struct Pairs {  // bf16
    static constexpr int INPUTS = 2, BYTES = 2;
    using Sum = Floats;
    static Sum zero() { return splat(0); }
    static Sum dot(Sum sum, Ints row, Ints panel) { return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)panel); }
};
struct Fours {  // unsigned bytes of the input, signed ones of the weight
    static constexpr int INPUTS = 4, BYTES = 1;
    using Sum = Ints;
    static Sum zero() { return splat_int(0); }
    static Sum dot(Sum sum, Ints row, Ints panel) { return _mm512_dpbusd_epi32(sum, row, panel); }
};

struct Call {
    const void *x, *panels;
    const float* bias;  // [out] or null
    void* out;
    int64_t rows, in, out_features;
    int32_t type, activation, threads;  // type: of the elements of out; activation: -1 none, 0 silu, 1 gelu_tanh
    // Of int8 products alone: each output's scale and its bytes' sum times the input's zero point; each row's scale and
    // what was clipped of it; the weight as int8 [in, out].
    const float* scales;
    const int32_t* offsets;
    const float* row_scales;
    const Rest* rests;
    const int32_t* rest_counts;
    int64_t most_rests;
    const int8_t* columns;
};

// Sums of R rows with the half panels at low and high; meanwhile a line a step is fetched from `ahead` on, of a whole
// panel or of half a one.
template <class P, bool WHOLE, int R>
void multiply(const char* x, int64_t stride, const char* low, const char* high, int64_t steps, const char* ahead,
              typename P::Sum sums[ROWS][VECTORS]) {
    typename P::Sum sum[R][VECTORS];
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int c = 0; c < VECTORS; c++) sum[r][c] = P::zero();
    }
    for (int64_t s = 0; s < steps; s++) {
        Ints panel[VECTORS];
        UNROLL
        for (int c = 0; c < VECTORS; c++) panel[c] = load_ints((WHOLE || c < 2 ? low : high) + s * STEP + (WHOLE ? c : c % 2) * 64);
        _mm_prefetch(ahead + (WHOLE ? s * 64 : s / 2 * STEP + s % 2 * 64), _MM_HINT_T1);
        UNROLL
        for (int r = 0; r < R; r++) {
            int32_t inputs;
            memcpy(&inputs, x + r * stride + 4 * s, 4);
            UNROLL
            for (int c = 0; c < VECTORS; c++) sum[r][c] = P::dot(sum[r][c], splat_int(inputs), panel[c]);
        }
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        UNROLL
        for (int c = 0; c < VECTORS; c++) sums[r][c] = sum[r][c];
    }
}

template <class P>
struct Product {
    const Call& call;
    const bool gated;
    const int64_t steps, stride, panels;

    explicit Product(const Call& c)
        : call(c), gated(c.activation >= 0), steps(c.in / P::INPUTS), stride(c.in * P::BYTES),
          panels(gated ? c.out_features / PANEL : (c.out_features + PANEL - 1) / PANEL) {}

    // Where the outputs of half panel h lie, and the first of them.
    const char* half(int64_t h) const {
        return static_cast<const char*>(call.panels) + h / 2 * steps * STEP + h % 2 * (STEP / 2);
    }
    // The two half panels of item p: neighbours, or a gate's and its up's.
    int64_t low(int64_t p) const { return gated ? p : 2 * p; }
    int64_t high(int64_t p) const { return gated ? p + call.out_features / PANEL : 2 * p + 1; }

    Floats finished(Floats sum, int64_t, int64_t column, int left) const {
        return call.bias ? sum + load_up_to(call.bias + column, left) : sum;
    }
    Floats finished(Ints sum, int64_t row, int64_t column, int left) const {
        Ints offsets = left >= LANES ? load_ints(call.offsets + column) : as_ints(load_some((const float*)call.offsets + column, left));
        Floats scale = load_up_to(call.scales + column, left), extra = splat(0);
        const Rest* rests = call.rests + row * call.most_rests;
        for (int j = 0; j < call.rest_counts[row]; j++) {
            const int8_t* from = call.columns + rests[j].place * call.out_features + column;
            int8_t part[LANES] = {};
            if (left < LANES) from = static_cast<int8_t*>(memcpy(part, from, left));
            extra = fma(to_floats(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from))), splat(rests[j].value), extra);
        }
        Floats y = fma(to_floats(sub_int(sum, offsets)), splat(call.row_scales[row]), extra) * scale;
        return call.bias ? y + load_up_to(call.bias + column, left) : y;
    }

    template <class T>
    void finish(int64_t p, int64_t row, int count, const typename P::Sum sums[ROWS][VECTORS]) const {
        int64_t width = gated ? call.out_features / 2 : call.out_features;
        for (int r = 0; r < count; r++) {
            T* out = static_cast<T*>(call.out) + (row + r) * width;
            if (gated) {
                int64_t gate = low(p) * HALF, up = high(p) * HALF;
                for (int c = 0; c < 2; c++, gate += LANES, up += LANES) {
                    Floats g = finished(sums[r][c], row + r, gate, LANES), u = finished(sums[r][c + 2], row + r, up, LANES);
                    store(out + gate, activate(g, call.activation == 1) * u);
                }
                continue;
            }
            int64_t column = p * PANEL;
            for (int c = 0; c < VECTORS && column < width; c++, column += LANES) {
                int left = int(std::min<int64_t>(width - column, LANES));
                store_up_to(out + column, finished(sums[r][c], row + r, column, left), left);
            }
        }
    }

    // What the t-th tile fetches for item `next`: four fetch it all, neighbouring lines together.
    const char* ahead(int64_t next, int64_t t) const {
        if (!gated) return half(low(next)) + t * steps * 64;
        return half(t < 2 ? low(next) : high(next)) + t % 2 * (steps / 2) * STEP;
    }

    // Rows [begin, end) of the outputs of item p, in tiles of nearly equal height.
    template <bool WHOLE>
    void run_item(int64_t p, int64_t begin, int64_t end, int64_t next) const {
        using Multiply = void (*)(const char*, int64_t, const char*, const char*, int64_t, const char*,
                                  typename P::Sum[ROWS][VECTORS]);
        static constexpr Multiply variants[ROWS] = {multiply<P, WHOLE, 1>, multiply<P, WHOLE, 2>, multiply<P, WHOLE, 3>,
                                                    multiply<P, WHOLE, 4>, multiply<P, WHOLE, 5>, multiply<P, WHOLE, 6>};
        typename P::Sum sums[ROWS][VECTORS];
        int64_t tiles = (end - begin + ROWS - 1) / ROWS;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = begin + t * (end - begin) / tiles, count = begin + (t + 1) * (end - begin) / tiles - row;
            variants[count - 1](static_cast<const char*>(call.x) + row * stride, stride, half(low(p)), half(high(p)), steps,
                                t < 4 ? ahead(next, t) : half(low(p)), sums);
            with_type(call.type, [&](auto tag) { finish<decltype(tag)>(p, row, int(count), sums); });
        }
    }

    void run() const {
        int64_t most = std::max<int64_t>(BLOCK_BYTES / stride / ROWS * ROWS, ROWS);
        int64_t blocks = (call.rows + most - 1) / most;
        // Enough items that no thread waits long for another's last one.
        if (call.threads > 1 && panels * blocks < 8 * call.threads)
            blocks = std::min((8 * call.threads + panels - 1) / panels, (call.rows + ROWS - 1) / ROWS);
        int64_t items = panels * blocks;
        parallel_for(call.threads, items, 1, [&](int64_t i) {
            int64_t p = i % panels, b = i / panels;
            int64_t begin = b * call.rows / blocks, end = (b + 1) * call.rows / blocks, next = (p + call.threads) % panels;
            gated ? run_item<false>(p, begin, end, next) : run_item<true>(p, begin, end, next);
        });
    }
};

}  // namespace

// x bf16 [rows, in] (or bytes of it), in a multiple of 2 (4) -> out [rows, out_features]; with an activation
// [rows, out_features / 2], of the first half (the gates) times the second, out_features a multiple of 64.
EXPORTED int batchinfer_multiplies() { return 1; }
EXPORTED void batchinfer_linear(const Call* call) { Product<Pairs>(*call).run(); }
EXPORTED void batchinfer_linear_int8(const Call* call) { Product<Fours>(*call).run(); }

#else

EXPORTED int batchinfer_multiplies() { return 0; }
EXPORTED void batchinfer_linear(const void*) {}
EXPORTED void batchinfer_linear_int8(const void*) {}

#endif
