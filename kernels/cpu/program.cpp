// Calls that were recorded, made for the rows of a step.
//
// The rows are cut into bands. A band goes through the calls on one thread, so that what one kernel writes is in that
// core's caches for the next, and nobody waits for others between them. Only attention needs what other rows have stored:
// there the calls are cut into stretches, and a band waits before each until those ahead of it in its sequence have done
// the one before. Bands whose attention takes longer to read than to compute take turns in it, so that one core multiplies
// while another one reads. Where bands would be too low, all threads make each call together.
#include <algorithm>
#include <memory>
#include <vector>

#include "parallel.h"
#include "rows.h"
#include "vector.h"

namespace {

struct Step {
    void (*kernel)(const void* call, const Rows* rows);
    const void* call;
};

struct Program {
    const Step* steps;
    const int64_t* stretches;  // the first step of each, and the number of steps
    int64_t num_stretches;
    int64_t row_operations, token_bytes;  // of all products for a row; of all layers' keys and values of a token
};

struct Pass {
    Batch batch;
    const int64_t *positions, *slots;
    int32_t threads;
};

constexpr int64_t LEAST_ROWS = 32;  // as many take longer against a weight than it takes from memory
constexpr int64_t BAND_ROWS = 64;
constexpr int64_t READING_ROWS = 4;        // of a sequence: with more of them its attention is bound by arithmetic
constexpr int64_t OPERATIONS_A_BYTE = 16;  // of products, while a core reads

struct Free {
    void operator()(Schedule* schedule) const { delete schedule; }
};

// Rows [begin, end) of a step, with its sequences from `first` on.
struct Band {
    int64_t begin, end;
    int32_t first;
    bool follows;  // its first sequence began in the band before
    std::unique_ptr<Schedule, Free> schedule;
    int64_t done = 0;  // stretches
    bool reads = false, taken = false;
};

// Rows [begin, end) of a batch as a batch of their own: of a sequence that is cut, its context ends with its last row here.
std::unique_ptr<Schedule, Free> schedule_of(const Batch& batch, const Band& band) {
    std::vector<int32_t> starts{0}, contexts;
    for (int i = band.first; i < batch.sequences && batch.query_starts[i] < band.end; i++) {
        int64_t end = std::min<int64_t>(batch.query_starts[i + 1], band.end);
        starts.push_back(int32_t(end - band.begin));
        contexts.push_back(int32_t(batch.context_lens[i] - (batch.query_starts[i + 1] - end)));
    }
    Batch part = batch;
    part.query_starts = starts.data();
    part.context_lens = contexts.data();
    part.block_tables += band.first * batch.max_blocks;
    part.sequences = int32_t(contexts.size());
    return std::unique_ptr<Schedule, Free>(make_schedule(part));
}

// Bands of about `size` rows. A sequence is cut only where a block of the cache begins: two threads can't store to one.
std::vector<Band> cut(const Pass& pass, int64_t size) {
    const Batch& batch = pass.batch;
    std::vector<Band> bands;
    auto open = [&](int64_t row, int32_t sequence) {
        if (!bands.empty()) bands.back().end = row;
        bands.push_back({row, 0, sequence, row > batch.query_starts[sequence]});
    };
    for (int32_t i = 0; i < batch.sequences; i++)
        for (int64_t row = batch.query_starts[i]; row < batch.query_starts[i + 1];) {
            if (bands.empty() || row - bands.back().begin >= size) open(row, i);
            int64_t left = size - (row - bands.back().begin);
            int64_t to_border = BLOCK - pass.positions[row] % BLOCK;
            int64_t whole = std::max<int64_t>(left - to_border, 0) / BLOCK * BLOCK;
            row = std::min<int64_t>(batch.query_starts[i + 1], row + to_border + whole);
        }
    bands.back().end = batch.query_starts[batch.sequences];
    return bands;
}

// Says which bands are to take turns in attention: none if there would always be a line for it.
void find_readers(std::vector<Band>& bands, const Program& program, const Batch& batch) {
    int64_t tokens = 0;
    for (Band& band : bands) {
        int64_t sequences = 0, contexts = 0;
        for (int i = band.first; i < batch.sequences && batch.query_starts[i] < band.end; i++, sequences++)
            contexts += batch.context_lens[i];
        band.reads = band.end - band.begin <= READING_ROWS * sequences;
        if (band.reads) tokens += contexts;
    }
    int64_t rows = batch.query_starts[batch.sequences];
    if (tokens * program.token_bytes * OPERATIONS_A_BYTE > rows * program.row_operations)
        for (Band& band : bands) band.reads = false;
}

// Hands out bands, those that are behind first.
class Queue {
public:
    Queue(std::vector<Band>& bands, int64_t stretches, int threads)
        : bands_(bands), stretches_(stretches), left_(int64_t(bands.size())), turns_((threads + 1) / 2) {}

