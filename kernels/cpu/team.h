// A team of threads for one call: phases run one after the other, the tasks of a phase are
// handed out one by one. The result of a task never depends on the thread that runs it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

namespace ifr {

struct Phase {
    int64_t n_tasks;
    std::function<void(int64_t task, int thread)> run;
};

// Threads and the state that they share during a call.
class Team {
  public:
    // Runs all phases on at most n_threads threads, the calling one included: those of
    // torch's own OpenMP pool if it has one, else new ones.
    static void run(int n_threads, const std::vector<Phase>& phases);

    // The library whose pool is used; empty if there is none.
    static std::string pool();

  private:
    explicit Team(const std::vector<Phase>& phases) : phases_(phases), next_(phases.size()) {}

    void run_in_pool(int n_threads);
    void run_on_new_threads(int n_threads);
    void work(int thread, int size) noexcept;
    void arrive(int size);

    const std::vector<Phase>& phases_;
    std::vector<std::atomic<int64_t>> next_;
    std::mutex mutex_;
    std::condition_variable changed_;
    int size_ = 0, arrived_ = 0;
    std::atomic<int> round_{0};
    std::exception_ptr error_;
};

}  // namespace ifr
