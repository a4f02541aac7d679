// Paged attention of a mixed step: prefill and decode rows alike, softmax in fp32.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cache.h"
#include "parallel.h"
#include "product.h"
#include "rows.h"
#include "schedule.h"
#include "softmax.h"
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

// What the largest number of a query is rounded to beside int8 keys: sums over 1,024 dimensions stay within 32 bits.
constexpr float QUERY_MOST = 16383;
static_assert(int64_t(QUERY_MOST) * 127 * 1024 < INT32_MAX);

template <class P>
struct Attention {
    const Call& call;
    const Cache& kv;
    Schedule& schedule;
    const int group, size, wide, key_steps, value_steps;
    static constexpr bool PAIRS = P::ELEMENTS == 2 && P::PER_STEP == 1;  // rows hold bf16 pairs
    static constexpr bool WHOLE = P::ELEMENTS == 4;                      // rows hold int16, the cache int8
    static constexpr int AHEAD = WHOLE ? 4 : 2;  // tiles that are fetched before one is read
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
                Floats inverse = splat(0);
                if constexpr (WHOLE) {
                    Floats most = splat(0), poison = splat(0);
                    for (int i = 0; i < size; i += LANES) {
                        Floats x = load_up_to(in + i, size - i);
                        most = maximum(most, absolute(x));
                        poison = maximum(poison, is_nan(x));
                    }
                    float top = largest(most);
                    // Behind the row's numbers; rounded they would hide what is not a number.
                    rows[wide / 2] = largest(poison) > 0 ? NAN : top / QUERY_MOST;
                    inverse = splat(top > 0 ? QUERY_MOST / top : 0);
                }
                for (int i = 0; i < wide; i += LANES) {
                    int n = size - i;
                    Floats x = n <= 0 ? splat(0) : load_up_to(in + i, n);
                    if constexpr (WHOLE)
                        store_words(reinterpret_cast<int16_t*>(rows) + i, to_ints(x * inverse));
                    else if constexpr (PAIRS)
                        store(reinterpret_cast<BF16*>(rows) + i, x);
                    else
                        store(rows + i, x);
                }
            }
    }

    // The blocks [first, last) of a split that queries at positions bottom to top see something of.
    struct Blocks {
        int first, last;
    };
    Blocks seen(int split, int bottom, int top) const {
        int before = split * SPLIT;
        int last = top < before ? 0 : std::min(SPLIT_BLOCKS, (top - before) / BLOCK + 1);
        return {call.window > 0 ? std::max(0, (bottom - call.window + 1 - before) / BLOCK) : 0, last};
    }

    // Up to `room` of a split's tiles in the order in which they are read, keys, then values; returns how many.
    int read_order(const Tile& tile, int head, int split, Blocks blocks, const char** out, int room) const {
        const int32_t* table = schedule.tables.data() + tile.sequence * schedule.max_blocks + split * SPLIT_BLOCKS;
        int count = 0;
        for (int b = blocks.first; b < blocks.last && count < room; b++)
            out[count++] = key_tile(kv, call.layer, table[b], head);
        for (int b = blocks.first; b < blocks.last && count < room; b++)
            out[count++] = value_tile(kv, call.layer, table[b], head);
        return count;
    }

    // What is read after split s of a head: the rest of its splits, the next head, the next tile.
    void following(const Tile* tile, const Tile* end, int head, int s, const char** out) const {
        int count = 0;
        for (s++; count < AHEAD; s = first_split(*tile)) {
            for (; s < last_split(*tile) && count < AHEAD; s++)
                count += read_order(*tile, head, s, seen(s, tile->lowest, tile->highest), out + count, AHEAD - count);
            if (++head == kv.num_kv_heads) {
                head = 0;
                if (++tile == end) break;
            }
        }
        for (; count < AHEAD; count++) out[count] = count > 0 ? out[count - 1] : key_tile(kv, call.layer, 0, 0);
    }

    // Rows [begin, begin + count) of a tile over one split: their largest scores, sums and values, to part. Meanwhile
    // the tiles `after` are fetched.
    void split_rows(const Tile& tile, int head, int split, const float* rows, int begin, int count,
                    const char* const* after, const State& part) const {
        alignas(64) float scores[ROWS * SPLIT], weights[ROWS * SPLIT];
        const char* tiles[2 * SPLIT_BLOCKS + AHEAD];
        int first_token = split * SPLIT;
        int top = schedule.positions[tile.token_begin + begin / group], bottom = top;
        for (int t = begin / group + 1; t <= (begin + count - 1) / group; t++) {
            int position = schedule.positions[tile.token_begin + t];
            top = std::max(top, position);
            bottom = std::min(bottom, position);
        }
        auto [first, last] = seen(split, bottom, top);
        std::fill(part.largest, part.largest + count, -INFINITY);
        if (first >= last) return;
        int used = last - first;
        std::copy(after, after + AHEAD, tiles + read_order(tile, head, split, {first, last}, tiles, 2 * used));
        multiply_keys<P>(count, rows + begin * wide, wide, tiles, used, tiles + AHEAD, key_steps, scores + first * BLOCK,
                         SPLIT);
        float units[ROWS];
        for (int r = 0; r < count; r++) {
            int position = schedule.positions[tile.token_begin + (begin + r) / group];
            int high = position + 1 - first_token;
            int low = call.window > 0 ? position - call.window + 1 - first_token : 0;
            float *of = scores + r * SPLIT, *to = weights + r * SPLIT;
            if constexpr (WHOLE) scale_scores(of, tiles, size, first, last, rows[(begin + r) * wide + wide / 2]);
            part.largest[r] = softmax<PAIRS>(of, WHOLE ? of : to, first, last, low, high, call.scale, call.soft_cap,
                                             part.sum + r);
            if constexpr (WHOLE) units[r] = whole_weights(of, to, tiles + used, size, first, last);
        }
        int skip = first * BLOCK / (PAIRS || WHOLE ? 2 : 1);
        multiply_values<P>(count, wide / LANES, weights + skip, SPLIT, tiles + used, used, tiles + used + AHEAD,
                           value_steps, part.values, wide);
        for (int i = 0; WHOLE && i < count * wide; i += LANES)
            store(part.values + i, to_floats(load_ints(part.values + i)) * splat(units[i / wide]));
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
                    store_up_to(to + i, load(state.values + r * wide + i) * factor, size - i);
            }
    }

    // `end`: the end of the tiles that this thread goes on with.
    void run_tile(const Tile& tile, const Tile* end, int head, Scratch& scratch) const {
        int rows = (tile.token_end - tile.token_begin) * group;
        float* queries = scratch.take(size_t(rows + ROWS) * (wide + 2) + size_t(rows) * wide);
        State state{queries + rows * wide, queries + rows * wide + rows, queries + rows * (wide + 2)};
        State part{state.values + rows * wide, state.values + rows * wide + ROWS, state.values + rows * wide + 2 * ROWS};
        gather(tile, head, queries);
        if (!tile.resumes) state.clear(rows, wide);
        for (int r = 0; tile.resumes && r < rows; r++) {
            const float* from = state_of(schedule.tokens[tile.token_begin + r / group], head * group + r % group);
            state.largest[r] = from[0];
            state.sum[r] = from[1];
            memcpy(state.values + r * wide, from + 2, wide * sizeof(float));
        }
        const char* after[AHEAD];
        for (int s = first_split(tile); s < last_split(tile); s++) {
            following(&tile, end, head, s, after);
            for (int begin = 0; begin < rows; begin += ROWS) {
                int count = std::min(ROWS, rows - begin);
                split_rows(tile, head, s, queries, begin, count, after, part);
                fold(count, state.from(begin, wide), part.largest, part.sum, part.values, wide);
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
        grow(schedule.partials, floats);
        parallel_for(call.threads, int64_t(items.size()), 1, [&](int64_t i) {
            const Item& item = items[i];
            int rows = (item.tile->token_end - item.tile->token_begin) * group;
            float* queries = scratch().take(size_t(rows) * wide);
            float* partial = schedule.partials.data() + item.partial;
            gather(*item.tile, item.head, queries);
            const char* after[AHEAD];
            following(item.tile, item.tile + 1, item.head, item.split, after);
            State part{partial, partial + rows, partial + 2 * rows};
            for (int begin = 0; begin < rows; begin += ROWS)
                split_rows(*item.tile, item.head, item.split, queries, begin, std::min(ROWS, rows - begin), after,
                           part.from(begin, wide));
        });
        parallel_for(call.threads, int64_t(begins.size()) - 1, 1, [&](int64_t i) {
            const Item& item = items[begins[i]];
            int rows = (item.tile->token_end - item.tile->token_begin) * group;
            float* memory = scratch().take(size_t(rows) * state_floats());
            State state{memory, memory + rows, memory + 2 * rows};
            state.clear(rows, wide);
            for (size_t j = begins[i]; j < begins[i + 1]; j++) {
                const float* partial = schedule.partials.data() + items[j].partial;
                for (int begin = 0; begin < rows; begin += ROWS)
                    fold(std::min(ROWS, rows - begin), state.from(begin, wide), partial + begin, partial + rows + begin,
                         partial + 2 * rows + begin * wide, wide);
            }
            finish(*item.tile, item.head, state);
        });
    }

    // One thread does it, while the others wait.
    void grow(std::vector<float>& memory, size_t floats) const {
        parallel_for(call.threads, 1, 1, [&](int64_t) {
            if (memory.size() < floats) memory.resize(floats);
        });
    }

    static Scratch& scratch() {
        thread_local Scratch memory;
        return memory;
    }

    void run() const {
        if (schedule.phases.size() > 1)
            grow(schedule.states, size_t(schedule.total_tokens) * call.num_heads * state_floats());
        int heads = kv.num_kv_heads;
        for (auto& tiles : schedule.phases) {
            int64_t items = int64_t(tiles.size()) * heads;
            if (schedule.phases.size() == 1 && call.threads > 1 && items < 4 * call.threads) {
                run_by_splits(tiles);
                continue;
            }
            // Heads of a block are neighbours: a thread reads them in turn where there are tiles enough, and knows what
            // it reads next where there are more.
            int64_t count = int64_t(tiles.size()), together = call.threads > 1 ? std::max<int64_t>(1, count / (16 * call.threads)) : count;
            int64_t grain = count >= 4 * call.threads ? together * heads : 1;
            parallel_for(call.threads, items, grain, [&](int64_t i) {
                int64_t t = i / heads, end = grain == 1 ? t + 1 : std::min(count, (t / together + 1) * together);
                run_tile(tiles[t], tiles.data() + end, int(i % heads), scratch());
            });
        }
    }
};

void attend(const Call& call) {
    if (call.kv->type == TYPE_INT8) return Attention<WordsTimesFours>(call).run();
    if (call.kv->type == TYPE_FP32) return Attention<FloatsTimes<float>>(call).run();
    if (call.kv->type == TYPE_FP16) return Attention<FloatsTimes<FP16>>(call).run();
#if defined(__AVX512BF16__)
    if (call.type == TYPE_BF16) return Attention<PairsTimesPairs>(call).run();
#endif
    Attention<FloatsTimesPairs>(call).run();
}

}  // namespace

// q and out [tokens, num_heads, head_size]: all tokens, or where `rows` are given those.
EXPORTED void batchinfer_attention(const Call* call, const Rows* rows) {
    Call part = *call;
    if (rows) {
        int64_t before = rows->begin * call->num_heads * call->kv->head_size;
        part.q = behind(call->q, call->type, before);
        part.out = behind(call->out, call->type, before);
        part.schedule = rows->schedule;
        part.threads = rows->threads;
    }
    attend(part);
}
