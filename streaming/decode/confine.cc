#include "streaming/decode/confine.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <seccomp.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>

#include "runtime/error.h"

namespace sluice::decode {
namespace {

constexpr rlim_t kOpenFiles = 128;       // sockets, pipes and events of GLib's loops
constexpr rlim_t kStackBytes = 2 << 20;  // of a thread; the default takes 8 MiB of the memory

void Limit(__rlimit_resource what, rlim_t value, const char* name) {
  const rlimit limit = {value, value};
  if (setrlimit(what, &limit) != 0) {
    throw Error(std::string("[decode] limit of ") + name + ": " + std::strerror(errno));
  }
}

struct Release {
  void operator()(void* filter) const { seccomp_release(filter); }
};
using Filter = std::unique_ptr<void, Release>;

void Check(int result, const char* what) {
  if (result == 0) return;
  throw Error(std::string("[decode] the filter of system calls (") + what +
              "): " + std::strerror(-result) +
              "; it needs a Linux with seccomp, source_isolation \"off\" goes without");
}

// A call that this machine's kind does not have is passed over.
void Allow(const Filter& filter, const char* name) {
  const int number = seccomp_syscall_resolve_name(name);
  if (number == __NR_SCMP_ERROR || number < 0) return;
  Check(seccomp_rule_add(filter.get(), SCMP_ACT_ALLOW, number, 0), name);
}
template <typename... Conditions>
void AllowIf(const Filter& filter, const char* name, Conditions... conditions) {
  const int number = seccomp_syscall_resolve_name(name);
  if (number == __NR_SCMP_ERROR || number < 0) return;
  Check(
      seccomp_rule_add(filter.get(), SCMP_ACT_ALLOW, number, sizeof...(conditions), conditions...),
      name);
}

scmp_arg_cmp Is(unsigned argument, uint64_t value) {
  return SCMP_CMP(argument, SCMP_CMP_EQ, value);
}
scmp_arg_cmp Has(unsigned argument, uint64_t bits) {
  return SCMP_CMP(argument, SCMP_CMP_MASKED_EQ, bits, bits);
}
scmp_arg_cmp Lacks(unsigned argument, uint64_t bits) {
  return SCMP_CMP(argument, SCMP_CMP_MASKED_EQ, bits, 0);
}

}  // namespace

void LimitResources([[maybe_unused]] int64_t memory_bytes) {
  Limit(RLIMIT_CORE, 0, "core dumps");
  Limit(RLIMIT_FSIZE, 0, "file sizes");
  Limit(RLIMIT_NOFILE, kOpenFiles, "open files");
  Limit(RLIMIT_STACK, kStackBytes, "stacks");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  Limit(RLIMIT_DATA, static_cast<rlim_t>(memory_bytes), "memory");
#endif
}

void FilterSystemCalls(bool network) {
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
    throw Error(std::string("[decode] no_new_privs: ") + std::strerror(errno));
  }
  const Filter filter(seccomp_init(SCMP_ACT_ERRNO(EPERM)));
  if (!filter) throw Error("[decode] the filter of system calls: out of memory");
  Check(seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_TSYNC, 1), "all threads");

  for (const char* name :
       {// memory
        "brk", "madvise", "membarrier", "mprotect", "mremap", "munmap",
        // threads
        "exit", "exit_group", "futex", "futex_waitv", "get_robust_list", "getcpu", "gettid",
        "restart_syscall", "rseq", "sched_getaffinity", "sched_getparam", "sched_getscheduler",
        "sched_yield", "set_robust_list", "set_tid_address",
        // clocks
        "clock_getres", "clock_gettime", "clock_nanosleep", "gettimeofday", "nanosleep", "time",
        // signals of its own
        "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait",
        "sigaltstack",
        // what is open
        "close", "dup", "dup2", "dup3", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait",
        "eventfd2", "fadvise64", "fstat", "getpeername", "getsockname", "getsockopt", "lseek",
        "pipe2", "poll", "ppoll", "pread64", "preadv", "pselect6", "read", "readv", "recvfrom",
        "recvmsg", "select", "setsockopt", "shutdown", "write", "writev",
        // itself
        "getegid", "geteuid", "getgid", "getpid", "getppid", "getrandom", "getrlimit", "getrusage",
        "getuid", "sysinfo", "uname"}) {
    Allow(filter, name);
  }
  // Shared memory would not count as the process's own, which is limited.
  constexpr uint64_t kSharing = 0xF;  // MAP_TYPE
  AllowIf(filter, "mmap", SCMP_CMP(3, SCMP_CMP_MASKED_EQ, kSharing, MAP_PRIVATE));
  AllowIf(filter, "clone", Has(0, CLONE_THREAD | CLONE_VM));
  // Its flags lie in memory, where no filter looks: glibc then takes clone.
  Check(seccomp_rule_add(filter.get(), SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0), "clone3");
  AllowIf(filter, "tgkill", Is(0, static_cast<uint64_t>(getpid())));  // abort
  AllowIf(filter, "prctl", Is(0, PR_SET_NAME));
  AllowIf(filter, "prctl", Is(0, PR_GET_NAME));
  AllowIf(filter, "prlimit64", Is(0, 0), Is(2, 0));  // reading alone
  AllowIf(filter, "newfstatat", Has(3, AT_EMPTY_PATH));
  AllowIf(filter, "statx", Has(2, AT_EMPTY_PATH));
  for (const int command : {F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC}) {
    AllowIf(filter, "fcntl", Is(1, static_cast<uint64_t>(command)));
  }
  AllowIf(filter, "ioctl", Is(1, FIONREAD));
  AllowIf(filter, "ioctl", Is(1, FIONBIO));
  // With this flag sending would connect.
  AllowIf(filter, "sendmsg", Lacks(2, MSG_FASTOPEN));
  AllowIf(filter, "sendto", Lacks(3, MSG_FASTOPEN), Is(4, 0));
  if (network) {
    constexpr uint64_t kType = 0xF;  // without SOCK_NONBLOCK and SOCK_CLOEXEC
    for (const uint64_t family : {AF_INET, AF_INET6}) {
      for (const uint64_t protocol : {0, int{IPPROTO_TCP}}) {  // SCTP connects without `connect`
        AllowIf(filter, "socket", Is(0, family),
                SCMP_CMP(1, SCMP_CMP_MASKED_EQ, kType, SOCK_STREAM), Is(2, protocol));
      }
    }
  }
  for (const char* name :
       {"execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev"}) {
    Check(seccomp_rule_add(filter.get(), SCMP_ACT_KILL_PROCESS, seccomp_syscall_resolve_name(name),
                           0),
          name);
  }
  Check(seccomp_load(filter.get()), "loading");
}

}  // namespace sluice::decode
