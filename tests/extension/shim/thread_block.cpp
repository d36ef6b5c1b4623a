#include "thread_block.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

shim::Index threadIdx, blockIdx;

namespace shim {
namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 << 10;
constexpr std::size_t kSharedBytes = 48 << 10;  // what a kernel may declare

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

// Made once and used for one block after the other. ucontext only gives it its stack: to switch by it would cost two
// system calls every time.
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false;
  std::unique_ptr<char[]> stack;
  State state;
  int line;        // of the barrier it waits at
  unsigned value;  // what it brought to the barrier, then what the barrier gave back
};

jmp_buf scheduler;
std::vector<Fiber> fibers;
int current;
const std::function<void()>* kernel;
std::string failure;
sigjmp_buf escape;
struct Watched {
  const char* begin = nullptr;
  std::size_t size = 1;
  Traffic traffic;
} watched;

std::string where() {
  return " in thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x);
}

void fail(const std::string& what) {
  failure = what + where();
  siglongjmp(escape, 1);
}

void on_signal(int signal, siginfo_t* info, void*) {
  // Fibers run on the scheduler's thread: it is enough to leave them behind for good.
  if (signal == SIGSEGV) {
    fail("access outside every buffer (address ..." + std::to_string(reinterpret_cast<uintptr_t>(info->si_addr) % 65536) +
         ")");
  } else {
    fail("undefined behaviour (index of an array out of range, overflow, bad shift)");
  }
}

class Signals {
 public:
  Signals() : stack_(new char[kAltStack]) {
    stack_t alt{};
    alt.ss_sp = stack_.get();
    alt.ss_size = kAltStack;
    sigaltstack(&alt, &before_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before_[0]);
    sigaction(SIGILL, &action, &before_[1]);
  }
  ~Signals() {
    sigaction(SIGSEGV, &before_[0], nullptr);
    sigaction(SIGILL, &before_[1], nullptr);
    sigaltstack(&before_stack_, nullptr);
  }

 private:
  static constexpr std::size_t kAltStack = 64 << 10;
  std::unique_ptr<char[]> stack_;
  stack_t before_stack_{};
  struct sigaction before_[2];
};

void give_way() {
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*kernel)();
    fibers[current].state = State::kDone;
    give_way();
  }
}

void make_fibers(int threads) {
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
}

void run_until_it_gives_way(int thread) {
  current = thread;
  threadIdx.x = unsigned(thread);
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Ends at a page that cannot be touched, as a kernel's shared memory does not: an index too large is noticed.
const Guarded& shared_bytes() {
  static const Guarded bytes(kSharedBytes, false);
  return bytes;
}

unsigned wait_at(State barrier, int line, unsigned value) {
  Fiber& fiber = fibers[current];
  fiber.state = barrier;
  fiber.line = line;
  fiber.value = value;
  give_way();
  return fibers[current].value;
}

// Lets the threads [first, last) go on if all that still run wait at one barrier of that kind.
bool release(int first, int last, State barrier) {
  int line = -1;
  unsigned count = 0, ballot = 0;
  for (int t = first; t < last; ++t) {
    const Fiber& fiber = fibers[t];
    if (fiber.state == State::kDone) continue;
    if (fiber.state != barrier) return false;
    if (line >= 0 && fiber.line != line) {
      threadIdx.x = t;
      fail("threads wait at different barriers (lines " + std::to_string(line) + " and " + std::to_string(fiber.line) +
           ")");
    }
    line = fiber.line;
    count += fiber.value;
    ballot |= fiber.value << (t % kWarp);
  }
  if (line < 0) return false;
  for (int t = first; t < last; ++t) {
    if (fibers[t].state != barrier) continue;
    fibers[t].state = State::kReady;
    fibers[t].value = barrier == State::kAtBlockBarrier ? count : ballot;
  }
  return true;
}

void arrange(std::vector<int>& order, Order how, std::mt19937_64& random) {
  std::iota(order.begin(), order.end(), 0);
  if (how == Order::kReverse) std::reverse(order.begin(), order.end());
  if (how == Order::kShuffled) std::shuffle(order.begin(), order.end(), random);
}

void run_block(int threads, Order how, std::mt19937_64& random) {
  std::memset(shared_bytes().as<char>(), 0xff, kSharedBytes);
  for (Fiber& fiber : fibers) fiber.state = State::kReady;
  const int warps = (threads + kWarp - 1) / kWarp;
  std::vector<int> warp_order(warps), lane_order(kWarp);
  for (;;) {
    arrange(warp_order, how, random);
    for (int warp : warp_order) {
      const int first = warp * kWarp, last = std::min(first + kWarp, threads);
      // A warp runs as far ahead of the others as barriers let it.
      do {
        arrange(lane_order, how, random);
        for (int lane : lane_order) {
          if (first + lane < last && fibers[first + lane].state == State::kReady) run_until_it_gives_way(first + lane);
        }
      } while (release(first, last, State::kAtWarpBarrier));
    }
    if (release(0, threads, State::kAtBlockBarrier)) continue;
    for (int t = 0; t < threads; ++t) {
      if (fibers[t].state == State::kDone) continue;
      threadIdx.x = t;
      fail("a barrier (line " + std::to_string(fibers[t].line) + ") that not all threads reach");
    }
    return;
  }
}

}  // namespace

