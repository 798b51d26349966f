/* SPDX-License-Identifier: Apache-2.0 */
/* Reading messages, with a bounded number of rereads before the caller goes to sleep. */
#define _GNU_SOURCE
#include "messages.h"

#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <time.h>
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

static _Atomic int spare = -1; /* a descriptor to close for that of a FORK event */

/* Opens the spare descriptor, unless it is open.  ENOMEM, EMFILE and the like may pass: it is tried
 * again. */
void uffdaemon_spare_open(void)
{
    int none = -1, opened;

    if (atomic_load_explicit(&spare, memory_order_relaxed) >= 0)
        return;
    opened = eventfd(0, EFD_CLOEXEC);
    if (opened >= 0 && !atomic_compare_exchange_strong(&spare, &none, opened))
        close(opened);
}

/* Whether a read failed for want of a descriptor or of memory, which may pass: its message stays
 * unread.  Then makes room for one descriptor, or waits for a moment. */
int uffdaemon_may_pass(long result)
{
    struct timespec pause = {0, 2000000};
    int fd;

    if (result != -EMFILE && result != -ENFILE && result != -ENOMEM && result != -ENOBUFS)
        return 0;
    if (result == -ENOBUFS) { /* the journal is full: Python has to save */
        nanosleep(&pause, NULL);
        return 1;
    }
    fd = atomic_exchange(&spare, -1);
    if (fd >= 0)
        close(fd);
    else
        nanosleep(&pause, NULL);
    return 1;
}
