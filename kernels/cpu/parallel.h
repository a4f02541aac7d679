// Work shared between threads: the team of the OpenMP runtime that torch brought into the process.
//
// A pool of our own would compete with torch's threads, which spin for a while after each of its products; one team
// hands over within microseconds. GOMP_parallel is exported by GNU's, LLVM's and Intel's runtime alike, so nothing is
// linked and any compiler will do.
#pragma once
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
