// Norms, gated activation, and rotary embedding with the store into the KV cache: one pass over memory each.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "activation.h"
#include "cache.h"
#include "parallel.h"
#include "rows.h"
#include "vector.h"

namespace {

// Rows a thread takes at a time, so that handing them out costs little beside the work.
int64_t grain_of(int64_t row_elements) { return 1 + 4096 / (row_elements + 1); }

// Sums of squares of a row, four vectors side by side.
struct Squares {
    Floats sums[4] = {splat(0), splat(0), splat(0), splat(0)};

    void add(int i, Floats v) { sums[i] = fma(v, v, sums[i]); }
    float total() const { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }
};

// Calls work(i, n, j) for each vector of a row: its first element, how many are left from there on, which sum it adds to.
template <class Work>
inline void each_vector(int64_t size, const Work& work) {
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int j = 0; j < 4; j++) work(i + j * LANES, LANES, j);
    for (; i + LANES <= size; i += LANES) work(i, LANES, 0);
    if (i < size) work(i, int(size - i), 0);
}

template <class T>
inline void scale_row(const T* x, float squares, const float* weight, T* out, int64_t size, float eps) {
    Floats factor = splat(1.0f) / square_root(splat(squares / float(size) + eps));
    each_vector(size, [&](int64_t i, int n, int) {
        store_up_to(out + i, load_up_to(x + i, n) * factor * load_up_to(weight + i, n), n);
    });
}

template <class T>
void norm_row(const T* x, const float* weight, T* out, int64_t size, float eps) {
    Squares squares;
    each_vector(size, [&](int64_t i, int n, int j) { squares.add(j, load_up_to(x + i, n)); });
    scale_row(x, squares.total(), weight, out, size, eps);
}

// x [rows, size]; residual null or [rows, size]: then x is added to it and the sum normed. out may be x. weight [size].
struct Norm {
    const void* x;
    void* residual;
    const float* weight;
    void* out;
    int64_t rows, size;
    float eps;
    int32_t type, threads;
};

template <class T>
void rms_norm(const Norm& call) {
    const T* x = static_cast<const T*>(call.x);
    T *residual = static_cast<T*>(call.residual), *out = static_cast<T*>(call.out);
    const float *weight = call.weight, eps = call.eps;
    const int64_t size = call.size;
    parallel_for(call.threads, call.rows, grain_of(size), [=](int64_t row) {
        const T* in = x + row * size;
        if (!residual) return norm_row(in, weight, out + row * size, size, eps);
        T* total = residual + row * size;
        Squares squares;
        each_vector(size, [&](int64_t i, int n, int j) {
            Floats v = rounded<T>(load_up_to(in + i, n) + load_up_to(total + i, n));
            store_up_to(total + i, v, n);
            squares.add(j, v);
        });
        scale_row(total, squares.total(), weight, out + row * size, size, eps);
    });
}

// gate_up [rows, 2 * size] -> out [rows, size]; gelu: gelu_tanh in place of silu.
struct Activation {
    const void* gate_up;
    void* out;
    int64_t rows, size;
    int32_t gelu, type, threads;
};

template <class T>
void gated_activation(const Activation& call) {
    const T* gate_up = static_cast<const T*>(call.gate_up);
    T* out = static_cast<T*>(call.out);
    const int64_t size = call.size;
    const bool gelu = call.gelu != 0;
    parallel_for(call.threads, call.rows, grain_of(size), [=](int64_t row) {
        const T* gate = gate_up + row * 2 * size;
        for (int64_t i = 0; i < size; i += LANES) {
            int n = int(size - i);
            Floats g = load_up_to(gate + i, n), u = load_up_to(gate + size + i, n);
            store_up_to(out + row * size + i, activate(g, gelu) * u, n);
        }
    });
}

