// The fibers behind cuda_emulator.h.
#undef _FORTIFY_SOURCE  // its longjmp refuses to jump between stacks

#include "trifuse/cuda_platform.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

extern "C" {
extern unsigned char __start_trifuse_shared[] __attribute__((weak));
extern unsigned char __stop_trifuse_shared[] __attribute__((weak));
}

namespace trifuse::emulator {

Index thread_index, block_index, block_dim, grid_dim;

namespace {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 64;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  State state = State::kReady;
  int line = 0;            // of the barrier, or kind of the warp operation, that it waits at
  unsigned exchanges = 0;  // warp operations so far: the parity picks the buffer
  bool started = false;
  jmp_buf resume;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  std::vector<Copy> copies;
};

struct Warp {
  alignas(16) unsigned char values[2][kWarp * 16];
};

std::mutex one_launch;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> shared;
std::string last_message;
bool order_descending = false;
int64_t multiprocessor_count = 1;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* running = nullptr;

void enter() {
  (*running)();
  current->state = State::kDone;
  _longjmp(scheduler, 1);
}

void wait(State state, int line) {
  current->state = state;
  current->line = line;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber, unsigned index) {
  current = &fiber;
  thread_index = {index, 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

// Whether every fiber in [begin, end) waits in `state` at one place; then they may go on.
bool release(unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i]->state != state || fibers[i]->line != fibers[begin]->line) return false;
  }
  for (unsigned i = begin; i < end; ++i) fibers[i]->state = State::kReady;
  return true;
}

// Runs the lanes of a warp until each of them is done or waits for the block.
void run_warp(unsigned begin, unsigned end) {
  do {
    for (unsigned i = 0; i < end - begin; ++i) {
      const unsigned index = order_descending ? end - 1 - i : begin + i;
      if (fibers[index]->state == State::kReady) resume(*fibers[index], index);
    }
  } while (release(begin, end, State::kAtWarp));
}

std::string stuck(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == State::kDone) continue;
    const bool warp = fiber.state == State::kAtWarp;
    return "thread " + std::to_string(i) + " waits at " + (warp ? "a warp operation" : "a barrier") + " (" +
           (warp ? "kind or line " : "line ") + std::to_string(fiber.line) + ") that other threads never reach";
  }
  return "";
}

bool run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.exchanges = 0;
    fiber.copies.clear();
  }
  const unsigned n_warps = (threads + kWarp - 1) / kWarp;
  do {
    for (unsigned i = 0; i < n_warps; ++i) {
      const unsigned w = order_descending ? n_warps - 1 - i : i;
      run_warp(w * kWarp, std::min(threads, (w + 1) * kWarp));
    }
  } while (release(0, threads, State::kAtBarrier));
  last_message = stuck(threads);
  return last_message.empty();
}

void prepare(unsigned threads, size_t shared_bytes) {
  while (fibers.size() < threads) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new unsigned char[kStackBytes]);
  }
  warps.resize((threads + kWarp - 1) / kWarp);
  shared.assign(shared_bytes + kGuardBytes, kPoison);
}

bool guard_intact(size_t shared_bytes) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (shared[shared_bytes + i] != kGuard) return false;
  }
  return true;
}

}  // namespace

void sync_threads(int line) { wait(State::kAtBarrier, line); }
void sync_warp(int line) { wait(State::kAtWarp, line); }
unsigned char* shared_memory() { return shared.data(); }

const unsigned char* exchange(const void* value, size_t bytes, int kind) {
  unsigned char* values = warps[thread_index.x / kWarp].values[current->exchanges++ % 2];
  memcpy(values + 16 * lane(), value, bytes);
  wait(State::kAtWarp, -kind);
  return values;
}

void async_copy(void* to, const void* from, size_t bytes) {
  memset(to, kPoison, bytes);
  current->copies.push_back({to, from, bytes});
}

void async_copy_wait() {
  for (const Copy& copy : current->copies) memcpy(copy.to, copy.from, copy.bytes);
  current->copies.clear();
}

const char* message() { return last_message.c_str(); }
void set_descending(bool descending) { order_descending = descending; }
bool descending() { return order_descending; }
void set_multiprocessors(int64_t count) { multiprocessor_count = count; }
int64_t multiprocessors() { return multiprocessor_count; }

int run(Index grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  last_message.clear();
  if (threads == 0 || threads > 1024) {
    last_message = "a block has from 1 to 1024 threads, not " + std::to_string(threads);
    return kLaunchFailure;
  }
  prepare(threads, shared_bytes);
  running = &kernel;
  grid_dim = grid;
  block_dim = {threads, 1, 1};
  const uint64_t blocks = uint64_t(grid.x) * grid.y;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = order_descending ? blocks - 1 - i : i;
    block_index = {unsigned(block % grid.x), unsigned(block / grid.x), 0};
    memset(shared.data(), kPoison, shared_bytes);
    memset(shared.data() + shared_bytes, kGuard, kGuardBytes);
    if (__start_trifuse_shared) {
      memset(__start_trifuse_shared, kPoison, size_t(__stop_trifuse_shared - __start_trifuse_shared));
    }
    if (!run_block(threads)) return kLaunchFailure;
    if (!guard_intact(shared_bytes)) {
      last_message = "a block wrote past its shared memory";
      return kLaunchFailure;
    }
  }
  return 0;
}

}  // namespace trifuse::emulator
