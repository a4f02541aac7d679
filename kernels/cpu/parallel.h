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
extern "C" int omp_get_num_threads(void);

// Threads that do the same loops in the same order. Of each loop's items a thread has a part in a row; one that has done
// its own goes on with the others'. Where loops share out the same rows, each finds them where it left them: in its
// core's caches.
class Team {
public:
    explicit Team(int threads) : parts_(std::min(threads, MOST)) {
        for (int p = 0; p < parts_; p++) part_[p].taken.store(0, std::memory_order_relaxed);
    }

    // One thread's place in the team: to be made by each of its threads, for all the loops they do.
    class Member {
    public:
        explicit Member(Team& team) : team_(team), own_(omp_get_thread_num() % team.parts_) {}

        // Calls work(i) for what this thread gets of [0, count), `grain` in a row; count is below 2^31.
        template <class Work>
        void run(int64_t count, int64_t grain, const Work& work) {
            turn_++;
            int64_t grains = (count + grain - 1) / grain;
            for (int k = 0; k < team_.parts_; k++) {
                int p = (own_ + k) % team_.parts_;
                int64_t begin = grains * p / team_.parts_ * grain;
                int64_t end = std::min(count, grains * (p + 1) / team_.parts_ * grain);
                for (;;) {
                    int64_t first = begin + team_.take(team_.part_[p].taken, turn_, grain);
                    if (first >= end) break;
                    int64_t last = std::min(first + grain, end);
                    for (int64_t i = first; i < last; i++) work(i);
                }
            }
        }

        // Returns when all threads of the team have come here.
        void wait() {
            arrivals_ += omp_get_num_threads();
            team_.arrived_.fetch_add(1, std::memory_order_acq_rel);
            // Who is still on its way is running, unless others took its core: then let it have this one.
            for (int turns = 0; team_.arrived_.load(std::memory_order_acquire) < arrivals_; turns++)
                turns < 4096 ? _mm_pause() : void(sched_yield());
        }

    private:
        Team& team_;
        const int own_;
        uint64_t turn_ = 0;
        int64_t arrivals_ = 0;
    };

private:
    static constexpr int MOST = 64;
    // How many items of a part are taken, and in which loop: the first who comes there begins the next one's count.
    struct alignas(64) Part {
        std::atomic<uint64_t> taken;
    };

    static int64_t take(std::atomic<uint64_t>& taken, uint64_t turn, int64_t grain) {
        uint64_t seen = taken.load(std::memory_order_relaxed);
        while (seen >> 32 != turn)
            if (taken.compare_exchange_weak(seen, turn << 32 | uint64_t(grain), std::memory_order_relaxed)) return 0;
        return int64_t(taken.fetch_add(uint64_t(grain), std::memory_order_relaxed) & 0xffffffff);
    }

    const int parts_;
    std::atomic<int64_t> arrived_{0};
    Part part_[MOST];
};

// The team that this thread belongs to while it makes a recording's calls (program.cpp).
inline thread_local Team::Member* member = nullptr;

// Calls work(i) once for each i in [0, count), in any order and on any of `threads` threads, `grain` in a row.
//
// Among a recording's calls all threads of the team come here, and share the items: what a kernel does before and after
// is done by each of them, so whatever they have in common must only be changed in a loop, if it is of one item.
template <class Work>
inline void parallel_for(int threads, int64_t count, int64_t grain, const Work& work) {
    if (grain < 1) grain = 1;
    if (member) {
        member->run(count, grain, work);
        return member->wait();
    }
    if (threads <= 1 || count <= grain) {
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
    threads = int(std::min<int64_t>(threads, (count + grain - 1) / grain));
    struct Loop {
        const Work& work;
        int64_t count, grain;
        Team team;
    } loop{work, count, grain, Team(threads)};
    GOMP_parallel(
        [](void* data) {
            Loop& loop = *static_cast<Loop*>(data);
            Team::Member(loop.team).run(loop.count, loop.grain, loop.work);
        },
        &loop, unsigned(threads), 0);
}

// Calls work() on each of `threads` threads.
template <class Work>
inline void on_each(int threads, const Work& work) {
    GOMP_parallel([](void* data) { (*static_cast<const Work*>(data))(); }, const_cast<Work*>(&work), unsigned(threads), 0);
}

// The same, and their loops are shared: parallel_for deals out its items to all of them.
template <class Work>
inline void together(int threads, const Work& work) {
    if (threads <= 1 || member) return work();
    Team team(threads);
    on_each(threads, [&] {
        Team::Member own(team);
        member = &own;
        work();
        member = nullptr;
    });
}