// qkv [rows, (heads + 2 * kv_heads) * size]: queries to q [rows, heads, size], keys and values to the cache.
struct Rotary {
    const void* qkv;
    void* q;
    const Cache* kv;
    const float* cos_sin;
    const int64_t *positions, *slots;
    const float *q_norm, *k_norm;
    int64_t rows, rotated;
    int32_t num_heads, layer;
    float eps;
    int32_t type, threads;
};

// Norm (where weight is given) and rotate one head of `size` into out.
template <class T>
void turn_head(const T* in, const float* weight, const float* cos, int64_t half, float eps, T* out, int size) {
    if (weight) {
        norm_row(in, weight, out, size, eps);
        in = out;
    }
    for (int64_t i = 0; i < half; i += LANES) {
        int n = int(half - i);
        Floats a = load_up_to(in + i, n), b = load_up_to(in + half + i, n);
        Floats c = load_up_to(cos + i, n), s = load_up_to(cos + half + i, n);
        store_up_to(out + i, a * c - b * s, n);
        store_up_to(out + half + i, b * c + a * s, n);
    }
    if (in != out)
        for (int i = int(2 * half); i < size; i++) out[i] = in[i];
}

constexpr int MOST_SIZE = 1024;  // of a head

// A head as the cache's elements, zeros up to a multiple of 16; for int8 also its scale: the largest
// magnitude is 127. What is not a number makes the scale not a number.
template <class C>
struct Stored {
    alignas(64) C elements[MOST_SIZE];
    float scale = 0;

    template <class T>
    static Floats some(const T* x, int i, int size) {
        return i < size ? load_up_to(x + i, size - i) : splat(0);
    }
    template <class T>
    void round(const T* x, int size) {
        if constexpr (std::is_same_v<C, int8_t>) {
            Floats most = splat(0), poison = splat(0);
            for (int i = 0; i < size; i += LANES) {
                Floats v = some(x, i, size);
                most = maximum(most, absolute(v));
                poison = maximum(poison, is_nan(v));
            }
            float top = largest(most);
            scale = largest(poison) > 0 ? NAN : top / 127.0f;
            Floats inverse = splat(top > 0 ? 127.0f / top : 0.0f);
            for (int i = 0; i < padded(size); i += LANES) store_bytes(elements + i, to_ints(some(x, i, size) * inverse));
        } else {
            for (int i = 0; i < padded(size); i += LANES) store(elements + i, some(x, i, size));
        }
    }
};

template <class C, class T>
void put(const T* x, bool is_key, char* tile, int offset, int size) {
    Stored<C> stored;
    const C* elements = stored.elements;
    if constexpr (std::is_same_v<C, T> && !std::is_same_v<C, BF16>) {
        elements = x;
    } else {
        stored.round(x, size);
    }
    if (is_key)
        put_key(tile, offset, elements, size);
    else
        put_value(tile, offset, padded(size), elements, size);
    if constexpr (std::is_same_v<C, int8_t>) memcpy(tile + scales_at(size) + offset * 4, &stored.scale, 4);
}

template <class T, class C>
struct RotaryStore {
    const Rotary& r;
    const T* qkv = static_cast<const T*>(r.qkv);
    T* q = static_cast<T*>(r.q);
    const Cache& kv = *r.kv;
    const int size = kv.head_size, heads = r.num_heads, kv_heads = kv.num_kv_heads;

    // A key's elements lie in as many lines as it has lanes: fetch those of a token that comes next.
    void fetch(int64_t slot) const {
        constexpr int LANE = std::is_same_v<C, FP16> ? 2 : 4;
        for (int h = 0; h < kv_heads; h++) {
            const char* keys = key_tile(kv, r.layer, slot / BLOCK, h) + slot % BLOCK * LANE;
            for (int64_t at = 0; at < scales_at(size) * int64_t(sizeof(C)); at += BLOCK * LANE)
                _mm_prefetch(keys + at, _MM_HINT_T0);
            int64_t row = int64_t(padded(size)) * 4;
            const char* values = value_tile(kv, r.layer, slot / BLOCK, h) + slot % BLOCK * int64_t(sizeof(C)) / 4 * row;
            for (int64_t at = 0; at < row; at += 64) _mm_prefetch(values + at, _MM_HINT_T0);
        }
    }

