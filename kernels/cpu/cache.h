// The paged KV cache: where an element of a key or a value lies.
//
// Layer by layer, block by block, KV head by KV head: a tile of keys, then a tile of values, 32 tokens each. Head sizes
// are padded with zeros to a multiple of 16. A key tile runs over tokens fastest, a value tile over dimensions, so that
// scores fill the lanes with tokens and outputs with dimensions, and neither needs a sum across lanes. In bf16 two
// neighbours of the summed axis lie side by side, as the bf16 dot product takes them:
//     bf16 keys [D / 2][32][2], values [32 / 2][D][2];   fp32 and fp16 keys [D][32], values [32][D].
// In int8 four neighbours lie side by side, in the order 0 2 1 3: the even bytes of a lane are two neighbours, the odd
// bytes the next two, as products of 16 bits take them. Behind a tile stand its tokens' scales, fp32 [32]:
//     int8 keys [D / 4][32][4], values [32 / 4][D][4].
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
inline int64_t scales_at(int head_size) { return int64_t(padded(head_size)) * BLOCK; }  // in an int8 tile
inline int64_t tile_bytes(const Cache& kv) {
    int64_t elements = int64_t(padded(kv.head_size)) * BLOCK;
    if (kv.type == TYPE_INT8) return elements + BLOCK * 4;
    return elements * (kv.type == TYPE_FP32 ? 4 : 2);
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
// The four bytes of a lane in their order there.
inline uint32_t in_lane(uint32_t x) { return (x & 0xff0000ff) | (x >> 8 & 0xff00) | (x << 8 & 0xff0000); }
// Numbers of a key of int8, zeros up to a multiple of 4.
template <>
inline void put_key<int8_t>(char* tile, int offset, const int8_t* key, int head_size) {
    uint32_t* out = reinterpret_cast<uint32_t*>(tile) + offset;
    for (int d = 0; d < head_size; d += 4) {
        uint32_t four;
        memcpy(&four, key + d, 4);
        out[d / 4 * BLOCK] = in_lane(four);
    }
}

// Elements of a value go into their lanes beside those of its neighbours. Values are readable up to a multiple of 16
// elements.
template <class T>
inline void put_value(char* tile, int offset, int size, const T* value, int head_size) {
    memcpy(reinterpret_cast<T*>(tile) + offset * size, value, head_size * sizeof(T));
}
inline void put_lanes(char* lanes, Ints x, int mask) {
    store_ints(lanes, or_int(and_int(load_ints(lanes), splat_int(~mask)), x));
}
template <>
inline void put_value<BF16>(char* tile, int offset, int size, const BF16* value, int) {
    char* out = tile + offset / 2 * size * 4;
    for (int d = 0; d < size; d += LANES) {
        Ints x = load_words(value + d);
        if (offset % 2)
            put_lanes(out + 4 * d, shift_left<16>(x), int(0xffff0000));
        else
            put_lanes(out + 4 * d, x, 0xffff);
    }
}
template <>
inline void put_value<int8_t>(char* tile, int offset, int size, const int8_t* value, int) {
    char* out = tile + offset / 4 * size * 4;
    int place = offset % 4 == 1 ? 2 : offset % 4 == 2 ? 1 : offset % 4;
    for (int d = 0; d < size; d += LANES) {
        Ints x = load_bytes(value + d);
        if (place == 0) put_lanes(out + 4 * d, x, 0xff);
        if (place == 1) put_lanes(out + 4 * d, shift_left<8>(x), 0xff00);
        if (place == 2) put_lanes(out + 4 * d, shift_left<16>(x), 0xff0000);
        if (place == 3) put_lanes(out + 4 * d, shift_left<24>(x), int(0xff000000));
    }
}
