#pragma once

/// The operating system, in one place: reading a file through memory, replacing
/// a file whole, appending to one, keeping a library loaded. Linux and macOS
/// have their branch; elsewhere, and with PEFT_PORTABLE defined, standard C++
/// does the same work (reads into memory, no promise after a power cut).

#include <c10/util/Exception.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#if !defined(PEFT_PORTABLE) && (defined(__unix__) || defined(__APPLE__))
#define PEFT_POSIX 1
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#else
#define PEFT_POSIX 0
#if defined(_WIN32)
#include <c10/util/win32-headers.h>
#endif
#endif

namespace peft::detail {

/// The system's words for an error number.
inline std::string system_message(int error) {
  return std::generic_category().message(error);
}

/// The bytes of a file. Writing to them changes this process's copy of the
/// touched pages and never the file.
///
/// The file should not be shortened by others while it is open: on POSIX the
/// missing pages could then not be read.
class MappedFile {
 public:
  /// Opens `path`; throws c10::Error when it cannot be read.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::byte* data() noexcept {
    return data_;
  }
  const std::byte* data() const noexcept {
    return data_;
  }
  size_t size() const noexcept {
    return size_;
  }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Writes a file so that others see the old one or the whole new one, never a
/// part: the bytes go to a temporary file beside it, which `commit` renames.
/// Without a commit nothing remains.
class AtomicFile {
 public:
  /// Starts a new content for `path`; throws c10::Error when its folder cannot
  /// be written to, or a folder has that name.
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Appends bytes.
  void write(const void* bytes, size_t count);
  void write(const std::string& text) {
    write(text.data(), text.size());
  }

  /// Makes the new content the file, on the disk when this returns.
  void commit();

 private:
  /// Gives up: closes and removes the temporary file.
  void discard() noexcept;
  void check_target();
  [[noreturn]] void fail(const char* what, int error);

  std::filesystem::path target_;
  std::filesystem::path temporary_;
#if PEFT_POSIX
  int file_ = -1;
#else
  std::ofstream file_;
#endif
};

/// A file that grows by what is appended, each piece on the disk when append()
/// returns. On POSIX no other AppendFile can have it open meanwhile.
class AppendFile {
 public:
  /// Opens `path`, made if need be; throws c10::Error when that fails.
  explicit AppendFile(const std::string& path);
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  /// All that is in the file.
  std::string read() const;
  /// Cuts the file to its first `size` bytes.
  void truncate(size_t size);
  void append(const std::string& text);

 private:
  [[noreturn]] void fail(const char* what, int error) const;

  std::string path_;
#if PEFT_POSIX
  int file_ = -1;
#else
  std::ofstream file_;
#endif
};

/// Keeps the program or library that holds `address` loaded until the process
/// ends, so that dlclose cannot unmap it. True when it is kept; what is part of
/// the program itself is never unmapped and may answer false.
bool keep_loaded(const void* address) noexcept;

// ~~~~ MappedFile ~~~~

#if PEFT_POSIX

inline MappedFile::MappedFile(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  TORCH_CHECK(
      file >= 0, "peft: cannot open ", path, ": ", system_message(errno));
  struct stat status = {};
  int error = ::fstat(file, &status) == 0 ? 0 : errno;
  const bool regular = error == 0 && S_ISREG(status.st_mode);
  if (regular && status.st_size > 0) {
    size_ = static_cast<size_t>(status.st_size);
    // Private pages that may be written to: copied when touched.
    void* pages =
        ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    if (pages == MAP_FAILED) {
      error = errno;
    } else {
      data_ = static_cast<std::byte*>(pages);
    }
  }
  ::close(file); // the mapping stays
  TORCH_CHECK(
      error == 0, "peft: cannot read ", path, ": ", system_message(error));
  TORCH_CHECK(regular, "peft: cannot read ", path, ": it is not a file");
}

inline MappedFile::~MappedFile() {
  if (data_ != nullptr) {
    ::munmap(data_, size_);
  }
}

#else

inline MappedFile::MappedFile(const std::string& path) {
  std::error_code error;
  TORCH_CHECK(
      std::filesystem::is_regular_file(path, error),
      "peft: cannot read ",
      path,
      ": there is no such file");
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  const auto end = static_cast<std::streamoff>(file.tellg());
  TORCH_CHECK(file && end >= 0, "peft: cannot open ", path);
  size_ = static_cast<size_t>(end);
  if (size_ > 0) {
    auto bytes = std::make_unique<std::byte[]>(size_);
    file.seekg(0);
    file.read(reinterpret_cast<char*>(bytes.get()), end);
    TORCH_CHECK(file.gcount() == end, "peft: cannot read all of ", path);
    data_ = bytes.release();
  }
}

inline MappedFile::~MappedFile() {
  delete[] data_;
}

#endif

// ~~~~ AtomicFile ~~~~

/// A name beside `target` that no other writer is likely to use.
inline std::filesystem::path temporary_name(
    const std::filesystem::path& target) {
  static std::atomic<uint64_t> count{0};
#if PEFT_POSIX
  const auto process = static_cast<uint64_t>(::getpid());
#else
  const auto process = reinterpret_cast<uintptr_t>(&count);
#endif
  auto name = target;
  name += ".tmp-" + std::to_string(process) + "-" + std::to_string(++count);
  return name;
}

/// The file that a symbolic link at `path` finally names, or `path` itself.
inline std::filesystem::path resolve_link(const std::filesystem::path& path) {
  std::error_code error;
  const auto resolved = std::filesystem::is_symlink(path, error)
      ? std::filesystem::weakly_canonical(path, error)
      : path;
  return error ? path : resolved;
}

/// A folder would only be found in the way by commit().
inline void AtomicFile::check_target() {
  std::error_code ignored;
  if (std::filesystem::is_directory(target_, ignored)) {
    fail("replace", EISDIR);
  }
}

inline void AtomicFile::fail(const char* what, int error) {
  const auto name = target_.string();
  discard();
  TORCH_CHECK(
      false,
      "peft: cannot ",
      what,
      " ",
      name,
      ": ",
      error != 0 ? system_message(error) : "the disk may be full");
}

#if PEFT_POSIX

/// A new name is on the disk only when its folder is.
inline void sync_folder_of(const std::filesystem::path& path) {
  const auto folder = path.parent_path();
  const int entry =
      ::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_CLOEXEC);
  if (entry >= 0) {
    ::fsync(entry);
    ::close(entry);
  }
}

