// Memory that the system has promised but not yet handed out, as a large output is when it has just been allocated.
// Its page faults are most of the time that a dense gradient takes.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace embedkernels::cpu {

constexpr int64_t kFetchedBytes = 256 << 10;  // at a time: still in the cache when they are written

// A task's part of an output that is written from its begin to its end.
class FreshPages {
 public:
  FreshPages(bool fresh, char* begin, char* end) : next_(fresh ? begin : end), end_(end) {}

  // To be called before the bytes below `end` are written. Fetches pages many at a time, by one call instead of one
  // fault for each.
  void before_writing(const char* end) {
    if (end > next_) fetch(end);
  }

 private:
  void fetch([[maybe_unused]] const char* end) {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE: Linux 5.14, newer than some systems' headers
    const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t first = uintptr_t(next_) / page * page;
    const uintptr_t wanted = std::min(std::max(uintptr_t(end), uintptr_t(next_) + kFetchedBytes), uintptr_t(end_));
    const uintptr_t last = (wanted + page - 1) / page * page;
    if (madvise(reinterpret_cast<void*>(first), last - first, kPopulateWrite) == 0) {
      next_ = reinterpret_cast<char*>(last);
      return;
    }
#endif
    next_ = end_;  // an older system: the pages come as they are written
  }

  char *next_, *end_;
};

// Whether memory that is about to be written whole is fresh, and worth fetching. Huge pages are not asked for: where
// they are there they halve the time, but a virtual machine may have to fetch each from its host again, and then the same
// call takes twice as long as another one.
inline bool worth_fetching([[maybe_unused]] char* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  if (bytes < (int64_t{8} << 20)) return false;
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  // The allocator may have written to the first and the last page: one in the middle tells.
  unsigned char resident = 1;
  const uintptr_t middle = uintptr_t(begin + bytes / 2) / page * page;
  return mincore(reinterpret_cast<void*>(middle), page, &resident) == 0 && !(resident & 1);
#else
  return false;
#endif
}

}  // namespace embedkernels::cpu
