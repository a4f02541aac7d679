// The paged KV cache: where an element of a key or a value lies.
//
// Layer by layer, block by block, KV head by KV head: a tile of keys, then a tile of values, 32 tokens each. Head sizes
// are padded with zeros to a multiple of 16. A key tile runs over tokens fastest, a value tile over dimensions, so that
// scores fill the lanes with tokens and outputs with dimensions, and neither needs a sum across lanes. In bf16 two
// neighbours of the summed axis lie side by side, as the bf16 dot product takes them:
//     bf16 keys [D / 2][32][2], values [32 / 2][D][2];   fp32 and fp16 keys [D][32], values [32][D].
#pragma once
#include <cstdint>

#include "vector.h"

constexpr int BLOCK = 32;

struct Cache {
    char* data;
    int64_t num_blocks;
    int32_t num_layers, num_kv_heads, head_size, type;
};

inline int padded(int head_size) { return (head_size + 15) / 16 * 16; }
inline int64_t tile_bytes(const Cache& kv) {
    return int64_t(padded(kv.head_size)) * BLOCK * (kv.type == TYPE_FP32 ? 4 : 2);
}
inline char* key_tile(const Cache& kv, int layer, int64_t block, int head) {
    return kv.data + ((layer * kv.num_blocks + block) * kv.num_kv_heads + head) * 2 * tile_bytes(kv);
}
inline char* value_tile(const Cache& kv, int layer, int64_t block, int head) {
    return key_tile(kv, layer, block, head) + tile_bytes(kv);
}

template <class T>
inline void put_key(char* tile, int offset, const T* key, int head_size) {
    T* out = reinterpret_cast<T*>(tile) + offset;
    for (int d = 0; d < head_size; d++) out[d * BLOCK] = key[d];
}
template <>
inline void put_key<BF16>(char* tile, int offset, const BF16* key, int head_size) {
    uint32_t* out = reinterpret_cast<uint32_t*>(tile) + offset;
    for (int d = 0; d + 1 < head_size; d += 2) memcpy(out + d / 2 * BLOCK, key + d, 4);
}
template <class T>
inline void put_value(char* tile, int offset, int size, const T* value, int head_size) {
    memcpy(reinterpret_cast<T*>(tile) + offset * size, value, head_size * sizeof(T));
}
template <>
inline void put_value<BF16>(char* tile, int offset, int size, const BF16* value, int head_size) {
    BF16* out = reinterpret_cast<BF16*>(tile) + offset / 2 * 2 * size + offset % 2;
    for (int d = 0; d < head_size; d++) out[2 * d] = value[d];
}
