// What attention computes in one step, worked out once and used by every layer.
//
// Contexts are cut into splits of 128 tokens at fixed positions. Each row (a query token's head) folds the splits it sees
// into its state from the left, with one arithmetic wherever that happens: alone, beside rows of other sequences that
// read the same blocks, or from partial results of other threads. So a row's result depends on nothing but its own
// sequence, to the bit.
#pragma once
#include <cstdint>
#include <vector>

#include "cache.h"

constexpr int SPLIT_BLOCKS = 4;
constexpr int SPLIT = SPLIT_BLOCKS * BLOCK;
constexpr int TILE_ROWS = 96;  // rows that read one split while it is in the nearest cache

struct Batch {
    const int32_t *query_starts, *context_lens, *block_tables;
    int64_t max_blocks;
    int32_t sequences, group;  // group: query heads of a KV head
};

// Query tokens (in the packed step) that fold splits [first, last) of one sequence of blocks into their states.
struct Tile {
    int32_t token_begin, token_end;  // in Schedule::tokens
    int32_t first, last;
    int32_t sequence;            // whose block table names the blocks
    int32_t lowest, highest;     // positions of the tokens
    bool resumes, finishes;      // whether states come from, or go to, Schedule::states
};

struct Schedule {
    std::vector<int32_t> tokens, positions;
    // Tiles of a phase are independent; a phase resumes from the states that earlier ones left.
    std::vector<std::vector<Tile>> phases;
    std::vector<float> states, partials;
    int32_t total_tokens;
    std::vector<int32_t> tables;
    int64_t max_blocks;
};

inline int splits_of(int context) { return (context + SPLIT - 1) / SPLIT; }
Schedule* make_schedule(const Batch& batch);