    void token(int64_t t) const {
        const T* in = qkv + t * (heads + 2 * kv_heads) * size;
        const float* cos = r.cos_sin + r.positions[t] * r.rotated;
        if (t + 1 < r.rows && r.slots[t + 1] / BLOCK != r.slots[t] / BLOCK) fetch(r.slots[t + 1]);
        for (int h = 0; h < heads; h++)
            turn_head(in + h * size, r.q_norm, cos, r.rotated / 2, r.eps, q + (t * heads + h) * size, size);
        int64_t block = r.slots[t] / BLOCK;
        int offset = int(r.slots[t] % BLOCK);
        for (int h = 0; h < kv_heads; h++) {
            T key[MOST_SIZE];
            turn_head(in + (heads + h) * size, r.k_norm, cos, r.rotated / 2, r.eps, key, size);
            put<C>(key, true, key_tile(kv, r.layer, block, h), offset, size);
            put<C>(in + (heads + kv_heads + h) * size, false, value_tile(kv, r.layer, block, h), offset, size);
        }
    }

    // The tokens of a block share lanes and lines of its tiles, so one thread stores them all.
    int64_t border(int64_t t) const {
        while (t > 0 && t < r.rows && r.slots[t] / BLOCK == r.slots[t - 1] / BLOCK) t++;
        return t;
    }

    void run() const {
        int64_t part = std::max<int64_t>(1, std::min<int64_t>(BLOCK, r.rows / (8 * r.threads)));
        parallel_for(r.threads, (r.rows + part - 1) / part, 1, [&](int64_t i) {
            int64_t end = border(std::min(r.rows, (i + 1) * part));
            for (int64_t t = border(i * part); t < end; t++) token(t);
        });
    }
};

template <class T>
void rotary_and_store(const Rotary& call) {
    if (call.kv->type == TYPE_INT8) return RotaryStore<T, int8_t>{call}.run();
    with_type(call.kv->type, [&](auto tag) { RotaryStore<T, decltype(tag)>{call}.run(); });
}

}  // namespace

// The kernels compute all rows of their call, or where `rows` are given those.
EXPORTED void batchinfer_rms_norm(const Norm* call, const Rows* rows) {
    Norm part = *call;
    if (rows) {
        int64_t before = rows->begin * call->size;
        part.x = behind(call->x, call->type, before);
        part.out = behind(call->out, call->type, before);
        if (call->residual) part.residual = behind(call->residual, call->type, before);
        part.rows = rows->count;
        part.threads = rows->threads;
    }
    with_type(call->type, [&](auto tag) { rms_norm<decltype(tag)>(part); });
}

EXPORTED void batchinfer_gated_activation(const Activation* call, const Rows* rows) {
    Activation part = *call;
    if (rows) {
        part.gate_up = behind(call->gate_up, call->type, 2 * rows->begin * call->size);
        part.out = behind(call->out, call->type, rows->begin * call->size);
        part.rows = rows->count;
        part.threads = rows->threads;
    }
    with_type(call->type, [&](auto tag) { gated_activation<decltype(tag)>(part); });
}

EXPORTED void batchinfer_rotary_and_store(const Rotary* call, const Rows* rows) {
    Rotary part = *call;
    if (rows) {
        int64_t size = call->kv->head_size, all = call->num_heads + 2 * call->kv->num_kv_heads;
        part.qkv = behind(call->qkv, call->type, rows->begin * all * size);
        part.q = behind(call->q, call->type, rows->begin * call->num_heads * size);
        part.positions = rows->positions;
        part.slots = rows->slots;
        part.rows = rows->count;
        part.threads = rows->threads;
    }
    with_type(call->type, [&](auto tag) { rotary_and_store<decltype(tag)>(part); });
}
