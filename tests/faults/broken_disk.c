/* Makes system calls on chosen files fail: gcc -shared -fPIC broken_disk.c -o broken_disk.so -ldl, then LD_PRELOAD.
   The file $BROKEN_DISK says what: "CALL ERRNO PART", where CALL is read, write, fsync, rename or flock, and PART a part of the path.
   No such file: all is well. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
  char wanted[16], part[PATH_MAX], line[PATH_MAX + 64];
  const char *control = getenv("BROKEN_DISK");
  int number, file = control ? (int)syscall(SYS_open, control, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  long length = syscall(SYS_read, file, line, sizeof line - 1);
  syscall(SYS_close, file);
  line[length > 0 ? length : 0] = 0;
  if (sscanf(line, "%15s %d %4095s", wanted, &number, part) != 3 || strcmp(call, wanted) || !strstr(path, part)) return 0;
  errno = number;
  return 1;
}

static int fails_on(const char *call, int descriptor) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  long length = syscall(SYS_readlink, link, path, sizeof path - 1);
  path[length > 0 ? length : 0] = 0;
  int before = errno, failed = length > 0 && fails(call, path);
  if (!failed) errno = before;
  return failed;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t size) { return fails_on("write", file) ? -1 : REAL(write)(file, data, size); }
int fsync(int file) { return fails_on("fsync", file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails_on("fsync", file) ? -1 : REAL(fdatasync)(file); }
int flock(int file, int how) { return fails_on("flock", file) ? -1 : REAL(flock)(file, how); }
int rename(const char *from, const char *to) { return fails("rename", from) ? -1 : REAL(rename)(from, to); }
ssize_t read(int file, void *data, size_t size) { return fails_on("read", file) ? -1 : REAL(read)(file, data, size); }
