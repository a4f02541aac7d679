// What int8 products need of a row of activations beside its bytes.
#pragma once
#include <cstdint>

// A clipped value: its place in the row, and what lies beyond the clip.
struct Rest {
    int32_t place;
    float value;
};
