// Products of many rows with packed weights: bf16 pairs or groups of four bytes, whatever is done with the result in the
// same pass.
//
// A weight [out, in] lies in panels of 32 outputs. Inside a panel one step along the inputs is 128 bytes, the 32 outputs'
// next two bf16 (or four bytes) inputs side by side, as the dot instructions take them; six rows of the input against two
// panels keep 24 sums in registers (bytes: one panel, 12 sums of a group and 12 of the groups before). Every sum runs over
// the inputs in one order, so a row's result depends neither on the rows beside it nor on the number of threads, to the
// bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "activation.h"
#include "parallel.h"
#include "rotated.h"
#include "rows.h"
#include "vector.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

namespace {

#define UNROLL _Pragma("GCC unroll 8")

constexpr int ROWS = 6, VECTORS = 4, PANEL = 2 * LANES, STEP = 128;
constexpr int64_t OWN_ROWS = 32;  // as many take longer against two panels than these take from memory
constexpr int64_t BLOCK_BYTES = 384 << 10;  // of the input: what stays in a core's second cache beside two panels

struct Call {
    const void *x, *panels;
    const float *scales, *bias;  // [out]: of a weight in bytes; or null
    void *out, *scratch;         // scratch: for the rows' bytes and groups, GROUP + sizeof(Group) for each group
    int64_t rows, in, out_features;
    int32_t x_type, type, activation, threads;  // activation: -1 none, 0 silu, 1 gelu_tanh
};

// The largest of a row's outputs that came by, lane by lane: of equal ones the first. And the first that is no number.
struct Choice {
    Floats best = splat(-INFINITY);
    Ints column = splat_int(INT32_MAX);
    int32_t poison = INT32_MAX;

    void take(__mmask16 some, Floats x, Ints columns) {
        __mmask16 equal = _mm512_cmp_ps_mask(x, best, _CMP_EQ_OQ) & _mm512_cmplt_epi32_mask(columns, column);
        __mmask16 better = some & (_mm512_cmp_ps_mask(x, best, _CMP_GT_OQ) | equal);
        best = _mm512_mask_blend_ps(better, best, x);
        column = _mm512_mask_blend_epi32(better, column, columns);
    }
    // `left` outputs from `first` on.
    void add(Floats x, int32_t first, int left) {
        __mmask16 some = left < LANES ? __mmask16((1 << left) - 1) : __mmask16(0xffff);
        take(some, x, add_int(splat_int(first), iota()));
        __mmask16 no_number = some & _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        if (no_number) poison = std::min(poison, first + __builtin_ctz(no_number));
    }
    void add(const Choice& other) {
        take(0xffff, other.best, other.column);
        poison = std::min(poison, other.poison);
    }
    float value() const { return poison < INT32_MAX ? NAN : largest(best); }
    int32_t chosen() const {
        if (poison < INT32_MAX) return poison;
        return _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(best, splat(largest(best)), _CMP_EQ_OQ), column);
    }
};

// A few rows against two panels. With each pass over the steps a line a step is fetched from its `ahead` on, and the rows
// after these from `next_x` on: most of them were just written by another core.
struct Tile {
    const char *x, *low, *high, *ahead[2], *next_x;
    int64_t stride, steps;
    const Group* groups;  // of the first row; a row has steps / GROUP_STEPS of them
};

struct Pairs {  // bf16
    static constexpr int INPUTS = 2, PASSES = 1;

