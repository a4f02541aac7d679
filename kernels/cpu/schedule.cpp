// Cuts a step's attention into tiles, and finds the sequences that share their leading blocks.
#include "schedule.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace {

struct Planner {
    const Batch& batch;
    Schedule& schedule;
    int tile_tokens;
    std::vector<int> begun;  // splits of each sequence that shared tiles have folded already

    int queries(int i) const { return batch.query_starts[i + 1] - batch.query_starts[i]; }
    int start(int i) const { return batch.context_lens[i] - queries(i); }
    const int32_t* split(int i, int s) const {
        return batch.block_tables + i * batch.max_blocks + int64_t(s) * SPLIT_BLOCKS;
    }

    void add(size_t phase, const std::vector<int>& members, int first, int last, bool finishes) {
        if (schedule.phases.size() <= phase) schedule.phases.resize(phase + 1);
        Tile tile{};
        auto close = [&] {
            tile.token_end = int32_t(schedule.tokens.size());
            if (tile.token_end > tile.token_begin) schedule.phases[phase].push_back(tile);
        };
        auto open = [&] {
            tile.token_begin = int32_t(schedule.tokens.size());
            tile.lowest = INT32_MAX;
            tile.highest = 0;
        };
        tile.first = first;
        tile.sequence = members[0];
        tile.resumes = first > 0;
        tile.finishes = finishes;
        tile.last = last;
        open();
        for (int i : members)
            for (int j = 0; j < queries(i); j++) {
                if (int(schedule.tokens.size()) - tile.token_begin == tile_tokens) {
                    close();
                    open();
                }
                int position = start(i) + j;
                schedule.tokens.push_back(batch.query_starts[i] + j);
                schedule.positions.push_back(position);
                tile.lowest = std::min(tile.lowest, position);
                tile.highest = std::max(tile.highest, position);
            }
        close();
    }

    // Members read the same blocks in the splits before `first`; those that go on together share tiles.
    void share(const std::vector<int>& members, int first, size_t phase) {
        std::vector<std::vector<int>> groups{members};
        int last = first;
        for (;; last++) {
            std::map<std::vector<int32_t>, std::vector<int>> buckets;
            for (int i : members)
                if (start(i) >= (last + 1) * SPLIT)
                    buckets[{split(i, last), split(i, last) + SPLIT_BLOCKS}].push_back(i);
            if (buckets.size() == 1 && buckets.begin()->second.size() == members.size()) continue;
            groups.clear();
            for (auto& bucket : buckets) groups.push_back(bucket.second);
            break;
        }
        if (last > first) {
            add(phase, members, first, last, false);
            for (int i : members) begun[i] = last;
            phase++;
        }
        for (auto& group : groups)
            if (group.size() > 1) share(group, last, phase);
    }
};

}  // namespace

Schedule* make_schedule(const Batch& batch) {
    auto* schedule = new Schedule;
    int tile_tokens = std::max(1, TILE_ROWS / batch.group);
    Planner planner{batch, *schedule, tile_tokens, std::vector<int>(batch.sequences, 0)};
    // Sequences that fill tiles by themselves gain nothing by sharing.
    std::vector<int> candidates;
    for (int i = 0; i < batch.sequences; i++)
        if (2 * planner.queries(i) <= tile_tokens && planner.start(i) >= SPLIT) candidates.push_back(i);
    if (candidates.size() > 1) planner.share(candidates, 0, 0);
    size_t phase = schedule->phases.size();
    for (int i = 0; i < batch.sequences; i++)
        planner.add(phase, {i}, planner.begun[i], splits_of(batch.context_lens[i]), true);
    // The longest work first, so that threads end together.
    auto cost = [](const Tile& t) { return int64_t(t.token_end - t.token_begin) * (t.highest + 1 - t.first * SPLIT); };
    std::stable_sort(schedule->phases[phase].begin(), schedule->phases[phase].end(),
                     [&](const Tile& a, const Tile& b) { return cost(a) > cost(b); });
    schedule->total_tokens = batch.query_starts[batch.sequences];
    schedule->max_blocks = batch.max_blocks;
    schedule->tables.assign(batch.block_tables, batch.block_tables + batch.sequences * batch.max_blocks);
    return schedule;
}

// The batch's arrays are read only during the call.
EXPORTED void* batchinfer_make_schedule(const Batch* batch) { return make_schedule(*batch); }
EXPORTED void batchinfer_free_schedule(void* schedule) { delete static_cast<Schedule*>(schedule); }
// How often a split of some sequence's blocks is read, a head: less with sharing than sequence by sequence.
EXPORTED int64_t batchinfer_split_reads(const void* schedule) {
    int64_t count = 0;
    for (auto& phase : static_cast<const Schedule*>(schedule)->phases)
        for (auto& tile : phase) count += std::min(tile.last, tile.highest / SPLIT + 1) - tile.first;
    return count;
}
