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

// Whether memory that is about to be written whole is fresh, and worth fetching. If so, asks for huge pages, which
// then cost no memory and save most of the page faults. Only for the first 256 MiB: a virtual machine may have to fetch
// huge pages from its host again, which takes longer than they save.
inline bool prepare_fresh_pages([[maybe_unused]] char* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  if (bytes < (int64_t{8} << 20)) return false;
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const auto page_of = [page](char* address) { return uintptr_t(address) / page * page; };
  // The allocator may have written to the first and the last page: one in the middle tells.
  unsigned char resident = 1;
  if (mincore(reinterpret_cast<void*>(page_of(begin + bytes / 2)), page, &resident) != 0 || resident & 1) return false;
#if defined(MADV_HUGEPAGE)
  const uintptr_t first = page_of(begin) + page;
  const uintptr_t last = page_of(begin + std::min(bytes, int64_t{256} << 20));
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
  return true;
#else
  return false;
#endif
}

}  // namespace embedkernels::cpu