    template <int R>
    static void multiply(const Tile& t, Floats sums[ROWS][VECTORS]) {
        Floats sum[R][VECTORS];
        UNROLL
        for (int r = 0; r < R; r++) {
            UNROLL
            for (int c = 0; c < VECTORS; c++) sum[r][c] = splat(0);
        }
        for (int64_t s = 0; s < t.steps; s++) {
            Ints panel[VECTORS];
            UNROLL
            for (int c = 0; c < VECTORS; c++) panel[c] = load_ints((c < 2 ? t.low : t.high) + s * STEP + c % 2 * 64);
            _mm_prefetch(t.ahead[0] + s * 64, _MM_HINT_T1);
            _mm_prefetch(t.next_x + s * 4 * R, _MM_HINT_T0);
            UNROLL
            for (int r = 0; r < R; r++) {
                int32_t inputs;
                memcpy(&inputs, t.x + r * t.stride + 4 * s, 4);
                __m512bh row = (__m512bh)splat_int(inputs);
                UNROLL
                for (int c = 0; c < VECTORS; c++) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], row, (__m512bh)panel[c]);
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) {
            UNROLL
            for (int c = 0; c < VECTORS; c++) sums[r][c] = sum[r][c];
        }
    }
};

struct Fours {  // signed bytes of the input in groups, unsigned ones of the weight: 128 more than it
    static constexpr int INPUTS = 4, PASSES = 2, GROUP_STEPS = GROUP / INPUTS;

    template <int R>
    static void multiply(const Tile& t, Floats sums[ROWS][VECTORS]) {
        multiply_panel<R>(t, t.low, t.ahead[0], 0, sums);
        multiply_panel<R>(t, t.high, t.ahead[1], 2, sums);
    }

    template <int R>
    static void multiply_panel(const Tile& t, const char* panel, const char* ahead, int first, Floats sums[ROWS][VECTORS]) {
        Floats sum[R][2];
        UNROLL
        for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = splat(0);
        int64_t groups = t.steps / GROUP_STEPS;
        const char *x = t.x, *next_x = t.next_x;
        for (int64_t g = 0; g < groups; g++) {
            const Group* group = t.groups + g;
            Ints part[R][2];
            UNROLL
            for (int r = 0; r < R; r++) part[r][0] = part[r][1] = splat_int(group[r * groups].zero);
            _Pragma("GCC unroll 16")  // whole: the compiler copies all sums at the end of each turn
            for (int s = 0; s < GROUP_STEPS; s++) {
                Ints a = load_ints(panel), b = load_ints(panel + 64);
                _mm_prefetch(ahead, _MM_HINT_T1);
                _mm_prefetch(next_x, _MM_HINT_T0);
                UNROLL
                for (int r = 0; r < R; r++) {
                    int32_t inputs;
                    memcpy(&inputs, x + r * t.stride, 4);
                    Ints row = splat_int(inputs);
                    part[r][0] = _mm512_dpbusd_epi32(part[r][0], a, row);
                    part[r][1] = _mm512_dpbusd_epi32(part[r][1], b, row);
                }
                x += 4;
                panel += STEP;
                ahead += 64;
                next_x += 4 * R;
            }
            UNROLL
            for (int r = 0; r < R; r++) {
                Floats scale = splat(group[r * groups].scale);
                UNROLL
                for (int c = 0; c < 2; c++) sum[r][c] = fma(to_floats(part[r][c]), scale, sum[r][c]);
            }
        }
        UNROLL
        for (int r = 0; r < R; r++) {
            sums[r][first] = sum[r][0];
            sums[r][first + 1] = sum[r][1];
        }
    }
};

template <class P>
struct Product {
    const Call& call;
    const bool gated;
    const int64_t groups, steps, stride, items;
    const char* x;
    Group* row_groups;
    Choice* choices;  // of each thread, of each row; or null: outputs are written

    explicit Product(const Call& c, Choice* choices = nullptr)
        : call(c), gated(c.activation >= 0), groups((c.in + GROUP - 1) / GROUP),
          steps(P::INPUTS == 4 ? groups * GROUP / 4 : c.in / 2), stride(steps * 4),
          items(gated ? c.out_features / (2 * PANEL) : (c.out_features + 2 * PANEL - 1) / (2 * PANEL)),
          x(static_cast<const char*>(P::INPUTS == 4 ? c.scratch : c.x)),
          row_groups(P::INPUTS == 4 ? reinterpret_cast<Group*>(static_cast<char*>(c.scratch) + c.rows * stride) : nullptr),
          choices(choices) {}