void* shared_memory(std::size_t bytes) {
  if (bytes > kSharedBytes) fail("more than 48 KiB of static shared memory");
  // One declaration per kernel: every thread of the block gets the same.
  return shared_bytes().as<char>() + (kSharedBytes - bytes) / 16 * 16;
}

int block_barrier(int line, int predicate) { return int(wait_at(State::kAtBlockBarrier, line, unsigned(predicate))); }

unsigned warp_ballot(int line, unsigned mask, bool predicate) {
  if (mask != 0xffffffffu) fail("a ballot of part of a warp");
  return wait_at(State::kAtWarpBarrier, line, predicate);
}

namespace {

void count(std::vector<uint8_t>& accesses, const void* pointer, std::size_t bytes, const char* what) {
  const char* const at = static_cast<const char*>(pointer);
  const std::size_t total = accesses.size() * watched.size;
  if (watched.begin == nullptr || at < watched.begin || at >= watched.begin + total) return;
  const std::size_t first = std::size_t(at - watched.begin) / watched.size;
  for (std::size_t i = 0; i < bytes / watched.size; ++i) {
    if (++accesses[first + i] == 2) fail("element " + std::to_string(first + i) + " is " + what + " twice");
  }
}

}  // namespace

void on_load(const void* pointer, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("misaligned load of " + std::to_string(bytes) + " bytes");
  watched.traffic.loaded += int64_t(bytes);
  count(watched.traffic.reads, pointer, bytes, "read");
}

void on_store(const void* pointer, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("misaligned store of " + std::to_string(bytes) + " bytes");
  watched.traffic.stored += int64_t(bytes);
  count(watched.traffic.writes, pointer, bytes, "written");
}

void watch(const void* begin, std::size_t elements, std::size_t size) {
  watched.begin = static_cast<const char*>(begin);
  watched.size = size;
  watched.traffic.reads.assign(elements, 0);
  watched.traffic.writes.assign(elements, 0);
  watched.traffic.loaded = watched.traffic.stored = 0;
}

std::string watched_once() {
  const auto& writes = watched.traffic.writes;
  const auto missed = std::find(writes.begin(), writes.end(), 0);
  if (missed == writes.end()) return "";
  return "element " + std::to_string(missed - writes.begin()) + " is never written";
}

const Traffic& traffic() { return watched.traffic; }

std::string run_grid(int64_t blocks, int threads, Order order, uint64_t seed,
                     const std::function<bool(int64_t)>& selected, const std::function<void()>& body) {
  std::mt19937_64 random(seed);
  std::vector<int> block_order;
  if (blocks < (1 << 24)) {  // a huge grid, of which few blocks are selected, runs as it comes
    block_order.resize(blocks);
    arrange(block_order, order, random);
  }
  if (int(fibers.size()) != threads) make_fibers(threads);
  kernel = &body;
  failure.clear();
  const Signals signals;
  if (sigsetjmp(escape, 1) == 0) {
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = block_order.empty() ? i : block_order[i];
      if (selected && !selected(block)) continue;
      blockIdx.x = unsigned(block);
      run_block(threads, order, random);
    }
  }
  if (!failure.empty()) fibers.clear();  // they stopped in the middle of a kernel
  return failure;
}

Guarded::Guarded(std::size_t bytes, bool at_start) {
  const std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
  const std::size_t inner = (bytes + page - 1) / page * page;
  mapped_ = inner + 2 * page;
  mapping_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  char* const first = static_cast<char*>(mapping_) + page;
  mprotect(first, inner, PROT_READ | PROT_WRITE);
  data_ = at_start ? first : first + inner - bytes;
  if (inner < (std::size_t{1} << 31)) std::memset(first, 0xff, inner);
}

Guarded::~Guarded() { munmap(mapping_, mapped_); }

}  // namespace shim
