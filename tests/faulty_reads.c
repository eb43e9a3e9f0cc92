// A shim for LD_PRELOAD: reads of one file come short, or fail, at a chosen call or at random ones.
//
// Nothing happens before arm(). Calls are counted by all threads together; what is not of the armed file is not counted.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, SHORT, INTERRUPTED, BROKEN, AGAIN, ENDED };

static atomic_int kind = NONE;
static atomic_long calls = 0;
static atomic_long hits = 0;
static long first = 0;      // the call that is hit, from 1 on; 0: random ones
static uint32_t share = 0;  // of 2**32: how many random ones are
static atomic_ulong seed = 1;
static dev_t device;
static ino_t inode;

// `at`: which call; 0 hits random ones, `rate` of 65536.
void arm(int what, long at, int rate, unsigned long start, unsigned long dev, unsigned long ino) {
  kind = NONE;
  calls = hits = 0;
  first = at;
  share = (uint32_t)rate << 16;
  seed = start | 1;
  device = (dev_t)dev;
  inode = (ino_t)ino;
  kind = what;
}

long armed_calls(void) { return calls; }
long armed_hits(void) { return hits; }

static uint32_t dice(void) {  // xorshift64*, each number taken by one thread
  unsigned long old = seed, next;
  do {
    next = old;
    next ^= next >> 12;
    next ^= next << 25;
    next ^= next >> 27;
  } while (!atomic_compare_exchange_weak(&seed, &old, next));
  return (uint32_t)((next * 2685821657736338717ul) >> 32);
}

static int strikes(int fd) {
  const int saved = errno;
  struct stat status;
  if (kind == NONE || fstat(fd, &status) != 0 || status.st_ino != inode || status.st_dev != device) {
    errno = saved;
    return NONE;
  }
  const long number = ++calls;
  if (first != 0 ? number != first : dice() >= share) {
    return NONE;
  }
  ++hits;
  return kind;
}

static ssize_t failed(int fault) {
  errno = fault == INTERRUPTED ? EINTR : fault == BROKEN ? EIO : EAGAIN;
  return fault == ENDED ? 0 : -1;
}

typedef ssize_t (*positioned)(int, const struct iovec *, int, off_t);

static ssize_t shortened(positioned real, int fd, const struct iovec *parts, int count, off_t offset) {
  for (int i = 0; i < count; ++i) {
    if (parts[i].iov_len > 0) {
      const struct iovec some = {parts[i].iov_base, 1 + dice() % parts[i].iov_len};
      return real(fd, &some, 1, offset);
    }
  }
  return 0;
}

static ssize_t vector(const char *name, int fd, const struct iovec *parts, int count, off_t offset) {
  const positioned real = (positioned)dlsym(RTLD_NEXT, name);
  const int fault = strikes(fd);
  return fault == NONE ? real(fd, parts, count, offset)
         : fault == SHORT ? shortened(real, fd, parts, count, offset)
                          : failed(fault);
}

ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
  return vector("preadv", fd, parts, count, offset);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
  return vector("preadv64", fd, parts, count, offset);
}

static ssize_t flagged(const char *name, int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  ssize_t (*const real)(int, const struct iovec *, int, off_t, int) = dlsym(RTLD_NEXT, name);
  const int fault = strikes(fd);
  if (fault == SHORT && flags == 0) {
    return shortened((positioned)dlsym(RTLD_NEXT, "preadv"), fd, parts, count, offset);
  }
  return fault == NONE || fault == SHORT ? real(fd, parts, count, offset, flags) : failed(fault);
}

ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  return flagged("preadv2", fd, parts, count, offset, flags);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
  return flagged("preadv64v2", fd, parts, count, offset, flags);
}

static ssize_t plain(const char *name, int fd, void *to, size_t nbytes, off_t offset) {
  ssize_t (*const real)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, name);
  const int fault = nbytes > 0 ? strikes(fd) : NONE;
  return fault == NONE ? real(fd, to, nbytes, offset)
         : fault == SHORT ? real(fd, to, 1 + dice() % nbytes, offset)
                          : failed(fault);
}

ssize_t pread(int fd, void *to, size_t nbytes, off_t offset) { return plain("pread", fd, to, nbytes, offset); }

ssize_t pread64(int fd, void *to, size_t nbytes, off64_t offset) { return plain("pread64", fd, to, nbytes, offset); }
