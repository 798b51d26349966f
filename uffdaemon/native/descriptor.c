/* SPDX-License-Identifier: Apache-2.0 */
/* Opening userfaultfds, the handshake, and registered ranges. */
#define _GNU_SOURCE
#include "descriptor.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "uapi.h"

#ifndef SYS_userfaultfd
#define SYS_userfaultfd 323 /* x86-64; other architectures have it in their header */
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef MFD_HUGE_SHIFT
#define MFD_HUGE_SHIFT 26
#endif

static int flags(int user_mode_only)
{
    return O_CLOEXEC | O_NONBLOCK | (user_mode_only ? UFFD_USER_MODE_ONLY : 0);
}

/* userfaultfd(2).  Returns a descriptor that the caller owns, or -errno. */
int uffdaemon_open_syscall(int user_mode_only)
{
    long fd = syscall(SYS_userfaultfd, flags(user_mode_only));
    return fd < 0 ? -errno : (int)fd;
}

/* USERFAULTFD_IOC_NEW on /dev/userfaultfd, whose file mode is the permission. */
int uffdaemon_open_device(int user_mode_only)
{
    int fd, error, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

    if (device < 0)
        return -errno;
    fd = ioctl(device, USERFAULTFD_IOC_NEW, flags(user_mode_only));
    error = errno;
    close(device);
    return fd < 0 ? -error : fd;
}

/* UFFDIO_API: requested features go in, supported ones come out. */
int uffdaemon_handshake(int fd, uint64_t *features, uint64_t *ioctls)
{
    struct uffdio_api api = {UFFD_API, *features, 0};

    if (ioctl(fd, UFFDIO_API, &api))
        return -errno;
    *features = api.features;
    *ioctls = api.ioctls;
    return 0;
}

int uffdaemon_register(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *ioctls)
{
    struct uffdio_register argument = {{start, length}, mode, 0};

    if (ioctl(fd, UFFDIO_REGISTER, &argument))
        return -errno;
    *ioctls = argument.ioctls;
    return 0;
}

/* The kernel wakes waiting threads before it marks the range as unregistered: a thread that
 * faults in between would sleep for ever.  In one call, since that thread may hold the GIL. */
int uffdaemon_unregister(int fd, uint64_t start, uint64_t length)
{
    struct uffdio_range range = {start, length};

    if (ioctl(fd, UFFDIO_UNREGISTER, &range))
        return -errno;
    ioctl(fd, UFFDIO_WAKE, &range);
    return 0;
}

int uffdaemon_pidfd_open(int pid)
{
    long fd = syscall(SYS_pidfd_open, pid, 0);
    return fd < 0 ? -errno : (int)fd;
}

int uffdaemon_pidfd_getfd(int pidfd, int target)
{
    long fd = syscall(SYS_pidfd_getfd, pidfd, target, 0);
    return fd < 0 ? -errno : (int)fd;
}

/* A memory file for shmem (huge_page_size 0) or hugetlb (a power of two, in bytes). */
int uffdaemon_memfd_create(const char *name, uint64_t huge_page_size)
{
    unsigned mode = MFD_CLOEXEC;
    int fd;

    if (huge_page_size)
        mode |= MFD_HUGETLB | ((unsigned)__builtin_ctzll(huge_page_size) << MFD_HUGE_SHIFT);
    fd = memfd_create(name, mode);
    return fd < 0 ? -errno : fd;
}
