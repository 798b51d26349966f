/* SPDX-License-Identifier: Apache-2.0 */
/* Reading messages, with a bounded number of rereads before the caller goes to sleep. */
#define _GNU_SOURCE
#include "messages.h"

#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Sets O_NONBLOCK again if a client has cleared it: otherwise poll(2) and epoll always report an
 * error at once, and never sleep. */
void uffdaemon_do_not_block(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags >= 0 && !(flags & O_NONBLOCK))
        fcntl(fd, F_SETFL, flags | O_NONBLOCK);
}

/* For kernels that cannot read a userfaultfd with RWF_NOWAIT.  A client that clears the flag
 * between the check and the read is not noticed. */
long uffdaemon_read_checked(int fd, void *messages, size_t bytes)
{
    uffdaemon_do_not_block(fd);
    return (long)read(fd, messages, bytes);
}

/* Reads as many messages as are pending and fit.  While there are none, yields the processor and
 * reads again, at most `rereads` times: on one core the yield lets the faulting thread run, on two
 * it is cheaper than the two wake-ups of a sleep.  Returns bytes, or -errno; -EAGAIN if nothing
 * came. */
long uffdaemon_read(int fd, void *messages, size_t bytes, unsigned rereads)
{
    for (;;) {
        long count = uffdaemon_read_pending(fd, messages, bytes);

        if (count >= 0)
            return count;
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        if (rereads == 0) {
            uffdaemon_do_not_block(fd);
            return -EAGAIN;
        }
        rereads--;
        sched_yield();
    }
}

/* Opens a port's spare descriptor, unless it is open.  ENOMEM, EMFILE and the like may pass: it is
 * tried again. */
void uffdaemon_spare_open(_Atomic int32_t *spare)
{
    int none = -1, opened;

    if (atomic_load_explicit(spare, memory_order_relaxed) >= 0)
        return;
    opened = eventfd(0, EFD_CLOEXEC);
    if (opened >= 0 && !atomic_compare_exchange_strong(spare, &none, opened))
        close(opened);
}

/* Returns whether it was open. */
int uffdaemon_spare_close(_Atomic int32_t *spare)
{
    int fd = atomic_exchange(spare, -1);

    return fd >= 0 && close(fd) == 0;
}

/* Whether a read failed for want of a descriptor or of memory, which may pass: its message stays
 * unread.  ENOBUFS: the journal is full, and Python has to save. */
int uffdaemon_may_pass(long result)
{
    return result == -EMFILE || result == -ENFILE || result == -ENOMEM || result == -ENOBUFS;
}
