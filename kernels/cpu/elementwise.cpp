// Norms, gated activation, and rotary embedding with the store into the KV cache: one pass over memory each.
#include "activation.h"
#include "cache.h"
#include "parallel.h"
#include "vector.h"

namespace {

// Rows a thread takes at a time, so that handing them out costs little beside the work.
int64_t grain_of(int64_t row_elements) { return 1 + 4096 / (row_elements + 1); }

template <class T>
void norm_row(const T* x, const float* weight, T* out, int64_t size, float eps) {
    Floats squares[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            Floats v = load(x + i + j * LANES);
            squares[j] = fma(v, v, squares[j]);
        }
    for (; i < size; i += LANES) {
        Floats v = load_up_to(x + i, int(size - i));
        squares[0] = fma(v, v, squares[0]);
    }
    float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(size);
    Floats factor = splat(1.0f) / square_root(splat(mean + eps));
    for (i = 0; i < size; i += LANES) {
        int n = int(size - i);
        store_up_to(out + i, load_up_to(x + i, n) * factor * load_up_to(weight + i, n), n);
    }
}

template <class T>
void rms_norm(const T* x, const T* residual, const float* weight, T* out, T* total, int64_t rows, int64_t size, float eps,
              int threads) {
    parallel_for(threads, rows, grain_of(size), [=](int64_t row) {
        const T* in = x + row * size;
        if (residual) {
            T* to = total + row * size;
            const T* other = residual + row * size;
            for (int64_t i = 0; i < size; i += LANES) {
                int n = int(size - i);
                store_up_to(to + i, load_up_to(in + i, n) + load_up_to(other + i, n), n);
            }
            in = to;
        }
        norm_row(in, weight, out + row * size, size, eps);
    });
}

template <class T>
void gated_activation(const T* gate_up, T* out, int64_t rows, int64_t size, bool gelu, int threads) {
    parallel_for(threads, rows, grain_of(size), [=](int64_t row) {
        const T* gate = gate_up + row * 2 * size;
        for (int64_t i = 0; i < size; i += LANES) {
            int n = int(size - i);
            Floats g = load_up_to(gate + i, n), u = load_up_to(gate + size + i, n);
            store_up_to(out + row * size + i, activate(g, gelu) * u, n);
        }
    });
}

struct Rotary {
    const float* cos_sin;
    const int64_t *positions, *slots;
    const float *q_norm, *k_norm;
    int64_t tokens, rotated;
    int32_t num_heads, layer;
    float eps;
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

template <class T, class C>
void put(const T* key, const T* value, const Cache& kv, int layer, int64_t slot, int head) {
    constexpr int MOST = 1024;
    C k[MOST], v[MOST];
    for (int i = 0; i < kv.head_size; i += LANES) {
        int n = kv.head_size - i;
        store_up_to(k + i, load_up_to(key + i, n), n);
        store_up_to(v + i, load_up_to(value + i, n), n);
    }
    int64_t block = slot / BLOCK;
    int offset = int(slot % BLOCK);
    put_key(key_tile(kv, layer, block, head), offset, k, kv.head_size);
    put_value(value_tile(kv, layer, block, head), offset, padded(kv.head_size), v, kv.head_size);
}

template <class T>
void rotary_and_store(const T* qkv, T* q, const Rotary& r, const Cache& kv, int threads) {
    int size = kv.head_size, heads = r.num_heads, kv_heads = kv.num_kv_heads;
    int64_t width = int64_t(heads + 2 * kv_heads) * size;
    parallel_for(threads, r.tokens, grain_of(width), [&, size, heads, kv_heads, width](int64_t token) {
        const T* in = qkv + token * width;
        const float* cos = r.cos_sin + r.positions[token] * r.rotated;
        for (int h = 0; h < heads; h++)
            turn_head(in + h * size, r.q_norm, cos, r.rotated / 2, r.eps, q + (token * heads + h) * size, size);
        for (int h = 0; h < kv_heads; h++) {
            T key[1024];
            turn_head(in + (heads + h) * size, r.k_norm, cos, r.rotated / 2, r.eps, key, size);
            const T* value = in + (heads + kv_heads + h) * size;
            if (kv.type == TYPE_BF16)
                put<T, BF16>(key, value, kv, r.layer, r.slots[token], h);
            else if (kv.type == TYPE_FP16)
                put<T, FP16>(key, value, kv, r.layer, r.slots[token], h);
            else
                put<T, float>(key, value, kv, r.layer, r.slots[token], h);
        }
    });
}

}  // namespace

// x [rows, size]; residual null or [rows, size], then total = x + residual is written and normed. weight fp32 [size].
EXPORTED void batchinfer_rms_norm(int type, const void* x, const void* residual, const float* weight, void* out, void* total,
                         int64_t rows, int64_t size, float eps, int threads) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        rms_norm((const T*)x, (const T*)residual, weight, (T*)out, (T*)total, rows, size, eps, threads);
    });
}

// gate_up [rows, 2 * size] -> out [rows, size]; gelu: gelu_tanh in place of silu.
EXPORTED void batchinfer_gated_activation(int type, const void* gate_up, void* out, int64_t rows, int64_t size, int gelu,
                                 int threads) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        gated_activation((const T*)gate_up, (T*)out, rows, size, gelu != 0, threads);
    });
}

// qkv [tokens, (heads + 2 * kv_heads) * size]: queries to q [tokens, heads, size], keys and values to the cache.
EXPORTED void batchinfer_rotary_and_store(int type, const void* qkv, void* q, const Rotary* rotary, const Cache* kv, int threads) {
    with_type(type, [=](auto tag) {
        using T = decltype(tag);
        rotary_and_store((const T*)qkv, (T*)q, *rotary, *kv, threads);
    });
}