    // The two panels of item i: neighbours, or a gate's and its up's.
    int64_t low(int64_t i) const { return gated ? i : 2 * i; }
    int64_t high(int64_t i) const { return gated ? i + call.out_features / (2 * PANEL) : 2 * i + 1; }
    const char* panel(int64_t i) const { return static_cast<const char*>(call.panels) + i * steps * STEP; }

    Floats finished(Floats sum, int64_t column, int left) const {
        if (P::INPUTS == 4) sum = sum * load_up_to(call.scales + column, left);
        return call.bias ? sum + load_up_to(call.bias + column, left) : sum;
    }

    template <class T>
    void finish(int64_t i, int64_t row, int count, const Floats sums[ROWS][VECTORS]) const {
        int64_t width = gated ? call.out_features / 2 : call.out_features;
        for (int r = 0; r < count; r++) {
            T* out = static_cast<T*>(call.out) + (row + r) * width;
            if (gated) {
                int64_t gate = low(i) * PANEL, up = high(i) * PANEL;
                for (int c = 0; c < 2; c++, gate += LANES, up += LANES) {
                    Floats g = finished(sums[r][c], gate, LANES), u = finished(sums[r][c + 2], up, LANES);
                    store(out + gate, activate(g, call.activation == 1) * u);
                }
                continue;
            }
            int64_t column = i * 2 * PANEL;
            for (int c = 0; c < VECTORS && column < width; c++, column += LANES) {
                int left = int(std::min<int64_t>(width - column, LANES));
                store_up_to(out + column, finished(sums[r][c], column, left), left);
            }
        }
    }

    void choose(int64_t i, int64_t row, int count, const Floats sums[ROWS][VECTORS]) const {
        Choice* own = choices + omp_get_thread_num() * call.rows + row;
        for (int r = 0; r < count; r++) {
            int64_t column = i * 2 * PANEL;
            for (int c = 0; c < VECTORS && column < call.out_features; c++, column += LANES) {
                int left = int(std::min<int64_t>(call.out_features - column, LANES));
                own[r].add(finished(sums[r][c], column, left), int32_t(column), left);
            }
        }
    }

    // The n-th quarter of what item i reads: its tiles before fetch a quarter with each pass over the steps.
    const char* quarter(int64_t i, int64_t n) const { return panel(n < 2 ? low(i) : high(i)) + n % 2 * steps * 64; }

    // Rows [begin, end) of the outputs of item i, in tiles of nearly equal height.
    void run_item(int64_t i, int64_t begin, int64_t end, int64_t next) const {
        using Multiply = void (*)(const Tile&, Floats[ROWS][VECTORS]);
        static constexpr Multiply variants[ROWS] = {P::template multiply<1>, P::template multiply<2>, P::template multiply<3>,
                                                    P::template multiply<4>, P::template multiply<5>, P::template multiply<6>};
        Floats sums[ROWS][VECTORS];
        int64_t tiles = (end - begin + ROWS - 1) / ROWS;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t row = begin + t * (end - begin) / tiles, count = begin + (t + 1) * (end - begin) / tiles - row;
            const char* here = x + row * stride;
            Tile tile{here, panel(low(i)), panel(high(i)), {}, here + count * stride, stride, steps, row_groups + row * groups};
            for (int n = 0; n < P::PASSES; n++) {
                int64_t pass = t * P::PASSES + n;
                tile.ahead[n] = pass < 4 ? quarter(next, pass) : panel(low(i));
            }
            variants[count - 1](tile, sums);
            if (choices)
                choose(i, row, int(count), sums);
            else
                with_type(call.type, [&](auto tag) { finish<decltype(tag)>(i, row, int(count), sums); });
        }
    }

    void quantize(int64_t row) const {
        with_type(call.x_type, [&](auto tag) {
            const auto* from = static_cast<const decltype(tag)*>(call.x) + row * call.in;
            int8_t* to = static_cast<int8_t*>(call.scratch) + row * stride;
            for (int64_t g = 0; g < groups; g++)
                row_groups[row * groups + g] =
                    quantize_group(from + g * GROUP, int(std::min<int64_t>(call.in - g * GROUP, GROUP)), to + g * GROUP);
        });
    }

    void run() const {
        int64_t most = std::max<int64_t>(BLOCK_BYTES / stride / ROWS * ROWS, ROWS);
        int64_t blocks = (call.rows + most - 1) / most;
        if (call.threads > 1) {
            // Each thread multiplies its own rows, where they are enough to hide that it reads the weight for itself.
            int64_t parts = std::max<int64_t>(1, std::min<int64_t>(call.threads, call.rows / OWN_ROWS));
            blocks = (blocks + parts - 1) / parts * parts;
            // Enough items that no thread waits long for another's last one.
            int64_t enough = (8 * call.threads + items - 1) / items;
            if (blocks < enough) blocks = std::min((enough + parts - 1) / parts * parts, (call.rows + ROWS - 1) / ROWS);
        }
        auto multiply = [&](int64_t n) {
            int64_t i = n % items, b = n / items;
            run_item(i, b * call.rows / blocks, (b + 1) * call.rows / blocks, (i + 1) % items);
        };
        if (P::INPUTS == 2) return parallel_for(call.threads, items * blocks, 1, multiply);
        together(call.threads, [&] {
            parallel_for(call.threads, call.rows, 8, [&](int64_t row) { quantize(row); });
            parallel_for(call.threads, items * blocks, 1, multiply);
        });
    }
};

