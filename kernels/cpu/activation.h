// The activations of gated feed-forward blocks.
#pragma once
#include "vector.h"

inline Floats silu(Floats x) { return x / (splat(1.0f) + exponential(splat(0.0f) - x)); }
inline Floats gelu_tanh(Floats x) {
    Floats inner = splat(0.7978845608028654f) * fma(splat(0.044715f) * x * x, x, x);
    return splat(0.5f) * x * (splat(1.0f) + hyperbolic_tangent(inner));
}
inline Floats activate(Floats x, bool gelu) { return gelu ? gelu_tanh(x) : silu(x); }
