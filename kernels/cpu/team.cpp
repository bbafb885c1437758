#include "team.h"

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <type_traits>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace ifr {

namespace {

// An idle thread of libgomp's pool spins for milliseconds after each parallel operation of torch.
// Threads of our own would have to share a core with it, and take several times as long.
struct Pool {
    void (*parallel)(void (*run)(void*), void* data, unsigned n_threads, unsigned flags) = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;
    std::string library;
    explicit operator bool() const { return parallel && thread_num && num_threads; }
};

// Symbols are looked up and not linked: a libgomp of our own would have a pool of its own. Calls of
// torch's libraries are resolved in this global scope, into which torch loads its libgomp first.
Pool find_pool() {
    Pool pool;
#if defined(__linux__)
    const char* choice = std::getenv("IFR_FAST_CPU_POOL");
    if (choice && std::string(choice) == "none") return pool;
    const auto find = [](auto& function, const char* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(RTLD_DEFAULT, name));
    };
    find(pool.parallel, "GOMP_parallel");
    find(pool.thread_num, "omp_get_thread_num");
    find(pool.num_threads, "omp_get_num_threads");
    Dl_info info;
    if (pool && dladdr(reinterpret_cast<void*>(pool.parallel), &info)) pool.library = info.dli_fname;
#endif
    return pool;
}

const Pool& the_pool() {
    static const Pool pool = find_pool();
    return pool;
}

}  // namespace

std::string Team::pool() { return the_pool().library; }

void Team::run(int n_threads, const std::vector<Phase>& phases) {
    Team team(phases);
    const bool divisible = std::any_of(phases.begin(), phases.end(),
                                       [](const Phase& phase) { return phase.n_tasks > 1; });
    // All threads or one: a pool asked for fewer threads than before ends the others.
    if (n_threads == 1 || !divisible) team.work(0, 1);
    else if (the_pool()) team.run_in_pool(n_threads);
    else team.run_on_new_threads(n_threads);
    if (team.error_) std::rethrow_exception(team.error_);
}

void Team::run_in_pool(int n_threads) {
    // The pool may give fewer threads than requested.
    const auto work = [](void* team) {
        static_cast<Team*>(team)->work(the_pool().thread_num(), the_pool().num_threads());
    };
    the_pool().parallel(work, this, static_cast<unsigned>(n_threads), 0);
}

void Team::run_on_new_threads(int n_threads) {
    std::vector<std::thread> helpers;
    try {
        for (int i = 1; i < n_threads; ++i)
            helpers.emplace_back([this, i] {
                std::unique_lock<std::mutex> lock(mutex_);
                changed_.wait(lock, [this] { return size_ > 0; });
                lock.unlock();
                work(i, size_);
            });
    } catch (const std::exception&) {
        // The system gives no more threads; the existing ones do the work.
    }
    const int size = 1 + static_cast<int>(helpers.size());
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        size_ = size;
        changed_.notify_all();
    }
    work(0, size);
    for (std::thread& helper : helpers) helper.join();
}

void Team::work(int thread, int size) noexcept {
    for (size_t i = 0; i < phases_.size(); ++i) {
        if (i) arrive(size);
        try {
            int64_t task;
            while ((task = next_[i].fetch_add(1)) < phases_[i].n_tasks)
                phases_[i].run(task, thread);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
            for (auto& next : next_) next = INT64_MAX / 2;
        }
    }
}

// Returns once all `size` threads have called it.
void Team::arrive(int size) {
    constexpr int YIELDS = 200;
    if (size == 1) return;
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++arrived_ == size) {
        arrived_ = 0;
        ++round_;
        changed_.notify_all();
        return;
    }
    lock.unlock();
    // Phases may be microseconds apart, while waking a thread takes dozens of microseconds.
    for (int i = 0; i < YIELDS; ++i) {
        if (round_ != round) return;
        std::this_thread::yield();
    }
    lock.lock();
    changed_.wait(lock, [this, round] { return round_ != round; });
}

}  // namespace ifr
