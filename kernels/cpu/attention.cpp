// Paged attention of a mixed step: prefill and decode rows alike, softmax in fp32.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cache.h"
#include "parallel.h"
#include "product.h"
#include "schedule.h"
#include "vector.h"

namespace {

struct Call {
    const void* q;
    void* out;
    const Cache* kv;
    Schedule* schedule;
    float scale, soft_cap;
    int32_t type, layer, num_heads, window, threads;  // type: of the elements of q and out
};

// Running softmax of a row: the largest score, the sum of exponentials, and the weighted sum of values.
struct State {
    float *largest, *sum, *values;
    int stride;
};

// Memory of one thread, kept between calls.
struct Scratch {
    std::unique_ptr<float, decltype(&free)> memory{nullptr, free};
    size_t size = 0;
    float* take(size_t floats) {
        if (floats > size) {
            memory.reset(static_cast<float*>(aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
            size = floats;
        }
        return memory.get();
    }
};

// Fold the result of one split into a row's state. A split in which the row sees nothing changes nothing.
inline void fold(float* largest, float* sum, float* values, float largest2, float sum2, const float* values2, int size) {
    if (largest2 == -INFINITY) return;
    if (*largest == -INFINITY) {
        *largest = largest2;
        *sum = sum2;
        memcpy(values, values2, size * sizeof(float));
        return;
    }
    float both[LANES] = {};
    float m = std::max(*largest, largest2);
    both[0] = *largest - m;
    both[1] = largest2 - m;
    store(both, exponential(load(both)));
    *largest = m;
    *sum = *sum * both[0] + sum2 * both[1];
    Floats a = splat(both[0]), b = splat(both[1]);
    for (int i = 0; i < size; i += LANES) store(values + i, fma(load(values + i), a, load(values2 + i) * b));
}

template <class P>
struct Attention {
    const Call& call;
    const Cache& kv;
    Schedule& schedule;
    const int group, size, wide, key_steps, value_steps;
    static constexpr bool PAIRS = P::ELEMENTS == 2 && P::PER_STEP == 1;  // rows hold bf16 pairs
    static constexpr int ELEMENT = int(sizeof(typename P::Element));

    explicit Attention(const Call& c)
        : call(c), kv(*c.kv), schedule(*c.schedule), group(c.num_heads / c.kv->num_kv_heads), size(c.kv->head_size),
          wide(padded(size)), key_steps(wide / P::ELEMENTS), value_steps(BLOCK / P::ELEMENTS) {}

    int state_floats() const { return wide + 2; }

    // The queries of a tile's rows (token by token, head by head), padded, as multiply() reads them.
    void gather(const Tile& tile, int head, float* rows) const {
        with_type(call.type, [&](auto tag) { gather_as<decltype(tag)>(tile, head, rows); });
    }
    template <class T>
    void gather_as(const Tile& tile, int head, float* rows) const {
        for (int t = tile.token_begin; t < tile.token_end; t++)
            for (int g = 0; g < group; g++, rows += wide) {
                const T* in = static_cast<const T*>(call.q) +
                              (int64_t(schedule.tokens[t]) * call.num_heads + head * group + g) * size;
                for (int i = 0; i < wide; i += LANES) {
                    int n = size - i;
                    Floats x = n <= 0 ? splat(0) : load_up_to(in + i, n);
                    if constexpr (PAIRS)
                        store(reinterpret_cast<BF16*>(rows) + i, x);
                    else
                        store(rows + i, x);
                }
            }
    }

    // Rows [begin, begin + count) of a tile over one split: their largest scores, sums and values.
    void split_rows(const Tile& tile, int head, int split, const float* rows, int begin, int count,
                    const char* after, float* largest_of, float* sum_of, float* values) const {
        alignas(64) float scores[ROWS * SPLIT], weights[ROWS * SPLIT];
        const char *keys[SPLIT_BLOCKS], *vals[SPLIT_BLOCKS];
        int first_token = split * SPLIT;
        int top = 0, bottom = INT32_MAX;
        for (int r = begin; r < begin + count; r++) {
            int position = schedule.positions[tile.token_begin + r / group];
            top = std::max(top, position);
            bottom = std::min(bottom, position);
        }
        int blocks = std::min(SPLIT_BLOCKS, (top - first_token) / BLOCK + 1);
        int skipped = 0;  // blocks that lie before every row's window
        if (call.window > 0) skipped = std::max(0, (bottom - call.window + 1 - first_token) / BLOCK);
        for (int r = 0; r < count; r++) largest_of[r] = -INFINITY, sum_of[r] = 0;
        if (top < first_token || skipped >= blocks) return;
        const int32_t* table = schedule.tables.data() + tile.sequence * schedule.max_blocks + split * SPLIT_BLOCKS;
        for (int b = skipped; b < blocks; b++) {
            keys[b] = key_tile(kv, call.layer, table[b], head);
            vals[b] = keys[b] + tile_bytes(kv);
        }
        for (int b = skipped; b < blocks; b++)
            multiply_all<P>(count, BLOCK / LANES, rows + begin * wide, wide, keys + b, 1,
                            b + 1 < blocks ? keys[b + 1] : vals[skipped], key_steps,
                            BLOCK * ELEMENT * P::ELEMENTS, scores + b * BLOCK, SPLIT);
        for (int r = 0; r < count; r++) {
            int position = schedule.positions[tile.token_begin + (begin + r) / group];
            int high = position + 1 - first_token;
            int low = call.window > 0 ? position - call.window + 1 - first_token : 0;
            float* row = scores + r * SPLIT;
            Floats most = splat(-INFINITY);
            Floats scale = splat(call.scale), cap = splat(call.soft_cap);
            for (int i = skipped * BLOCK; i < blocks * BLOCK; i += LANES) {
                Floats s = load(row + i) * scale;
                if (call.soft_cap > 0) s = cap * hyperbolic_tangent(s / cap);
                s = within(s, splat(-INFINITY), add_int(iota(), splat_int(i)), low, high);
                store(row + i, s);
                most = maximum(most, s);
            }
            float m = largest(most);
            largest_of[r] = m;
            Floats base = splat(m == -INFINITY ? 0 : m), total = splat(0);
            float* to = weights + r * SPLIT;
            for (int i = skipped * BLOCK; i < blocks * BLOCK; i += LANES) {
                Floats p = exponential(load(row + i) - base);
                total = total + p;
                if constexpr (PAIRS)
                    store(reinterpret_cast<BF16*>(to) + i, p);
                else
                    store(to + i, p);
            }
            sum_of[r] = sum(total);
        }
        int value_row = wide * ELEMENT * P::ELEMENTS;
        int skip = skipped * BLOCK / (PAIRS ? 2 : 1);
        multiply_all<P>(count, wide / LANES, weights + skip, SPLIT, vals + skipped, blocks - skipped, after, value_steps,
                        value_row, values, wide);
    }

    int first_split(const Tile& tile) const {
        int before = call.window > 0 ? std::max(0, tile.lowest - call.window + 1) / SPLIT : 0;
        return std::max(tile.first, before);
    }
    int last_split(const Tile& tile) const { return std::min(tile.last, tile.highest / SPLIT + 1); }

    float* state_of(int token, int head) const {
        return schedule.states.data() + (int64_t(token) * call.num_heads + head) * state_floats();
    }

    void finish(const Tile& tile, int head, const State& state) const {
        with_type(call.type, [&](auto tag) { finish_as<decltype(tag)>(tile, head, state); });
    }
    template <class T>
    void finish_as(const Tile& tile, int head, const State& state) const {
        int r = 0;
        for (int t = tile.token_begin; t < tile.token_end; t++)
            for (int g = 0; g < group; g++, r++) {
                int64_t row = int64_t(schedule.tokens[t]) * call.num_heads + head * group + g;
                T* to = static_cast<T*>(call.out) + row * size;
                Floats factor = splat(1.0f / state.sum[r]);
                for (int i = 0; i < size; i += LANES)
                    store_up_to(to + i, load(state.values + r * state.stride + i) * factor, size - i);
            }
    }

    void run_tile(const Tile& tile, int head, Scratch& scratch) const {
        int rows = (tile.token_end - tile.token_begin) * group;
        float* queries = scratch.take(size_t(rows) * (2 * wide + 2) + ROWS * (wide + 2) + 64);
        State state{queries + rows * wide, queries + rows * wide + rows, nullptr, wide};
        float* largest2 = state.sum + rows;
        float* sum2 = largest2 + ROWS;
        float* values2 = sum2 + ROWS;
        state.values = values2 + ROWS * wide;
        gather(tile, head, queries);
        for (int r = 0; r < rows; r++) {
            state.largest[r] = -INFINITY;
            state.sum[r] = 0;
            if (tile.resumes) {
                const float* from = state_of(schedule.tokens[tile.token_begin + r / group], head * group + r % group);
                state.largest[r] = from[0];
                state.sum[r] = from[1];
                memcpy(state.values + r * wide, from + 2, wide * sizeof(float));
            }
        }
        int last = last_split(tile);
        for (int s = first_split(tile); s < last; s++) {
            for (int begin = 0; begin < rows; begin += ROWS) {
                int count = std::min(ROWS, rows - begin);
                split_rows(tile, head, s, queries, begin, count, following(tile, head, s, last), largest2, sum2, values2);
                for (int r = 0; r < count; r++)
                    fold(state.largest + begin + r, state.sum + begin + r, state.values + (begin + r) * wide, largest2[r],
                         sum2[r], values2 + r * wide, wide);
            }
        }
        if (tile.finishes) return finish(tile, head, state);
        for (int r = 0; r < rows; r++) {
            float* to = state_of(schedule.tokens[tile.token_begin + r / group], head * group + r % group);
            to[0] = state.largest[r];
            to[1] = state.sum[r];
            memcpy(to + 2, state.values + r * wide, wide * sizeof(float));
        }
    }

    // The tile of the cache that is read after split s of a head: the next split's, or the next head's first.
    const char* following(const Tile& tile, int head, int s, int last) const {
        const int32_t* table = schedule.tables.data() + tile.sequence * schedule.max_blocks;
        if (s + 1 < last) return key_tile(kv, call.layer, table[(s + 1) * SPLIT_BLOCKS], head);
        int next = head + 1 < kv.num_kv_heads ? head + 1 : head;
        return key_tile(kv, call.layer, table[first_split(tile) * SPLIT_BLOCKS], next);
    }

    // With fewer tiles than would keep the threads busy each split is an item of its own, folded afterwards.
    void run_by_splits(const std::vector<Tile>& tiles) const {
        struct Item {
            const Tile* tile;
            int head, split;
            size_t partial;  // where its result lies: largest scores, sums, values
        };
        std::vector<Item> items;
        std::vector<size_t> begins;  // the first item of each tile and head
        size_t floats = 0;
        for (auto& tile : tiles) {
            size_t rows = size_t(tile.token_end - tile.token_begin) * group;
            for (int h = 0; h < kv.num_kv_heads; h++) {
                begins.push_back(items.size());
                for (int s = first_split(tile); s < last_split(tile); s++, floats += rows * state_floats())
                    items.push_back({&tile, h, s, floats});
            }
        }
        begins.push_back(items.size());
        if (schedule.partials.size() < floats) schedule.partials.resize(floats);
        parallel_for(call.threads, int64_t(items.size()), 1, [&](int64_t i) {
            const Item& item = items[i];
            int rows = (item.tile->token_end - item.tile->token_begin) * group;
            float* queries = scratch().take(size_t(rows) * wide);
            float* partial = schedule.partials.data() + item.partial;
            gather(*item.tile, item.head, queries);
            const char* after = following(*item.tile, item.head, item.split, item.split);
            for (int begin = 0; begin < rows; begin += ROWS)
                split_rows(*item.tile, item.head, item.split, queries, begin, std::min(ROWS, rows - begin), after,
                           partial + begin, partial + rows + begin, partial + 2 * rows + begin * wide);
        });
        parallel_for(call.threads, int64_t(begins.size()) - 1, 1, [&](int64_t i) {
            const Item& item = items[begins[i]];
            int rows = (item.tile->token_end - item.tile->token_begin) * group;
            State state{scratch().take(size_t(rows) * state_floats()), nullptr, nullptr, wide};
            state.sum = state.largest + rows;
            state.values = state.sum + rows;
            for (int r = 0; r < rows; r++) state.largest[r] = -INFINITY;
            for (size_t j = begins[i]; j < begins[i + 1]; j++) {
                const float* partial = schedule.partials.data() + items[j].partial;
                for (int r = 0; r < rows; r++)
                    fold(state.largest + r, state.sum + r, state.values + r * wide, partial[r], partial[rows + r],
                         partial + 2 * rows + r * wide, wide);
            }
            finish(*item.tile, item.head, state);
        });
    }

    static Scratch& scratch() {
        thread_local Scratch memory;
        return memory;
    }

    void run() const {
        if (schedule.phases.size() > 1)
            schedule.states.resize(size_t(schedule.total_tokens) * call.num_heads * state_floats());
        int heads = kv.num_kv_heads;
        for (auto& tiles : schedule.phases) {
            int64_t items = int64_t(tiles.size()) * heads;
            if (schedule.phases.size() == 1 && call.threads > 1 && items < 4 * call.threads) {
                run_by_splits(tiles);
                continue;
            }
            // Heads of a block are neighbours: a thread reads them in turn where there are tiles enough.
            int64_t grain = int64_t(tiles.size()) >= 4 * call.threads ? heads : 1;
            parallel_for(call.threads, items, grain,
                         [&](int64_t i) { run_tile(tiles[i / heads], int(i % heads), scratch()); });
        }
    }
};

}  // namespace

// q and out [tokens, num_heads, head_size].
EXPORTED void batchinfer_attention(const Call* call) {
    if (call->kv->type == TYPE_FP32) return Attention<FloatsTimes<float>>(*call).run();
    if (call->kv->type == TYPE_FP16) return Attention<FloatsTimes<FP16>>(*call).run();
#if defined(__AVX512BF16__)
    if (call->type == TYPE_BF16) return Attention<PairsTimesPairs>(*call).run();
#endif
    Attention<FloatsTimesPairs>(*call).run();
}
