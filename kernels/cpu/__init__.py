"""The operators for CPUs, in C++ behind a plain C ABI."""
