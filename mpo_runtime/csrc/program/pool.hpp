// A persistent pool of threads. Work is cut into chunks and each thread takes another one when it has finished one, so that
// a core that is busy with other programs delays a forward pass by one chunk at most.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <type_traits>

namespace mpo {

// A reference to anything callable as f(begin, end); it must outlive the call it is passed to.
class RangeFunction {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, RangeFunction>>>
  RangeFunction(F&& f)  // NOLINT: implicit, so that run() takes a lambda
      : object_(const_cast<void*>(static_cast<const void*>(&f))), call_([](void* object, std::size_t begin, std::size_t end) {
          (*static_cast<std::remove_reference_t<F>*>(object))(begin, end);
        }) {}
  void operator()(std::size_t begin, std::size_t end) const { call_(object_, begin, end); }

 private:
  void* object_;
  void (*call_)(void*, std::size_t, std::size_t);
};

// The thread that calls run() works too, so a pool of n threads starts n - 1. A child of fork() starts its own threads.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Calls f on chunks of at most `chunk` of the items [0, items), in any order, on any thread; returns when all are
  // done. The first exception that f throws is thrown here. Calls from several threads take turns; f must not call run.
  // If the system refuses to start a thread, the pool works with the threads that it has.
  void run(std::size_t items, std::size_t chunk, RangeFunction f);

  int threads() const { return threads_.load(std::memory_order_relaxed); }
  // Whether jobs of the calling thread leave the pool to others and run on this thread alone.
  static void set_alone(bool wanted);

  void resize(int threads);  // waits for a run in progress; throws std::invalid_argument below 1

 private:
  struct Crew;
  void renew();
  static void renew_turns();

  std::unique_ptr<std::mutex> turn_;
  Crew* crew_ = nullptr;
  std::atomic<int> threads_;
  std::atomic<unsigned> forks_;
};

// The pool of this process, which starts with default_threads(). It is never destroyed: sleeping threads do no harm at
// exit, and a destructor would have to wait for threads at work.
Pool& pool();
// MPO_THREADS, or the number of cores that this process may run on.
int default_threads();

}  // namespace mpo