/// Writes all of `count` bytes to an open file; the error number, or 0.
inline int write_all(int file, const void* bytes, size_t count) {
  const auto* next = static_cast<const char*>(bytes);
  while (count > 0) {
    // One call may write at most 2 GiB on some systems.
    const size_t part = count < (size_t{1} << 30) ? count : size_t{1} << 30;
    const auto written = ::write(file, next, part);
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written < 0) {
      return errno;
    }
    next += written;
    count -= static_cast<size_t>(written);
  }
  return 0;
}

inline AtomicFile::AtomicFile(const std::string& path)
    : target_(resolve_link(path)) {
  check_target();
  do {
    temporary_ = temporary_name(target_);
    file_ = ::open(
        temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (file_ < 0 && errno == EEXIST);
  if (file_ < 0) {
    const int error = errno;
    temporary_.clear();
    fail("write", error);
  }
}

inline void AtomicFile::write(const void* bytes, size_t count) {
  TORCH_CHECK(
      file_ >= 0, "peft: ", target_.string(), " is already closed for writing");
  if (const int error = write_all(file_, bytes, count); error != 0) {
    fail("write", error);
  }
}

inline void AtomicFile::commit() {
  TORCH_CHECK(
      file_ >= 0, "peft: ", target_.string(), " is already closed for writing");
  // An existing file keeps its permissions.
  struct stat status = {};
  if (::stat(target_.c_str(), &status) == 0 &&
      ::fchmod(file_, status.st_mode & 07777) != 0) {
    fail("set the permissions of", errno);
  }
  if (::fsync(file_) != 0) {
    fail("write", errno);
  }
  const int closed = ::close(std::exchange(file_, -1));
  if (closed != 0) {
    fail("write", errno);
  }
  if (::rename(temporary_.c_str(), target_.c_str()) != 0) {
    fail("replace", errno);
  }
  temporary_.clear();
  sync_folder_of(target_);
}

inline void AtomicFile::discard() noexcept {
  if (file_ >= 0) {
    ::close(std::exchange(file_, -1));
  }
  if (!temporary_.empty()) {
    ::unlink(temporary_.c_str());
    temporary_.clear();
  }
}

#else

inline AtomicFile::AtomicFile(const std::string& path)
    : target_(resolve_link(path)) {
  check_target();
  temporary_ = temporary_name(target_);
  file_.open(temporary_, std::ios::binary | std::ios::trunc);
  if (!file_) {
    temporary_.clear();
    fail("write", errno);
  }
}

inline void AtomicFile::write(const void* bytes, size_t count) {
  TORCH_CHECK(
      file_.is_open(),
      "peft: ",
      target_.string(),
      " is already closed for writing");
  file_.write(
      static_cast<const char*>(bytes), static_cast<std::streamsize>(count));
  if (!file_) {
    fail("write", errno);
  }
}

inline void AtomicFile::commit() {
  TORCH_CHECK(
      file_.is_open(),
      "peft: ",
      target_.string(),
      " is already closed for writing");
  file_.close();
  if (!file_) {
    fail("write", errno);
  }
  std::error_code error;
  std::filesystem::rename(temporary_, target_, error);
  if (error) {
    fail("replace", error.value());
  }
  temporary_.clear();
}

inline void AtomicFile::discard() noexcept {
  file_.close();
  if (!temporary_.empty()) {
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
    temporary_.clear();
  }
}

#endif

inline AtomicFile::~AtomicFile() {
  discard();
}

// ~~~~ AppendFile ~~~~

inline void AppendFile::fail(const char* what, int error) const {
  TORCH_CHECK(
      false,
      "peft: cannot ",
      what,
      " ",
      path_,
      ": ",
      error != 0 ? system_message(error) : "the disk may be full");
}

#if PEFT_POSIX

inline AppendFile::AppendFile(const std::string& path) : path_(path) {
  file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file_ < 0) {
    fail("open", errno);
  }
  // Where a file system knows no locks the file is open without one.
  if (::flock(file_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
    ::close(file_);
    TORCH_CHECK(
        false,
        "peft: ",
        path,
        " is open for writing already, here or in another program; let that "
        "end first");
  }
  sync_folder_of(path);
}

inline AppendFile::~AppendFile() {
  ::close(file_);
}

inline std::string AppendFile::read() const {
  std::string text;
  char part[1 << 16];
  for (off_t at = 0;;) {
    const auto count = ::pread(file_, part, sizeof(part), at);
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      fail("read", errno);
    }
    if (count == 0) {
      return text;
    }
    text.append(part, static_cast<size_t>(count));
    at += count;
  }
}

inline void AppendFile::truncate(size_t size) {
  if (::ftruncate(file_, static_cast<off_t>(size)) != 0 ||
      ::fsync(file_) != 0) {
    fail("cut", errno);
  }
}

inline void AppendFile::append(const std::string& text) {
  const int error = write_all(file_, text.data(), text.size());
  if (error != 0) {
    fail("write", error);
  }
  if (::fsync(file_) != 0) {
    fail("write", errno);
  }
}

#else

inline AppendFile::AppendFile(const std::string& path)
    : path_(path), file_(path, std::ios::binary | std::ios::app) {
  if (!file_) {
    fail("open", errno);
  }
}

inline AppendFile::~AppendFile() = default;

inline std::string AppendFile::read() const {
  std::ifstream file(path_, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void AppendFile::truncate(size_t size) {
  std::error_code error;
  file_.close();
  std::filesystem::resize_file(path_, size, error);
  if (error) {
    fail("cut", error.value());
  }
  file_.open(path_, std::ios::binary | std::ios::app);
}

inline void AppendFile::append(const std::string& text) {
  file_ << text << std::flush;
  if (!file_) {
    fail("write", errno);
  }
}

#endif

// ~~~~ keep_loaded ~~~~

#if PEFT_POSIX && defined(RTLD_NODELETE) && defined(RTLD_NOLOAD)

inline bool keep_loaded(const void* address) noexcept {
  Dl_info library = {};
  if (::dladdr(address, &library) == 0 || library.dli_fname == nullptr) {
    return false;
  }
  // Already loaded, so this only adds the mark (and a reference, kept).
  return ::dlopen(library.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE) !=
      nullptr;
}

#elif defined(_WIN32)

inline bool keep_loaded(const void* address) noexcept {
  HMODULE library = nullptr;
  return ::GetModuleHandleExW(
             GET_MODULE_HANDLE_EX_FLAG_PIN |
                 GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS,
             reinterpret_cast<LPCWSTR>(address),
             &library) != 0;
}

#else

inline bool keep_loaded(const void*) noexcept {
  return false;
}

#endif

} // namespace peft::detail

/// Keeps every program or library loaded that includes the header where this
/// stands; put it at namespace scope, inside any namespace, once a header. A
/// variable of internal linkage, so that each library has its own: a static
/// inside an inline function would be one for the whole process.
#define PEFT_KEEP_THIS_LIBRARY_LOADED(name)              \
  [[maybe_unused]] static const char name##_address = 0; \
  [[maybe_unused]] static const bool name =              \
      ::peft::detail::keep_loaded(&name##_address)
