// A team of threads for one call: phases run one after the other, the tasks of a phase are
// handed out one by one. What a task computes never depends on which thread runs it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ifr {

struct Phase {
    int64_t n_tasks;
    std::function<void(int64_t task, int thread)> run;
};

class Team {
  public:
    // Runs all phases on at most n_threads threads, the calling one included.
    static void run(int n_threads, const std::vector<Phase>& phases) {
        Team team(phases);
        std::vector<std::thread> helpers;
        try {
            for (int i = 1; i < n_threads; ++i)
                helpers.emplace_back([&team, i] {
                    team.wait();
                    team.work(i);
                });
        } catch (const std::exception&) {
            // The system gives no more threads: those there are do the work.
        }
        team.start(1 + static_cast<int>(helpers.size()));
        team.work(0);
        for (std::thread& helper : helpers) helper.join();
        if (team.error_) std::rethrow_exception(team.error_);
    }

  private:
    static constexpr int YIELDS = 200;

    explicit Team(const std::vector<Phase>& phases) : phases_(phases), next_(phases.size()) {}

    void work(int thread) {
        for (size_t i = 0; i < phases_.size(); ++i) {
            try {
                int64_t task;
                while ((task = next_[i].fetch_add(1)) < phases_[i].n_tasks)
                    phases_[i].run(task, thread);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
                for (auto& next : next_) next = INT64_MAX / 2;
            }
            arrive();
        }
    }

    void start(int size) {
        const std::lock_guard<std::mutex> lock(mutex_);
        size_ = size;
        all_here_.notify_all();
    }

    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        all_here_.wait(lock, [this] { return size_ > 0; });
    }

    void arrive() {
        std::unique_lock<std::mutex> lock(mutex_);
        const int round = round_;
        if (++arrived_ == size_) {
            arrived_ = 0;
            ++round_;
            all_here_.notify_all();
            return;
        }
        lock.unlock();
        // Phases may end within microseconds of each other, waking a thread takes dozens.
        for (int i = 0; i < YIELDS; ++i) {
            if (round_ != round) return;
            std::this_thread::yield();
        }
        lock.lock();
        all_here_.wait(lock, [this, round] { return round_ != round; });
    }

    const std::vector<Phase>& phases_;
    std::vector<std::atomic<int64_t>> next_;
    std::mutex mutex_;
    std::condition_variable all_here_;
    int size_ = 0, arrived_ = 0;
    std::atomic<int> round_{0};
    std::exception_ptr error_;
};

}  // namespace ifr