    // Waits for a band that can go on; null: all are done.
    Band* take() {
        for (int turns = 0; left_.load(std::memory_order_acquire) > 0; turns++) {
            lock();
            Band* best = nullptr;
            for (size_t b = 0; b < bands_.size(); b++) {
                Band& band = bands_[b];
                if (band.taken || band.done == stretches_) continue;
                if (band.follows && bands_[b - 1].done < band.done) continue;
                if (attends(band) && turns_ == 0) continue;
                if (!best || band.done < best->done) best = &band;
            }
            if (best) {
                best->taken = true;
                turns_ -= attends(*best);
            }
            unlock();
            if (best) return best;
            turns < 4096 ? _mm_pause() : void(sched_yield());
        }
        return nullptr;
    }

    // The band's thread has read what it had to.
    void end_turn(const Band& band) {
        if (!attends(band)) return;
        lock();
        turns_++;
        unlock();
    }

    void give_back(Band& band) {
        lock();
        band.taken = false;
        if (++band.done == stretches_) left_.fetch_sub(1, std::memory_order_release);
        unlock();
    }

private:
    // Every stretch but the first begins with attention.
    static bool attends(const Band& band) { return band.reads && band.done > 0; }

    void lock() {
        for (int turns = 0; locked_.test_and_set(std::memory_order_acquire); turns++)
            turns < 4096 ? _mm_pause() : void(sched_yield());
    }
    void unlock() { locked_.clear(std::memory_order_release); }

    std::vector<Band>& bands_;
    const int64_t stretches_;
    std::atomic<int64_t> left_;
    int turns_;  // to attend, that are free
    std::atomic_flag locked_ = ATOMIC_FLAG_INIT;
};

void make(const Program& program, int64_t first, int64_t last, const Rows& rows) {
    for (int64_t i = first; i < last; i++) program.steps[i].kernel(program.steps[i].call, &rows);
}

void make_together(const Program& program, const Pass& pass) {
    int64_t count = pass.batch.query_starts[pass.batch.sequences];
    std::unique_ptr<Schedule, Free> schedule(make_schedule(pass.batch));
    Rows rows{0, count, pass.positions, pass.slots, schedule.get(), pass.threads};
    together(pass.threads, [&] { make(program, 0, program.stretches[program.num_stretches], rows); });
}

// Whether there is work for all threads: at first only bands that follow no other can begin, and the threads beyond them
// come in stretch by stretch.
bool busy(const std::vector<Band>& bands, int64_t stretches, int64_t threads) {
    int64_t heads = std::count_if(bands.begin(), bands.end(), [](const Band& band) { return !band.follows; });
    return heads >= threads || threads * threads * 20 <= heads * int64_t(bands.size()) * stretches;
}

}  // namespace

// Returns the number of bands; 1 where all rows went together.
EXPORTED int64_t batchinfer_run(const Program* program, const Pass* pass) {
    int64_t rows = pass->batch.query_starts[pass->batch.sequences];
    if (rows < pass->threads * LEAST_ROWS || pass->threads == 1) return make_together(*program, *pass), 1;
    int64_t count = std::max<int64_t>(pass->threads, (rows + BAND_ROWS - 1) / BAND_ROWS);
    std::vector<Band> bands = cut(*pass, (rows + count - 1) / count);
    if (!busy(bands, program->num_stretches, pass->threads)) return make_together(*program, *pass), 1;
    find_readers(bands, *program, pass->batch);
    Queue queue(bands, program->num_stretches, pass->threads);
    on_each(pass->threads, [&] {
        while (Band* band = queue.take()) {
            if (!band->schedule) band->schedule = schedule_of(pass->batch, *band);
            const int64_t* steps = program->stretches + band->done;
            Rows rows{band->begin, band->end - band->begin, pass->positions + band->begin, pass->slots + band->begin,
                      band->schedule.get(), 1};
            int64_t first = std::min(steps[0] + 1, steps[1]);
            make(*program, steps[0], first, rows);
            queue.end_turn(*band);
            make(*program, first, steps[1], rows);
            queue.give_back(*band);
        }
    });
    return int64_t(bands.size());
}
