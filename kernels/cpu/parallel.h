// Work shared between threads: the team of the OpenMP runtime that torch brought into the process.
//
// A pool of our own would compete with torch's threads, which spin for a while after each of its products; one team
// hands over within microseconds. GOMP_parallel is exported by GNU's, LLVM's and Intel's runtime alike, so nothing is
// linked and any compiler will do.
#pragma once
#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>

extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);

// Calls work(i) once for each i in [0, count), in any order and on any of `threads` threads, `grain` in a row.
template <class Work>
inline void parallel_for(int threads, int64_t count, int64_t grain, const Work& work) {
    if (grain < 1) grain = 1;
    if (threads <= 1 || count <= grain) {
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
    struct Share {
        const Work* work;
        std::atomic<int64_t> next;
        int64_t count, grain;
    } share{&work, {0}, count, grain};
    int64_t most = (count + grain - 1) / grain;
    GOMP_parallel(
        [](void* data) {
            Share& s = *static_cast<Share*>(data);
            for (;;) {
                int64_t first = s.next.fetch_add(s.grain, std::memory_order_relaxed);
                if (first >= s.count) return;
                int64_t last = first + s.grain < s.count ? first + s.grain : s.count;
                for (int64_t i = first; i < last; i++) (*s.work)(i);
            }
        },
        &share, unsigned(threads < most ? threads : most), 0);
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
    struct Share {
        const First* first_work;
        const Second* second_work;
        std::atomic<int64_t> next_first, done, next_second;
        int64_t first, grain, second;
    } share{&first_work, &second_work, {0}, {0}, {0}, first, first_grain, second};
    GOMP_parallel(
        [](void* data) {
            Share& s = *static_cast<Share*>(data);
            for (;;) {
                int64_t begin = s.next_first.fetch_add(s.grain, std::memory_order_relaxed);
                if (begin >= s.first) break;
                int64_t end = begin + s.grain < s.first ? begin + s.grain : s.first;
                for (int64_t i = begin; i < end; i++) (*s.first_work)(i);
                s.done.fetch_add(end - begin, std::memory_order_release);
            }
            // Who has an item is running, unless others took its core: then let it have this one.
            for (int turns = 0; s.done.load(std::memory_order_acquire) < s.first; turns++)
                turns < 4096 ? _mm_pause() : void(sched_yield());
            for (;;) {
                int64_t i = s.next_second.fetch_add(1, std::memory_order_relaxed);
                if (i >= s.second) return;
                (*s.second_work)(i);
            }
        },
        &share, unsigned(threads), 0);
}
