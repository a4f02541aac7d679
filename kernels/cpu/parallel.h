// Work shared between threads: the team of the OpenMP runtime that torch brought into the process.
//
// A pool of our own would compete with torch's threads, which spin for a while after each of its products; one team
// hands over within microseconds. GOMP_parallel is exported by GNU's, LLVM's and Intel's runtime alike, so nothing is
// linked and any compiler will do.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);

// The items [0, count), a part in a row for each thread. One that has done its own goes on with the others', `grain` in a
// row. Where operators share out the same rows, each finds them where it left them: in its core's caches.
class Shares {
public:
    Shares(int threads, int64_t count, int64_t grain) : grain_(grain), parts_(std::min(threads, MOST)) {
        int64_t grains = (count + grain - 1) / grain;
        for (int p = 0; p < parts_; p++) {
            part_[p].next.store(grains * p / parts_ * grain, std::memory_order_relaxed);
            part_[p].end = std::min(count, grains * (p + 1) / parts_ * grain);
        }
    }

    // Calls work(i) for what this thread gets; returns how many those were.
    template <class Work>
    int64_t run(const Work& work) {
        int own = omp_get_thread_num() % parts_;
        int64_t done = 0;
        for (int k = 0; k < parts_; k++) {
            Part& part = part_[(own + k) % parts_];
            for (;;) {
                int64_t first = part.next.fetch_add(grain_, std::memory_order_relaxed);
                if (first >= part.end) break;
                int64_t last = std::min(first + grain_, part.end);
                for (int64_t i = first; i < last; i++) work(i);
                done += last - first;
            }
        }
        return done;
    }

private:
    static constexpr int MOST = 64;
    struct alignas(64) Part {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const int64_t grain_;
    const int parts_;
    Part part_[MOST];
};

// Calls work(i) once for each i in [0, count), in any order and on any of `threads` threads, `grain` in a row.
template <class Work>
inline void parallel_for(int threads, int64_t count, int64_t grain, const Work& work) {
    if (grain < 1) grain = 1;
    if (threads <= 1 || count <= grain) {
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
    int64_t most = (count + grain - 1) / grain;
    if (threads > most) threads = int(most);
    struct Team {
        const Work& work;
        Shares shares;
    } team{work, {threads, count, grain}};
    GOMP_parallel(
        [](void* data) {
            Team& team = *static_cast<Team*>(data);
            team.shares.run(team.work);
        },
        &team, unsigned(threads), 0);
}

// parallel_for over `first` items, then over `second` ones, in one hand-over to the team: nobody begins a second item
// before all first ones are done.
template <class First, class Second>
inline void parallel_phases(int threads, int64_t first, int64_t first_grain, const First& first_work, int64_t second,
                            const Second& second_work) {
    if (threads <= 1 || first == 0 || second <= 1) {
        for (int64_t i = 0; i < first; i++) first_work(i);
        parallel_for(threads, second, 1, second_work);
        return;
    }
    struct Team {
        const First& first_work;
        const Second& second_work;
        Shares first_shares, second_shares;
        std::atomic<int64_t> done;
        int64_t first;
    } team{first_work, second_work, {threads, first, first_grain}, {threads, second, 1}, {0}, first};
    GOMP_parallel(
        [](void* data) {
            Team& team = *static_cast<Team*>(data);
            team.done.fetch_add(team.first_shares.run(team.first_work), std::memory_order_acq_rel);
            // Who has an item is running, unless others took its core: then let it have this one.
            for (int turns = 0; team.done.load(std::memory_order_acquire) < team.first; turns++)
                turns < 4096 ? _mm_pause() : void(sched_yield());
            team.second_shares.run(team.second_work);
        },
        &team, unsigned(threads), 0);
}
