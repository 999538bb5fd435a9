#include "program/pool.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "check.hpp"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define MPO_HAVE_FORK 1
#else
#define MPO_HAVE_FORK 0
#endif

namespace mpo {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kPausesBeforeYield = 64;
// A thread that has found no work for this long goes to sleep; the pauses within a forward pass are far shorter.
constexpr std::chrono::microseconds kSpin{60};

void pause() {
#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
  __builtin_ia32_pause();
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
  __asm__ volatile("yield");
#else
  std::this_thread::yield();
#endif
}

// See Pool::set_alone.
thread_local bool alone = false;

// How often this process and its ancestors were forked: a child of fork() lacks the threads of its parent.
std::atomic<unsigned> forks{0};

struct Registry {
  std::mutex mutex;
  std::vector<Pool*> pools;
};

// The pools of this process; never destroyed, since a fork may come at any time.
Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

constexpr std::uint64_t pack(std::uint32_t generation, std::uint32_t left) {
  return (static_cast<std::uint64_t>(generation) << 32) | left;
}

}  // namespace

// The threads and the job that they work on. The upper half of `ticket` is the number of the job, the lower half counts the
// chunks that nobody has taken yet. A thread takes one by a compare-and-swap; the job cannot end before this chunk is done,
// so the members that describe the job do not change meanwhile.
struct Pool::Crew {
  alignas(64) std::atomic<std::uint64_t> ticket{0};
  alignas(64) std::atomic<std::size_t> done{0};
  const RangeFunction* function = nullptr;
  std::size_t items = 0, chunk = 0, chunks = 0;

  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  std::exception_ptr error;
  std::vector<std::thread> threads;

  void work_on(std::uint32_t generation) {
    std::uint64_t seen = ticket.load(std::memory_order_acquire);
    while ((seen >> 32) == generation && static_cast<std::uint32_t>(seen) > 0) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      const std::size_t begin = (chunks - static_cast<std::uint32_t>(seen)) * chunk;
      try {
        (*function)(begin, begin + chunk < items ? begin + chunk : items);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
      done.fetch_add(1, std::memory_order_acq_rel);
      seen = ticket.load(std::memory_order_acquire);
    }
  }

  std::uint32_t generation() const { return static_cast<std::uint32_t>(ticket.load(std::memory_order_seq_cst) >> 32); }

  // Waits for a job with another number than `last`; false when the pool ends.
  bool wait(std::uint32_t last) {
    const auto start = std::chrono::steady_clock::now();
    do {
      for (int i = 0; i < kPausesBeforeYield; ++i) {
        if (generation() != last || stop.load(std::memory_order_relaxed)) return !stop.load();
        pause();
      }
      std::this_thread::yield();  // another program's thread may want this core
    } while (std::chrono::steady_clock::now() - start < kSpin);
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    wake.wait(lock, [&] { return generation() != last || stop.load(); });
    sleepers.fetch_sub(1, std::memory_order_relaxed);
    return !stop.load();
  }

  void loop() {
    std::uint32_t last = 0;
    while (wait(last)) {
      last = generation();
      work_on(last);
    }
  }

  void rouse() {
    if (sleepers.load(std::memory_order_seq_cst) == 0) return;
    const std::lock_guard<std::mutex> lock(mutex);
    wake.notify_all();
  }
};

// Replaces the locks in a child of fork(): threads that exist only in the parent may hold them. The child has one thread
// when this is called.
void Pool::renew_turns() {
  forks.fetch_add(1);
  for (Pool* pool : registry().pools) {
    (void)pool->turn_.release();  // leaked: a lock that is held cannot be destroyed
    pool->turn_ = std::make_unique<std::mutex>();
  }
}

Pool::Pool(int threads) : turn_(std::make_unique<std::mutex>()), threads_(0), forks_(forks.load()) {
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.pools.push_back(this);
  }
#if MPO_HAVE_FORK
  static const int registered =
      pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                     [] {
                       renew_turns();
                       registry().mutex.unlock();
                     });
  (void)registered;
#endif
  resize(threads);
}

Pool::~Pool() {
  {
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.pools.erase(std::find(all.pools.begin(), all.pools.end(), this));
  }
  threads_ = 1;
  renew();
  delete crew_;
}

void Pool::resize(int threads) {
  expect(threads >= 1 && threads <= kMostThreads, "threads: expected 1 to ", kMostThreads, ", found ", threads);
  const std::lock_guard<std::mutex> lock(*turn_);
  if (threads == threads_ && forks_ == forks.load()) return;
  threads_ = threads;
  renew();
}

// Ends the threads, if they belong to this process, and starts threads_ - 1 others.
void Pool::renew() {
  if (crew_ && forks_ == forks.load()) {
    {
      const std::lock_guard<std::mutex> lock(crew_->mutex);
      crew_->stop.store(true);
    }
    crew_->wake.notify_all();
    for (std::thread& thread : crew_->threads) thread.join();
    delete crew_;
  }  // else the parent's crew is leaked: its threads do not exist here and its locks may be held for ever
  forks_ = forks.load();
  crew_ = new Crew;
  try {
    for (int i = 1; i < threads_; ++i) crew_->threads.emplace_back([crew = crew_] { crew->loop(); });
  } catch (const std::system_error&) {  // a limit of processes or of memory
    threads_ = static_cast<int>(crew_->threads.size()) + 1;
  }
}

void Pool::set_alone(bool wanted) { alone = wanted; }

void Pool::run(std::size_t items, std::size_t chunk, RangeFunction f) {
  if (items == 0) return;
  if (chunk == 0) chunk = 1;
  const std::size_t chunks = (items + chunk - 1) / chunk;
  if (threads_ == 1 || chunks == 1 || alone) {
    for (std::size_t begin = 0; begin < items; begin += chunk) f(begin, begin + chunk < items ? begin + chunk : items);
    return;
  }
  const std::lock_guard<std::mutex> lock(*turn_);
  if (forks_ != forks.load(std::memory_order_relaxed)) renew();
  Crew& crew = *crew_;
  const std::uint32_t generation = crew.generation() + 1;
  crew.function = &f;
  crew.items = items;
  crew.chunk = chunk;
  crew.chunks = chunks;
  crew.done.store(0, std::memory_order_relaxed);
  crew.ticket.store(pack(generation, static_cast<std::uint32_t>(chunks)), std::memory_order_seq_cst);
  crew.rouse();
  crew.work_on(generation);
  for (int spins = 0; crew.done.load(std::memory_order_acquire) != chunks; ++spins)
    spins < 4 * kPausesBeforeYield ? pause() : std::this_thread::yield();
  if (crew.error) {
    std::exception_ptr error;
    std::swap(error, crew.error);
    std::rethrow_exception(error);
  }
}

int default_threads() {
  if (const char* wanted = std::getenv("MPO_THREADS")) {
    const int count = std::atoi(wanted);
    if (count >= 1 && count <= kMostThreads) return count;
  }
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned found = std::thread::hardware_concurrency();
  return found ? static_cast<int>(found) : 1;
}

Pool& pool() {
  static Pool* const shared = new Pool(default_threads());
  return *shared;
}

}  // namespace mpo
