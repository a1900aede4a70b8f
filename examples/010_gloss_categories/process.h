#pragma once

// What a long-running command asks of its process: peak memory, Ctrl-C, a
// progress bar.

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/resource.h>
#include <unistd.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace gloss {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// ~~~~ memory ~~~~

/// Lets the next `peak_memory_mib` start from what is resident now, where the
/// system can (Linux).
inline void reset_peak_memory() {
#if defined(__GLIBC__)
  malloc_trim(0); // pages that earlier work left behind would count otherwise
#endif
#if defined(__linux__)
  std::ofstream("/proc/self/clear_refs") << "5";
#endif
}

/// The largest resident size since the reset, in MiB; since the start
/// elsewhere; 0 if unknown.
inline double peak_memory_mib() {
#if defined(__linux__)
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) {
      return std::stod(line.substr(6)) / 1024;
    }
  }
#endif
#if defined(__APPLE__)
  constexpr double kUnit = 1024.0 * 1024.0; // bytes there, KiB elsewhere
#else
  constexpr double kUnit = 1024.0;
#endif
#if defined(__unix__) || defined(__APPLE__)
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    return static_cast<double>(usage.ru_maxrss) / kUnit;
  }
#endif
  return 0 * kUnit;
}

// ~~~~ Ctrl-C ~~~~

inline volatile std::sig_atomic_t interrupt_count = 0;

/// The first Ctrl-C asks training to stop after its step, a second one ends the
/// process.
inline void catch_interrupts() {
  std::signal(SIGINT, [](int) {
    interrupt_count = 1;
    std::signal(SIGINT, SIG_DFL);
  });
}

inline bool interrupted() {
  return interrupt_count != 0;
}

// ~~~~ progress ~~~~

/// A bar on stderr that redraws itself on a terminal and prints a line every
/// tenth elsewhere.
class Progress {
 public:
  Progress(std::string title, int64_t total)
      : title_(std::move(title)), total_(total) {
#if defined(__unix__) || defined(__APPLE__)
    terminal_ = isatty(fileno(stderr)) != 0;
#endif
  }
  ~Progress() {
    if (terminal_ && drawn_) {
      std::fputc('\n', stderr);
    }
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void update(int64_t done, const std::string& note) {
    const bool last = done == total_;
    if (terminal_ ? seconds_since(drawn_at_) < 0.1 && !last && drawn_
                  : done * 10 / total_ == (done - 1) * 10 / total_) {
      return;
    }
    const auto share = static_cast<double>(done) / static_cast<double>(total_);
    const auto left =
        static_cast<int>(seconds_since(start_) * (1 / share - 1) + 0.5);
    constexpr int kWidth = 24;
    const auto filled = static_cast<size_t>(share * kWidth);
    const auto bar =
        std::string(filled, '=') + std::string(kWidth - filled, ' ');
    std::fprintf(
        stderr,
        "%s%-28s [%s] %3.0f %%  %s  %d:%02d left %s",
        terminal_ ? "\r" : "",
        title_.c_str(),
        bar.c_str(),
        100 * share,
        note.c_str(),
        left / 60,
        left % 60,
        terminal_ ? "  " : "\n");
    std::fflush(stderr);
    drawn_ = true;
    drawn_at_ = Clock::now();
  }

 private:
  std::string title_;
  int64_t total_;
  bool terminal_ = false;
  bool drawn_ = false;
  Clock::time_point start_ = Clock::now();
  Clock::time_point drawn_at_ = start_;
};

} // namespace gloss