template <class P>
void multiply(const Call& call, const Rows* rows) {
    Call part = call;
    if (rows) {
        int64_t groups = (call.in + GROUP - 1) / GROUP, width = call.activation < 0 ? call.out_features : call.out_features / 2;
        part.x = behind(call.x, call.x_type, rows->begin * call.in);
        part.out = behind(call.out, call.type, rows->begin * width);
        part.scratch = static_cast<char*>(call.scratch) + rows->begin * groups * int64_t(GROUP + sizeof(Group));
        part.rows = rows->count;
        part.threads = rows->threads;
    }
    Product<P>(part).run();
}

// The column of each row's largest output, of equal ones the first, and what it is.
template <class P>
void choose(const Call& call, int64_t* chosen, float* values) {
    std::vector<Choice> choices(std::max(call.threads, 1) * call.rows);
    Product<P>(call, choices.data()).run();
    for (int64_t row = 0; row < call.rows; row++) {
        Choice& choice = choices[row];
        for (int t = 1; t < call.threads; t++) choice.add(choices[t * call.rows + row]);
        chosen[row] = choice.chosen();
        values[row] = choice.value();
    }
}

}  // namespace

// x [rows, in] -> out [rows, out_features]; with an activation [rows, out_features / 2], of the first half (the gates)
// times the second, out_features a multiple of 64. x is bf16 and in even, or for bytes of any type and size.
// All rows, or where `rows` are given those.
EXPORTED int batchinfer_multiplies() { return 1; }
EXPORTED void batchinfer_linear(const Call* call, const Rows* rows) { multiply<Pairs>(*call, rows); }
EXPORTED void batchinfer_linear_int8(const Call* call, const Rows* rows) { multiply<Fours>(*call, rows); }

// Of all rows chosen and values, both [rows]: what sampling without noise chooses from fp32 outputs. No activation.
EXPORTED void batchinfer_choose(const Call* call, int64_t* chosen, float* values) { choose<Pairs>(*call, chosen, values); }
EXPORTED void batchinfer_choose_int8(const Call* call, int64_t* chosen, float* values) {
    choose<Fours>(*call, chosen, values);
}

#else

EXPORTED int batchinfer_multiplies() { return 0; }
EXPORTED void batchinfer_linear(const void*, const void*) {}
EXPORTED void batchinfer_linear_int8(const void*, const void*) {}
EXPORTED void batchinfer_choose(const void*, int64_t*, float*) {}
EXPORTED void batchinfer_choose_int8(const void*, int64_t*, float*) {}

#endif
